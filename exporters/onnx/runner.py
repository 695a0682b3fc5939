"""`python -m adaras_export.exporters.onnx.runner DIR "prompt"`: runs an export to target onnx.

Needs onnxruntime and tokenizers alone.

Prompt in, text out while it comes, and what the gate decided. One prompt at a time; knows nothing of rules, torch and
Transformers. The KV cache stays in ONNX Runtime's own memory, on the device that computes.

B = 1 sequence, S tokens of a call, P columns of the KV cache before it, V vocabulary.
"""

import argparse
import itertools
import json
import math
import reprlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaras_export.errors import (
    AdarasError,
    ArtifactError,
    MissingExtraError,
    RuleError,
    TraceError,
    first_line,
    install_command,
    require,
)
from adaras_export.exporters.onnx.builds import require_one
from adaras_export.files import atomic, safe_read
from adaras_export.files.safe_read import UnreadableError
from adaras_export.files.safetensors_record import Array

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_PURPOSE = "running an ONNX export"
_STRENGTH, _THRESHOLD = "steering_strength", "steering_threshold"


@dataclass(frozen=True)
class Decision:
    """What became of a prompt: p(correct), None without a gate, and whether the answer is steered."""

    probability: float | None
    steered: bool


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens; temperature 0 is greedy and ignores ``top_p`` and ``seed``.

    Raises:
        TraceError: a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {value} (expected {expected})"
            for name, value, expected, holds in (
                ("max_new_tokens", self.max_new_tokens, "1 or more", self.max_new_tokens >= 1),
                ("temperature", self.temperature, "0 or more", 0 <= self.temperature < math.inf),
                ("top_p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1),
                ("seed", self.seed, "0 or more", self.seed >= 0),
            )
            if not holds
        ]
        if wrong:
            raise TraceError(f"sampling: {'; '.join(wrong)}")

    def choose(self, logits_V: Array, random: np.random.Generator) -> int:
        """A token by its logits, (V,) float; draws from ``random`` unless greedy."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        scaled_V = logits_V.astype(np.float64) / self.temperature
        order_V = np.argsort(-scaled_V, kind="stable")
        weight_V = np.exp(scaled_V[order_V] - scaled_V[order_V[0]])
        before_V = np.cumsum(weight_V) - weight_V  # of the likelier tokens; the likeliest has none
        kept_V = np.where(before_V < self.top_p * weight_V.sum(), weight_V, 0)
        return int(random.choice(order_V, p=kept_V / kept_V.sum()))


class OnnxModel:
    """An exported folder, opened.

    Attributes:
        decision: of the prompt that `stream` answers or answered last; None before its first call of the graph.
        gated: whether the rule has a gate.
    """

    def __init__(self, folder: str | Path, *, provider: str = "cpu") -> None:
        """Open the folder of an export to target onnx on a provider of `PROVIDERS`.

        Raises:
            ArtifactError: it is no such folder, a file is missing, or this onnxruntime cannot open the graph.
            MissingExtraError: a library is not installed, or has no such provider.
            BrokenInstallationError: two builds of onnxruntime are installed.
        """
        folder = Path(folder)
        require_one(_PURPOSE)
        path = folder / "onnx" / "model.onnx"
        config = atomic.read_json(folder / "config.json") if path.is_file() else {}
        if "adaras" not in config:
            raise ArtifactError(f"{folder}: is no export to target onnx; expected onnx/model.onnx and its config.json")
        self.decision: Decision | None = None
        self._tokenizer = _tokenizer(folder)
        self._template = _chat_template(folder)
        self._ends = ends_of(folder, config)
        self._device = provider
        self._session = _session(path, provider)
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self._outputs = [one.name for one in self._session.get_outputs()]
        self._dials = {one.name for one in self._session.get_overridable_initializers()}
        self.gated = _THRESHOLD in self._dials

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        """The prompt's tokens: as the user's turn of a chat where the model has a chat template, unless ``raw``.

        Raises:
            TraceError: it has no tokens, or the template refuses it.
            MissingExtraError: the template needs Jinja2.
        """
        if raw or self._template is None:
            ids: list[int] = self._tokenizer.encode(prompt).ids
        else:
            ids = self._tokenizer.encode(self._template.render(prompt), add_special_tokens=False).ids
        if not ids:
            raise TraceError("prompt: has no tokens; expected some text")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(
        self,
        prompt: str,
        decoding: Decoding | None = None,
        *,
        strength: float | None = None,
        threshold: float | None = None,
        raw: bool = False,
    ) -> Iterator[str]:
        """The answer, in pieces of text as its tokens come; joined, they are the decoded whole.

        Args:
            prompt: what to answer.
            decoding: how to choose tokens; greedy by default.
            strength: in place of the rule's; 0 is the base model.
            threshold: in place of the gate's: the prompt is steered where p(correct) is below.
            raw: leave the chat template out.

        Raises:
            RuleError: a threshold for a rule without a gate, or a number that is none.
            TraceError, MissingExtraError: as `encode`.
        """
        seen: list[int] = []
        done = 0
        for token in self.tokens(self.encode(prompt, raw=raw), decoding, strength=strength, threshold=threshold):
            seen.append(token)
            text = self.decode(seen)
            if len(text) > done and not text.endswith("\ufffd"):  # the first bytes of a letter
                yield text[done:]
                done = len(text)
        if rest := self.decode(seen)[done:]:
            yield rest

    def tokens(
        self,
        prompt: Sequence[int],
        decoding: Decoding | None = None,
        *,
        strength: float | None = None,
        threshold: float | None = None,
    ) -> Iterator[int]:
        """The answer to a tokenised prompt, token by token; the last is an end-of-sequence token, if one came.

        Raises:
            RuleError: as `stream`.
        """
        how = decoding or Decoding()
        dials = self._given(strength, threshold)
        self.decision = None
        random = np.random.default_rng(how.seed)
        cache, unread, read = self._empty_cache(), list(prompt), 0
        for _ in range(how.max_new_tokens):
            logits_V, cache = self._call(unread, read, cache, dials)
            self.decision = self.decision or self._decision(cache, strength)
            read += len(unread)
            unread = [how.choose(logits_V, random)]
            yield unread[0]
            if unread[0] in self._ends:
                return

    def _given(self, strength: float | None, threshold: float | None) -> dict[str, Any]:
        """The dials that were given, as values of ONNX Runtime."""
        given = {_STRENGTH: strength, _THRESHOLD: threshold}
        dials = {name: value for name, value in given.items() if value is not None}
        if _THRESHOLD in dials and not self.gated:
            raise RuleError(f"threshold {threshold}: the rule has no gate; expected none")
        if wrong := [f"{name} {value}" for name, value in dials.items() if not math.isfinite(value)]:
            raise RuleError(f"{', '.join(wrong)}; expected a finite number")
        return {name: _value(np.asarray(value, np.float32)) for name, value in dials.items()}

    def _call(
        self, unread: list[int], read: int, cache: dict[str, Any], dials: dict[str, Any]
    ) -> tuple[Array, dict[str, Any]]:
        """One call of the graph: logits (V,) of the last token, and the KV cache behind it."""
        tokens = {
            "input_ids": np.asarray([unread]),
            "attention_mask": np.ones((1, read + len(unread)), np.int64),
            "position_ids": np.arange(read, read + len(unread))[None],
        }
        binding = self._session.io_binding()
        for name, array in tokens.items():
            if name in self._inputs:
                binding.bind_ortvalue_input(name, _value(array))
        for name, value in {**cache, **dials}.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self._device)
        self._session.run_with_iobinding(binding)
        found = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        logits_BSV: Array = found.pop("logits").numpy()
        return logits_BSV[0, -1], {name.replace("present.", "past_key_values."): one for name, one in found.items()}

    def _empty_cache(self) -> dict[str, Any]:
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        pasts = {name: one for name, one in self._inputs.items() if name.startswith("past_key_values.")}
        return {
            name: _value(np.zeros((1, one.shape[1], 0, one.shape[3]), types[one.type])) for name, one in pasts.items()
        }

    def _decision(self, cache: dict[str, Any], strength: float | None) -> Decision:
        """What the gate left in the last layer of the KV cache: key 1 where steered, value p(correct)."""
        if not self.gated:
            return Decision(None, steered=strength != 0)
        last = max(int(name.split(".")[1]) for name in cache)
        key, value = (cache[f"past_key_values.{last}.{part}"].numpy()[0, 0, 0, 0] for part in ("key", "value"))
        return Decision(float(value), steered=bool(key) and strength != 0)


def _value(array: Array) -> Any:  # noqa: ANN401 - onnxruntime has no types
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _session(path: Path, provider: str) -> Any:  # noqa: ANN401 - onnxruntime has no types
    import onnxruntime

    if provider not in PROVIDERS:
        raise MissingExtraError(f"provider {provider}: unknown; expected one of: {', '.join(PROVIDERS)}")
    no_provider = MissingExtraError(
        f"provider {provider}: onnxruntime {onnxruntime.__version__} cannot use {PROVIDERS[provider]} here; expected "
        f"onnxruntime-gpu, CUDA and cuDNN: {install_command('onnx-gpu')}"
    )
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise no_provider
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # else it warns of every initialiser that may be overridden
    how = {"use_tf32": "0"} if provider == "cuda" else {}  # it would round to ten bits
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(PROVIDERS[provider], how)])
    except Exception as error:  # ONNX Runtime's errors have no class of their own in common
        raise ArtifactError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot open this graph ({first_line(error)}); expected an "
            "intact export, and an onnxruntime that knows its opset: pip install --upgrade onnxruntime"
        ) from error
    if session.get_providers()[0] != PROVIDERS[provider]:  # it falls back to the CPU where a library is missing
        raise no_provider
    return session


def _tokenizer(folder: Path) -> Any:  # noqa: ANN401 - a class of compiled code
    tokenizers = require("tokenizers", "onnx", _PURPOSE)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; expected the tokenizer of the base model: export again")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # what it raises has no class of its own
        raise ArtifactError(f"{path}: {error}; expected a tokenizer of the tokenizers library") from error


def ends_of(folder: Path, config: dict[str, Any]) -> set[int]:
    """The ids that end a text, by the settings of an exported folder.

    Raises:
        ArtifactError: they are no whole numbers.
    """
    path = folder / "generation_config.json"
    found = {**config, **(atomic.read_json(path) if path.is_file() else {})}.get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(end) is int for end in ends):
        raise ArtifactError(f"{folder}: eos_token_id is {reprlib.repr(found)}; expected whole numbers: export again")
    return set(ends)


@dataclass(frozen=True)
class _Template:
    """A chat template: Jinja, and the special tokens that it may name."""

    source: str
    special: dict[str, str]

    def render(self, prompt: str) -> str:
        """A chat of one user's turn, up to where the model's begins."""
        require("jinja2", "onnx", "a chat template (--raw leaves it out)")
        from jinja2 import TemplateError
        from jinja2.ext import Extension
        from jinja2.nodes import Node
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        class Generation(Extension):
            """What Transformers marks an assistant's text with; it leaves the text as it is."""

            tags = {"generation"}  # noqa: RUF012 - as the base class has it

            def parse(self, parser: Parser) -> list[Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = _now
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        messages = [{"role": "user", "content": prompt}]
        try:
            return environment.from_string(self.source).render(
                messages=messages, add_generation_prompt=True, **self.special
            )
        except (TemplateError, *_EXPRESSIONS) as error:
            raise TraceError(f"prompt: the chat template refuses it ({error}); leave it out with --raw") from error


# What a template's own expressions raise: 1 / 0, [0][1], 1 + "", a macro that calls itself.
_EXPRESSIONS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().astimezone().strftime(form)


def _chat_template(folder: Path) -> _Template | None:
    """The template in a file of its own, or the (default) one among the tokenizer's settings."""
    path = folder / "tokenizer_config.json"
    settings = atomic.read_json(path) if path.is_file() else {}
    if (own := folder / "chat_template.jinja").is_file():
        source: Any = _text(own)
    else:
        source = _default(settings.get("chat_template"))
    if source is not None and not isinstance(source, str):
        raise ArtifactError(f"{path}: chat_template is {reprlib.repr(source)}; expected text, or a list of named ones")
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    special = {key: text for key, text in texts.items() if isinstance(text, str)}
    return None if source is None else _Template(source, special)


def _default(source: Any) -> Any:  # noqa: ANN401 - a JSON value
    """Of several named templates the default one."""
    if not isinstance(source, list) or not all(isinstance(one, dict) for one in source):
        return source
    return {str(one.get("name")): one.get("template") for one in source}.get("default")


def _text(path: Path) -> str:
    try:
        return safe_read.text(safe_read.content(path))
    except UnreadableError as error:
        raise ArtifactError(f"{path}: {error}; expected a chat template") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 after a line on standard error for input that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m adaras_export.exporters.onnx.runner", description="Run an ONNX export."
    )
    parser.add_argument("folder", type=Path, help="folder of an export to target onnx")
    parser.add_argument("prompt")
    parser.add_argument("--strength", type=float, help="in place of the rule's; 0 is the base model")
    parser.add_argument("--threshold", type=float, help="steer where p(correct) is below; in place of the gate's")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", action="store_true", help="leave the chat template out")
    parser.add_argument("--provider", choices=PROVIDERS, default="cpu")
    given = parser.parse_args(arguments)
    try:
        decoding = Decoding(given.max_new_tokens, given.temperature, given.top_p, given.seed)
        model = OnnxModel(given.folder, provider=given.provider)
        dials = {"strength": given.strength, "threshold": given.threshold}
        pieces = model.stream(given.prompt, decoding, raw=given.raw, **dials)
        first = next(pieces, "")
        sys.stderr.write(_line(model.decision) + "\n")
        for piece in itertools.chain([first], pieces):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    except AdarasError as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        return 2
    return 0


def _line(decision: Decision | None) -> str:
    assert decision is not None  # the first call has been
    verdict = "steered" if decision.steered else "not steered"
    return (
        f"no gate: {verdict}" if decision.probability is None else f"p(correct) {decision.probability:.4f}: {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
