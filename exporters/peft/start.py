"""Target `peft` with `start_at`: a stock adapter that steers from the last prompt token on, but has no gate.

PEFT calls it an activated LoRA (aLoRA): each row is steered from the last place where its prompt has the invocation
tokens, the first of them included. So the invocation is the one token that every prompt ends with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ArtifactError, ExportError, first_line
from adaras_export.exporters.adapters import CONFIG_FILE
from adaras_export.exporters.base import TargetSpec, stock_reference
from adaras_export.exporters.parity import Artifact, Mode, Play, Reference, ReferencePlayer, generate_logits
from adaras_export.exporters.peft.lora import Adapted, PeftExporter, open_adapted
from adaras_export.files import atomic
from adaras_export.modeling.generation import Sampling, encode_prompt

_ENTRY = "alora_invocation_tokens"
_QUESTIONS = ("What is 12 times 7?", "x", "3 ", "A line.\n", "end:")


@dataclass(frozen=True)
class StartExporter(PeftExporter):
    """The exporter of target `peft` with option `start_at`: the text that every prompt ends with."""

    start_at: str = ""

    @property
    def spec(self) -> TargetSpec:
        """The spec of target `peft`, with the start."""
        return replace(
            super().spec,
            card="exporters/peft/card_start.md",
            drops=frozenset({"gate"}),
            recorded=lambda: {"start_at": self.start_at},
        )

    def config(self, rule: SteeringRule, base: Checkpoint) -> dict[str, Any]:
        """The adapter_config.json, with the token at which PEFT starts."""
        if rule.start != "last_prompt_token":
            raise ExportError(
                f"peft: start_at cannot express start {rule.start}, since PEFT also steers the token that it looks "
                "for; expected last_prompt_token: choose --adaptive, or target hf"
            )
        _require_cache(base)
        return {**super().config(rule, base), _ENTRY: [last_token(self.start_at, base)]}

    def reference(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Reference:
        """The base, steered in memory without the gate, on prompts that end with the token."""
        found = stock_reference(rule.ungated(), base)
        assert isinstance(found.player, ReferencePlayer)
        whole = None if rule.gate is None else ReferencePlayer(found.player.model, rule)
        return replace(found, whole=whole, last_token=_stored(folder))

    def load(self, folder: Path) -> Artifact:
        """Open the base with the adapter."""
        return _Started(open_adapted(folder, self.context), folder)


def last_token(text: str, base: Checkpoint) -> int:
    """The token that every prompt ends with which ends with ``text``.

    Raises:
        ExportError: the tokenizer does not open or finds no token in the text, the chat template ends prompts with
            another text, or the last token depends on what precedes the text.
    """
    tokenizer = _tokenizer(base)
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not alone:
        raise ExportError(f"peft: start_at {text!r}: gives no token with the tokenizer of {base}; expected one or more")
    prompts = _chats(tokenizer, text, base) if tokenizer.chat_template else [f"{start}{text}" for start in _QUESTIONS]
    found = {alone[-1], *(encode_prompt(tokenizer, prompt)[-1] for prompt in prompts)}
    if len(found) > 1:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(found))))
        raise ExportError(
            f"peft: start_at {text!r}: prompts of {base} that end with it have the last tokens {names}; expected one "
            "and the same: give a longer text, or one that ends with a special token"
        )
    return int(alone[-1])


def _tokenizer(base: Checkpoint) -> Any:  # noqa: ANN401 - the tokenizers of Transformers are not typed
    try:
        return AutoTokenizer.from_pretrained(base.folder)
    except (OSError, ValueError, TypeError, ImportError) as error:  # TypeError: of Transformers 4
        raise ExportError(
            f"{base}: has no tokenizer for start_at ({first_line(error)}); expected one beside it"
        ) from error


def _chats(tokenizer: Any, text: str, base: Checkpoint) -> list[list[dict[str, str]]]:  # noqa: ANN401 - as above
    """Conversations whose prompts, as the chat template writes them, end with ``text``."""
    chats = [[{"role": "user", "content": question}] for question in _QUESTIONS]
    chats.append([*chats[0], {"role": "assistant", "content": "84"}, *chats[1]])
    try:
        written = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    except TemplateError as error:
        raise ExportError(f"{base}: its chat template refuses a question ({first_line(error)}); choose hf") from error
    if not all(prompt.endswith(text) for prompt in written):
        end = _common_end(written)
        raise ExportError(f"peft: start_at {text!r}: prompts of {base} end with {end!r}; expected the end of that text")
    return chats


def _common_end(texts: Sequence[str]) -> str:
    columns = zip(*(text[::-1] for text in texts), strict=False)
    return "".join(letters[0] for letters in takewhile(lambda letters: len({*letters}) == 1, columns))[::-1]


def _require_cache(base: Checkpoint) -> None:
    """Refuse a base whose `generate()` has no KV cache unless it is asked for: only last tokens would be steered."""
    for name in ("config.json", "generation_config.json"):
        path = base.folder / name
        if path.exists() and atomic.read_json(path).get("use_cache") is False:
            raise ExportError(f"{path}: says use_cache false, under which PEFT steers too little; expected true, or hf")


def _stored(folder: Path) -> int:
    return int(atomic.read_json(folder / CONFIG_FILE)[_ENTRY][0])


class _Started(Adapted):
    """The base with the adapter, run by `generate()` only.

    PEFT looks for the token in the ids of each call, so a loop over `forward()` would not steer generated tokens.
    """

    def __init__(self, model: Any, folder: Path) -> None:  # noqa: ANN401 - PEFT's class
        super().__init__(model, folder)
        self.folder = folder

    def play(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: torch.Tensor | None) -> Play:
        """Run prompts in ``mode``; see `parity.Player`."""
        if mode == "off":
            return super().play(rows, mode, follow_BS)
        logits_BSV = generate_logits(self.model, rows, follow_BS)
        return Play(logits_BSV, logits_BSV.argmax(-1), None)

    def answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        keys: Sequence[str],
    ) -> list[list[int]]:
        """New ids of every row; see `parity.Answering`.

        Raises:
            ArtifactError: a prompt does not end with the token; it would be steered from elsewhere or not at all.
        """
        token = _stored(self.folder)
        if other := [key for key, row in zip(keys, rows, strict=True) if row[-1] != token]:
            raise ArtifactError(
                f"{self.folder}: question {other[0]}: its prompt does not end with token {token}; expected prompts "
                "that end with the text that the export was given as start_at"
            )
        return super().answer(tokenizer, rows, sampling, keys)
