"""An exported graph in ONNX Runtime, and the loop that decodes with it. Knows no torch and no tokenizer.

The KV cache stays in ONNX Runtime's own memory, on the device that computes.

B sequences, S tokens of a call, A columns of the attention mask, V vocabulary.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaras_export.errors import ArtifactError, MissingExtraError, RuleError, first_line, install_command
from adaras_export.exporters.onnx.builds import require_one
from adaras_export.files import atomic
from adaras_export.files.safetensors_record import Array

GRAPH = "onnx/model.onnx"
"""Where the graph is in an exported folder."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
STRENGTH, THRESHOLD = "steering_strength", "steering_threshold"
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def greedy(logits_BV: Array) -> Array:
    """The likeliest token of each row, (B,)."""
    tokens_B: Array = logits_BV.argmax(-1)
    return tokens_B


@dataclass(frozen=True)
class Step:
    """What one call of the graph gave.

    Attributes:
        logits_BV: of the last token of each row.
        tokens_B: the next token of each row.
        state: keys and values of the KV cache's last layer, where the gate's state is; None without a gate.
    """

    logits_BV: Array
    tokens_B: Array
    state: tuple[Any, Any] | None

    @property
    def probability(self) -> Array | None:
        """p(correct) of each prompt, (B,); None without a gate."""
        return None if self.state is None else self.state[1].numpy()[:, 0, 0, 0].astype(np.float32)

    @property
    def steered(self) -> Array | None:
        """Whether the gate has each row steered, (B,); None without a gate."""
        return None if self.state is None else self.state[0].numpy()[:, 0, 0, 0] != 0


