"""Write a rule without its gate as a request of EasySteer, a fork of vLLM that steers each request by itself.

EasySteer adds ``scale * vector`` to what leaves decoder layer l, counted from 0, at the tokens that ``apply`` selects.
Where only a residual sum stands between the down projection and there, that is the rule, start included. Nothing of
EasySteer is run here: its format is read from its documentation and source (docs/decisions/046).
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import Start, SteeringRule
from adaras_export.errors import ExportError
from adaras_export.exporters.base import require_effect
from adaras_export.exporters.checkpoint import plain_config, require_residual_sum, residual_vectors
from adaras_export.files import atomic, hub
from adaras_export.files.safetensors_record import Array

# EasySteer's ApplySpec: a phase without a selector is left alone; -1 is the last token of the whole prompt.
_APPLY: dict[Start, dict[str, Any]] = {
    "last_prompt_token": {"prompt_positions": [-1], "generation": "all"},
    "first_generated_token": {"generation": "all"},
}


def write(rule: SteeringRule, base: str | Path, out: Path, *, without_gate: bool = False) -> None:
    """Write the JSON file of a request that steers by ``rule``: a SteeringSpec of EasySteer.

    Args:
        rule: the steering rule.
        base: folder or Hub id of the model that the rule belongs to.
        out: the file.
        without_gate: accept that every prompt is steered, whatever the rule's gate would say.

    Raises:
        ExportError: the rule has a gate or no effect, or the base has quantised weights or a norm behind its MLP.
        RuleError: the rule belongs to another model.
    """
    if rule.gate is not None and not without_gate:
        raise ExportError("easysteer: cannot express gate; drop it with --accept-loss gate, or choose `export --to hf`")
    require_effect(rule, "easysteer")
    require_residual_sum(rule, "easysteer")
    checkpoint = Checkpoint(hub.fetch(base, rule.base.revision))
    rule.base.require_same(BaseModel.of_checkpoint(checkpoint, base))
    plain_config(checkpoint)
    atomic.replace_file(out, json.dumps(_spec(rule, checkpoint), indent=2).encode() + b"\n")


def _spec(rule: SteeringRule, base: Checkpoint) -> dict[str, Any]:
    vector = {
        "name": f"adaras-{rule.fingerprint[:12]}",
        "data": payload(residual_vectors(rule, base)),
        "algorithm": "direct",
        "scale": rule.strength,
        "normalize": False,
        "apply": _APPLY[rule.start],
    }
    return {"vectors": [vector]}


def payload(vectors: Mapping[int, Array]) -> dict[str, Any]:
    """EasySteer's DirectionVector as it travels in JSON, of float32 vectors (D,) by 0-based layer.

    EasySteer refuses a payload whose hash is another than that of kind, version, names, shapes and bytes.
    """
    tensors, digest = {}, hashlib.sha256(b"direction:1")
    for name, vector in sorted((f"layer.{layer}", vector) for layer, vector in vectors.items()):
        content = vector.astype("<f4").tobytes()
        digest.update(name.encode() + str(vector.shape).encode() + content)
        tensors[name] = {"shape": list(vector.shape), "data": base64.b64encode(content).decode()}
    return {"version": 1, "kind": "direction", "tensors": tensors, "extra": {}, "sha256": digest.hexdigest()}
