"""An ONNX graph opened in ONNX Runtime, as the comparison asks for it. Knows the names of inputs, and no more."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from adaras_export.errors import ArtifactError, ExportError, first_line
from adaras_export.exporters.onnx.graph import STRENGTH, THRESHOLD
from adaras_export.exporters.onnx.runner import ends_of
from adaras_export.exporters.parity import Check, Mode, Play, Tolerance, play_model
from adaras_export.files import atomic
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.generation import CACHE, Sampling, left_pad, pad_id, stop_ids


class _GraphCache(Cache):
    """What a call of the graph hands to the next one, as a KV cache, and p(correct) on it."""

    steering_state: Any = None

    def __init__(self, tensors: dict[str, Array]) -> None:
        super().__init__(layers=[])
        self.tensors = tensors


class SteeredGraph:
    """An opened graph. Modes are set with the dials that users have: the two overridable initialisers.

    Raises:
        ArtifactError: ONNX Runtime does not open it, or later, does not run it.
    """

    switchable = True

    def __init__(self, path: Path, tolerance: Tolerance) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # else it warns of every initialiser that may be overridden
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no class of their own in common
            raise ArtifactError(f"{path}: cannot be opened ({first_line(error)})") from error
        self.path = path
        self.tolerance = tolerance
        self.outputs = [one.name for one in self.session.get_outputs()]
        self.inputs = {one.name: one for one in self.session.get_inputs()}
        self.pasts = {name: one for name, one in self.inputs.items() if name.startswith("past_key_values.")}
        self.gated = THRESHOLD in {one.name for one in self.session.get_overridable_initializers()}
        self.dials: dict[str, Array] = {}

    def findings(self) -> Sequence[Check]:
        """As `Artifact` says."""
        return []

    def play(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: Tensor | None) -> Play:
        """As `Player` says."""
        if mode == "off":
            self.dials = {STRENGTH: np.asarray(0, np.float32)}
        elif mode != "rule" and self.gated:
            self.dials = {THRESHOLD: np.asarray(2 if mode == "always" else mode, np.float32)}  # p(correct) is below 2
        try:
            return self._play(rows, follow_BS)
        finally:
            self.dials = {}

    def _play(self, rows: Sequence[Sequence[int]], follow_BS: Tensor | None) -> Play:
        if "position_ids" in self.inputs:
            return play_model(self, rows, follow_BS)
        follow = [None] * len(rows) if follow_BS is None else [row[None] for row in follow_BS]
        alone = [play_model(self, [row], one) for row, one in zip(rows, follow, strict=True)]  # it cannot pad left
        logits, tokens, probability = zip(*(vars(one).values() for one in alone), strict=True)
        judged = torch.cat(probability) if self.gated else None
        return Play(torch.cat(logits), torch.cat(tokens), judged)

    def __call__(self, *, use_cache: bool, **tokens: Any) -> Any:  # noqa: ANN401, ARG002
        """One call, as of a model of Transformers, which names the cache as the installed version does."""
        batch, cache = len(tokens["input_ids"]), tokens.pop(CACHE)
        past = self._empty(batch) if cache is None else cache.tensors
        wanted = {name: value.numpy() for name, value in tokens.items() if name in self.inputs}
        feeds = wanted | past | self.dials
        try:
            outputs = self.session.run(None, feeds)
        except Exception as error:  # as above
            raise ArtifactError(f"{self.path}: {first_line(error)}") from error
        found = dict(zip(self.outputs, outputs, strict=True))
        logits = torch.from_numpy(found.pop("logits"))
        tensors = {name.replace("present.", "past_key_values."): value for name, value in found.items()}
        cache = _GraphCache(tensors)
        if self.gated:
            value = tensors[max((name for name in tensors if name.endswith(".value")), key=_layer_of)]
            cache.steering_state = SimpleNamespace(probability=torch.from_numpy(value[:, 0, 0, 0]))
        return ModelOutput({"logits": logits, CACHE: cache})  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        keys: Sequence[str],  # noqa: ARG002 - the protocol
    ) -> list[list[int]]:
        """As `parity.Answering` says; greedy only."""
        if sampling.temperature != 0:
            raise ExportError(f"{self.path}: temperature {sampling.temperature}; expected 0, graphs answer greedily")
        folder = self.path.parent.parent
        ends = ends_of(folder, atomic.read_json(folder / "config.json"))
        ends |= {*stop_ids(tokenizer, sampling.stop)} if sampling.stop else set()
        batches = [rows] if "position_ids" in self.inputs else [[row] for row in rows]  # it cannot pad left
        greedy = [self._greedy(batch, pad_id(tokenizer), ends, sampling.max_new_tokens) for batch in batches]
        return [ids for batch in greedy for ids in batch]

    def _greedy(self, rows: Sequence[Sequence[int]], pad: int, ends: set[int], most: int) -> list[list[int]]:
        ids, mask = left_pad(rows, pad, "cpu")
        cache, found, ended = None, [list[int]() for _ in rows], [False] * len(rows)
        while not all(ended) and len(found[0]) < most:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            outputs = self(**tokens, **{CACHE: cache}, use_cache=True)
            cache, ids = outputs[CACHE], outputs.logits[:, -1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            for row, id_ in enumerate(ids[:, 0].tolist()):
                ended[row] |= id_ in ends
                found[row].append(id_)
        return [row[: next((at for at, id_ in enumerate(row) if id_ in ends), None)] for row in found]

    def p_correct(self, rows: Sequence[Sequence[int]]) -> Array:
        """p(correct) of each prompt of token ids, (N,) float32."""
        found = np.zeros(len(rows), np.float32)
        for position, row in enumerate(rows):
            ids = torch.tensor([row])
            tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            tokens["position_ids"] = torch.arange(len(row)).unsqueeze(0)
            cache = self(**tokens, **{CACHE: None}, use_cache=True)[CACHE]
            found[position] = cache.steering_state.probability.item()
        return found

    def _empty(self, batch: int) -> dict[str, Array]:
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            name: np.zeros((batch, one.shape[1], 0, one.shape[3]), types[one.type]) for name, one in self.pasts.items()
        }


def _layer_of(name: str) -> int:
    return int(name.split(".")[1])