class Session:
    """An opened graph.

    Attributes:
        gated: whether the rule has a gate.
    """

    def __init__(self, path: Path, provider: str = "cpu") -> None:
        """Open a graph on a provider of `PROVIDERS`.

        Raises:
            ArtifactError: this ONNX Runtime cannot open the graph.
            MissingExtraError: ONNX Runtime is not installed, or has no such provider.
            BrokenInstallationError: two builds of it are installed.
        """
        self.path = path
        self._device = provider
        self._session = _opened(path, provider)
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self.gated = THRESHOLD in {value.name for value in self._session.get_overridable_initializers()}

    def batches(self, count: int) -> list[slice]:
        """Which of ``count`` rows can be decoded together: a graph without position ids cannot pad on the left."""
        if "position_ids" in self._inputs:
            return [slice(count)]
        return [slice(row, row + 1) for row in range(count)]

    def decode(
        self,
        rows: Sequence[Sequence[int]],
        choose: Callable[[Array], Array] = greedy,
        dials: Mapping[str, float] | None = None,
    ) -> Iterator[Step]:
        """The prompts in one call, then token by token, without an end.

        Args:
            rows: token ids of the prompts.
            choose: the next token of each row, (B,), from logits (B, V).
            dials: values of `STRENGTH` and `THRESHOLD` in place of the rule's own.

        Raises:
            RuleError: a threshold for a rule without a gate, or a value that is no finite number.
            ArtifactError: ONNX Runtime cannot run the graph.
        """
        fed = self._dials(dials or {})
        ids_BS, mask_BA = _left_padded(rows)
        cache = self._empty_cache(len(rows))
        while True:
            logits_BV, cache = self._call(ids_BS, mask_BA, {**cache, **fed})
            tokens_B = choose(logits_BV)
            yield Step(logits_BV, tokens_B, self._state(cache))
            ids_BS = tokens_B[:, None]
            mask_BA = np.concatenate([mask_BA, np.ones_like(mask_BA[:, :1])], axis=1)

    def _dials(self, dials: Mapping[str, float]) -> dict[str, Any]:
        if THRESHOLD in dials and not self.gated:
            raise RuleError(f"threshold {dials[THRESHOLD]}: the rule has no gate; expected none")
        largest = float(np.finfo(np.float32).max)
        if wrong := [f"{name} {value}" for name, value in dials.items() if not abs(value) <= largest]:
            raise RuleError(f"{', '.join(wrong)}; expected a finite number")
        return {name: _value(np.asarray(value, np.float32)) for name, value in dials.items()}

    def _empty_cache(self, rows: int) -> dict[str, Any]:
        pasts = {name: value for name, value in self._inputs.items() if name.startswith("past_key_values.")}
        return {
            name: _value(np.zeros((rows, value.shape[1], 0, value.shape[3]), _TYPES[value.type]))
            for name, value in pasts.items()
        }

    def _call(self, ids_BS: Array, mask_BA: Array, fed: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
        """Logits (B, V) of the last tokens, and the KV cache after them."""
        positions_BS = (mask_BA.cumsum(1) - 1).clip(min=0)[:, -ids_BS.shape[1] :]
        tokens = {"input_ids": ids_BS, "attention_mask": mask_BA, "position_ids": positions_BS}
        binding = self._session.io_binding()
        for name in self._inputs.keys() & tokens.keys():
            binding.bind_ortvalue_input(name, _value(np.ascontiguousarray(tokens[name])))
        for name, value in fed.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's errors have no class of their own in common
            raise ArtifactError(f"{self.path}: cannot be run ({first_line(error)})") from error
        values = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        logits_BSV: Array = values.pop("logits").numpy()
        cache = {name.replace("present.", "past_key_values."): value for name, value in values.items()}
        return logits_BSV[:, -1], cache

    def _state(self, cache: Mapping[str, Any]) -> tuple[Any, Any] | None:
        if not self.gated:
            return None
        last = max(int(name.split(".")[1]) for name in cache)
        return cache[f"past_key_values.{last}.key"], cache[f"past_key_values.{last}.value"]


def end_ids(folder: Path) -> set[int]:
    """The ids that end a text, by the settings of an exported folder.

    Raises:
        ArtifactError: they are no whole numbers.
    """
    path = folder / "generation_config.json"
    settings = atomic.read_json(folder / "config.json") | (atomic.read_json(path) if path.is_file() else {})
    stored = settings.get("eos_token_id")
    ends = stored if isinstance(stored, list) else [] if stored is None else [stored]
    if not all(type(end) is int for end in ends):
        raise ArtifactError(f"{folder}: eos_token_id is {reprlib.repr(stored)}; expected whole numbers: export again")
    return set(ends)


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Token ids (B, S), and the attention mask, which is 1 on real tokens."""
    width = max(map(len, rows))
    ids_BS = np.array([[0] * (width - len(row)) + [*row] for row in rows], np.int64)
    mask_BS = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows], np.int64)
    return ids_BS, mask_BS


def _value(array: Array) -> Any:  # noqa: ANN401 - onnxruntime has no types
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _opened(path: Path, provider: str) -> Any:  # noqa: ANN401 - onnxruntime has no types
    require_one("running an ONNX export")
    import onnxruntime

    library = f"onnxruntime {onnxruntime.__version__}"
    no_provider = MissingExtraError(
        f"provider {provider}: {library} cannot use {PROVIDERS[provider]} here; expected onnxruntime-gpu, CUDA and "
        f"cuDNN: {install_command('onnx-gpu')}"
    )
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise no_provider
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # else it warns of every initialiser that may be overridden
    settings = {"use_tf32": "0"} if provider == "cuda" else {}  # it would round to ten bits
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(PROVIDERS[provider], settings)])
    except Exception as error:  # ONNX Runtime's errors have no class of their own in common
        raise ArtifactError(
            f"{path}: {library} cannot open this graph ({first_line(error)}); expected an intact export, and an "
            "onnxruntime that knows its opset: pip install --upgrade onnxruntime"
        ) from error
    if session.get_providers()[0] != PROVIDERS[provider]:  # it falls back to the CPU where a library is missing
        raise no_provider
    return session
