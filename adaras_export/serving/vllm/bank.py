"""Many rules in one engine of vLLM's: the base's weights, linked, beside the vectors and gates of all rules.

A request names its rule and sets its strength, so the arms of an evaluation or the settings of a grid are one
continuous batch, and share the cached pages of their prompts.

R rules, D model width.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from adaras_export.core.bank import BankRule, Request
from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.folding import vectors
from adaras_export.core.gate import Gate
from adaras_export.errors import ArtifactError, require
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.generation import Sampling, row_seed
from adaras_export.modeling.vllm_engine import open_engine
from adaras_export.serving.vllm.dials import EVERYWHERE, RULE, STRENGTH


def write_bank(folder: Path, base: Checkpoint, bank: Sequence[BankRule]) -> None:
    """Write a model folder that the plugin serves: links to the base's weights, and the tensors of all rules.

    Rules whose gates differ in nothing but their thresholds share one.

    Raises:
        ArtifactError: the base is quantised, or its config describes another model than its weights are.
        RuleError: a rule belongs to another base.
    """
    config = base.config
    if "quantization_config" in config:
        raise ArtifactError(f"{base}: is quantised; expected plain weights, which the vectors are folded from")
    base.require_buildable()
    found = BaseModel.of_checkpoint(base, base.folder)
    for one in bank:
        one.rule.base.require_same(found)
    for path in {*base.files.values()}:
        (folder / f"base-{path.name}").symlink_to(path.resolve())
    gates = _Gates(bank)
    settings = {
        "rules": [_rule_settings(one, gates) for one in bank],
        "gates": [gate.sizes() for gate in gates.distinct],
        "layers": sorted({layer for one in bank for layer in one.rule.layers()}),
    }
    save_file(_vectors(base, bank) | gates.tensors(base), folder / "bank.safetensors", {"format": "pt"})
    family = base.family
    named = {
        "model_type": f"adaras_{family.model_type}",
        "architectures": [f"AdaRAS{family.classes['AutoModelForCausalLM']}"],
    }
    config.pop("auto_map", None)
    (folder / "config.json").write_text(json.dumps({**config, **named, "adaras": settings}))


def _rule_settings(one: BankRule, gates: "_Gates") -> dict[str, Any]:
    gate = one.rule.gate
    return {
        "name": one.name,
        "strength": one.rule.strength,
        "threshold": 1.0 if gate is None else gate.threshold,
        "start": EVERYWHERE if one.everywhere else one.rule.start,
        "gate": None if gate is None else gates.place(gate),
    }


def _vectors(base: Checkpoint, bank: Sequence[BankRule]) -> dict[str, Array]:
    """The (R, D) vectors of each layer that a rule steers, by checkpoint key."""
    folded = [vectors(one.rule, base) for one in bank]
    none_D = np.zeros(bank[0].rule.base.hidden_size, np.float32)
    return {
        f"{base.layers_key}.{layer}.mlp.steering_vector": np.stack([found.get(layer, none_D) for found in folded])
        for layer in sorted({layer for found in folded for layer in found})
    }


class _Gates:
    """The gates of a bank, each once."""

    def __init__(self, bank: Sequence[BankRule]) -> None:
        found = [one.rule.gate for one in bank if one.rule.gate is not None]
        self._by_content = {_content(gate): gate for gate in found}

    @property
    def distinct(self) -> list[Gate]:
        return [*self._by_content.values()]

    def place(self, gate: Gate) -> int:
        return [*self._by_content].index(_content(gate))

    def tensors(self, base: Checkpoint) -> dict[str, Array]:
        """Weights of each gate, and the neurons that each layer is read at: gate by gate."""
        index: dict[int, list[Array]] = {}
        weights: dict[str, Array] = {}
        for at, gate in enumerate(self.distinct):
            weights |= {f"{base.decoder_key}steering_gates.{at}.{name}": one for name, one in gate.weights().items()}
            for layer in np.unique(gate.layer).tolist():
                index.setdefault(layer, []).append(gate.index[gate.layer == layer])
        read = {f"{base.layers_key}.{layer}.mlp.steering_index": np.concatenate(own) for layer, own in index.items()}
        return weights | read


def _content(gate: Gate) -> bytes:
    """The same for gates that give the same probabilities."""
    return replace(gate, threshold=0.0, base=None, questions=()).to_bytes()


class BankEngine:
    """One engine, which answers many requests at once, each under its own rule and strength.

    Raises:
        MissingExtraError: vLLM is not installed.
        ArtifactError: vLLM cannot load the folder.
    """

    def __init__(self, folder: Path, subject: str, *, dtype: str, context: int, sequences: int, **more: Any) -> None:
        self._vllm: Any = require("vllm", "vllm", "the backend vllm")
        settings = {
            "dtype": dtype,
            "max_model_len": context,
            "max_num_seqs": sequences,
            "skip_tokenizer_init": True,  # requests and answers are token ids
            "generation_config": "vllm",
        }
        self._llm = open_engine(self._vllm, folder, subject, settings | more)

    def complete(
        self, requests: Sequence[Request], sampling: Sampling, ends: Sequence[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """The 0-based number of each request and its new ids before the first one of ``ends``, as they are finished."""
        engine = self._llm.llm_engine
        for number, request in enumerate(requests):
            prompt = self._vllm.TokensPrompt(prompt_token_ids=list(request.prompt))
            engine.add_request(str(number), prompt, self._params(request, sampling, ends))
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    ids = list(output.outputs[0].token_ids)
                    yield int(output.request_id), ids[:-1] if ids and ids[-1] in ends else ids

    def close(self) -> None:
        """Give the engine's memory back."""
        self._llm.llm_engine.engine_core.shutdown()

    def _params(self, request: Request, sampling: Sampling, ends: Sequence[int]) -> Any:
        from vllm.sampling_params import RequestOutputKind

        return self._vllm.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=row_seed(sampling.seed, request.key),
            stop_token_ids=list(ends),
            ignore_eos=True,  # those that end an answer are all in ``ends``
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={RULE: request.rule, STRENGTH: request.strength},
        )


@contextmanager
def opened(
    base: Checkpoint, bank: Sequence[BankRule], context: int, *, dtype: str, sequences: int, **more: Any
) -> Iterator[BankEngine]:
    """An engine with a bank, from a folder that is removed afterwards; the base is not exported.

    Args:
        base: the model.
        bank: the rules.
        context: tokens of the longest prompt with its answer.
        dtype: what vLLM computes with.
        sequences: answers in one batch, at most.
        more: other arguments of vLLM's engine.

    Raises:
        MissingExtraError: vLLM is not installed.
        ArtifactError: the base is quantised, or vLLM cannot load it.
        RuleError: a rule belongs to another base.
    """
    with tempfile.TemporaryDirectory(prefix="adaras-bank-") as folder:
        write_bank(Path(folder), base, bank)
        engine = BankEngine(Path(folder), str(base), dtype=dtype, context=context, sequences=sequences, **more)
        try:
            yield engine
        finally:
            engine.close()
