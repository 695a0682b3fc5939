"""An `hf` or `hf-thin` export in vLLM's offline engine, as a side of the comparison with the reference.

The engine is what `vllm serve` runs, with the settings that it chooses on this machine, but in float32.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ExportError, require
from adaras_export.exporters.base import Runner, stock_reference
from adaras_export.exporters.checks import Check
from adaras_export.exporters.parity import FLOAT32, STEPS, Artifact, Mode, Play, Reference
from adaras_export.modeling.vllm_engine import open_engine
from adaras_export.serving.vllm.dials import RESULT, START, STRENGTH, THRESHOLD

_SERVED = ("hf", "hf-thin")


def runner_of(target: str) -> Runner:
    """What runs exports to a target in vLLM.

    Raises:
        ExportError: vLLM does not serve the target with the plugin.
    """
    if target not in _SERVED:
        raise ExportError(f"target {target}: the runtime vllm does not run it; expected {' or '.join(_SERVED)}")
    return _VllmRunner()


class _VllmRunner:
    def reference(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Reference:  # noqa: ARG002
        """The base, steered in memory. Other attention of Transformers' leaves out Gemma 2's soft cap before 5.21."""
        return stock_reference(rule, base, attention="eager")

    def load(self, folder: Path) -> Artifact:
        """The export in vLLM's offline engine."""
        return VllmArtifact(folder)


class VllmArtifact:
    """An export that vLLM serves; see `exporters.parity.Artifact`."""

    # vLLM's kernels and its own attention round in other places than PyTorch's, with steering off too.
    tolerance = replace(FLOAT32, off=True, ties=True)
    switchable = True

    def __init__(self, folder: Path) -> None:
        """Open the export.

        Raises:
            MissingExtraError: vLLM is not in this environment.
            ArtifactError: vLLM does not open it.
        """
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # both are read at its import
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        self._vllm: Any = require("vllm", "vllm", "the runtime vllm")
        settings = {"dtype": "float32", "max_logprobs": -1, "logprobs_mode": "raw_logits"}
        self._engine = open_engine(self._vllm, folder, str(folder), settings)
        self._vocabulary = self._engine.model_config.get_vocab_size()

    def findings(self) -> Sequence[Check]:
        """None: vLLM raises where tensors are missing."""
        return []

    def play(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: Tensor | None) -> Play:
        """Answer all prompts in one batch. Where a greedy token is not the one to follow, the request is sent again.

        It then holds the tokens up to there behind its prompt, and says by a dial where the prompt ended.
        """
        logits: list[list[Tensor]] = [[] for _ in rows]
        tokens: list[list[int]] = [[] for _ in rows]
        probability = [float("nan")] * len(rows)
        dials, open_rows = _dials(mode), [*range(len(rows))]
        while open_rows:
            answers = [
                [*rows[at], *(follow_BS[at, : len(tokens[at])].tolist() if follow_BS is not None else ())]
                for at in open_rows
            ]
            outputs = self._complete(answers, [{**dials, START: len(rows[at])} for at in open_rows], tokens, open_rows)
            for at, output in zip(open_rows, outputs, strict=True):
                verdict = output.kv_transfer_params[RESULT]["p_correct"]
                probability[at] = probability[at] if verdict is None else verdict
                for token, table in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
                    logits[at].append(torch.tensor([table[one].logprob for one in range(self._vocabulary)]))
                    tokens[at].append(token)
                    if follow_BS is not None and token != int(follow_BS[at, len(tokens[at]) - 1]):
                        break
            open_rows = [at for at in open_rows if len(tokens[at]) < STEPS]
        return Play(torch.stack([torch.stack(row) for row in logits]), torch.tensor(tokens), torch.tensor(probability))

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        dials: Sequence[dict[str, Any]],
        tokens: Sequence[Sequence[int]],
        open_rows: Sequence[int],
    ) -> list[Any]:
        sampling = [
            self._vllm.SamplingParams(
                temperature=0, max_tokens=STEPS - len(tokens[at]), logprobs=-1, ignore_eos=True, extra_args=own
            )
            for at, own in zip(open_rows, dials, strict=True)
        ]
        inputs = [self._vllm.TokensPrompt(prompt_token_ids=[*prompt]) for prompt in prompts]
        return list(self._engine.generate(inputs, sampling, use_tqdm=False))


def _dials(mode: Mode) -> dict[str, float]:
    if mode == "rule":
        return {}
    if mode == "off":
        return {STRENGTH: 0.0}
    return {THRESHOLD: 2.0 if mode == "always" else float(mode)}  # every p(correct) is below 2
