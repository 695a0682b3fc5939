"""A GGUF model that computes what its source does, and a LoRA that steers it, behind `--into` with `--switchable`.

Each MLP gets a constant neuron (see `stock.constant_neuron`), from which the LoRA of a steered layer makes the vector.
llama.cpp applies a LoRA per request. The model depends on its source alone, so all rules of a base can share it.

llama.cpp loads the biases of a constant neuron in its architectures `llama` and `granite` only. A qwen2 model is
written as `llama`, which computes the same but has rotary pairs side by side, so the rows of queries and keys move.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from gguf import GGUFValueType

from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ArtifactError, ExportError
from adaras_export.exporters.checkpoint import differing_keys
from adaras_export.exporters.checks import Check
from adaras_export.exporters.gguf import content, files, model, reader
from adaras_export.exporters.gguf.content import Content, Part
from adaras_export.exporters.gguf.reader import Entry
from adaras_export.exporters.manifest import Disclosed, What
from adaras_export.exporters.stock import constant_neuron, stream
from adaras_export.files.safetensors_record import Array

FILE, LORA_FILE = "model-switchable.gguf", "steering-lora.gguf"

# A row of the down projection must end with a whole block of its type. K-quants have blocks of 256 weights, so the 32
# neurons of `stock` would force them into another type. Zero bytes are zeros in every type: nothing is quantised anew.
NEURONS = 256

# llama.cpp's architecture of the source -> that of the model.
WRITTEN_AS = {"llama": "llama", "granite": "granite", "qwen2": "llama"}

_WIDENED = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.weight")
_MOVED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")
_BIASES = {".ffn_gate.bias": constant_neuron.GATE, ".ffn_up.bias": constant_neuron.UP}
_HEADS = {"q": "attention.head_count", "k": "attention.head_count_kv"}
_SOURCE = "adaras.source_architecture"


def require_form(architecture: str) -> None:
    """Refuse a base for which llama.cpp, which calls it ``architecture``, has no constant neuron."""
    if architecture not in WRITTEN_AS:
        raise ExportError(
            f"gguf: llama.cpp loads no biases of gate and up in its {architecture}, which a constant neuron needs; "
            f"expected of: {', '.join(WRITTEN_AS)}; leave out --switchable"
        )


def write(rule: SteeringRule, base: Checkpoint, source: Path, out: Path, architecture: str) -> None:
    """Write the model and the LoRA; ``architecture`` is what llama.cpp calls the rule's base.

    Raises:
        ExportError: the source has another architecture or other sizes, or biases in its MLPs.
    """
    model.require_carrier(source, rule, architecture, WRITTEN_AS, (*_BIASES, model.BIAS))
    _Plan.of(source, rule.base, architecture, 0).switchable(Content.of(source)).write(out / FILE)
    files.write(out / LORA_FILE, _lora_entries(rule, architecture), _lora(rule, base))


def checks(folder: Path, rule: SteeringRule, base: Checkpoint, digest: str, architecture: str) -> list[Check]:
    """Compare the model with its source, by `files.content_digest`, and the LoRA with the rule."""
    path, lora, expected = folder / FILE, reader.opened(folder / LORA_FILE), _lora(rule, base)
    plan, found = _Plan.of(path, rule.base, architecture, NEURONS), Content.of(path)
    source = plan.source(found)
    other = _differing(plan.switchable(source), found) + files.strange(reader.opened(path), {})
    if source.digest() != digest:
        other.append("the model")
    other += differing_keys(lora.entries, _lora_entries(rule, architecture)) + files.strange(lora, expected)
    other += sorted({tensor.name for tensor in lora.tensors} - expected.keys())
    return [
        Check.empty("metadata or tensors of the GGUF files that differ", other),
        Check.empty("LoRA tensors that differ", files.differing(files.floats(lora), expected)),
        Check("tensors compared, not played: the base's weights are", len(source.parts), None),
    ]


def stored_vectors(folder: Path) -> dict[int, Array]:
    """What the LoRA adds at scale 1, by 0-based layer: B times what A makes of the constant activations."""
    biases, lora = files.floats(reader.opened(folder / FILE)), files.floats(reader.opened(folder / LORA_FILE))
    vectors = {}
    for name in (name for name in lora if name.endswith(".lora_a")):
        block = name.removesuffix(".ffn_down.weight.lora_a")
        gate_M, up_M = (biases[f"{block}{ending}"] for ending in _BIASES)
        h_M = gate_M / (1 + np.exp(-gate_M)) * up_M  # zeros but for the constant neuron: all others have no bias
        vectors[int(block.removeprefix("blk."))] = lora[name.replace("lora_a", "lora_b")] @ (lora[name] @ h_M)
    return vectors


def disclosed(folder: Path) -> tuple[Disclosed, ...]:
    """The tensors of an artifact that its source lacks or has with other bytes."""
    architecture = reader.opened(folder / LORA_FILE).entries.get(_SOURCE, (None, ""))[1]
    moved = architecture != WRITTEN_AS.get(architecture)

    def what(name: str) -> What | None:
        if name.endswith(tuple(_BIASES)):
            return "added"
        return "changed" if _WIDENED.fullmatch(name) or (moved and _MOVED.fullmatch(name)) else None

    return files.disclosed(folder, LORA_FILE) + files.disclosed(folder, FILE, what)


def _lora_entries(rule: SteeringRule, architecture: str) -> dict[str, Entry]:
    return {
        "general.architecture": (GGUFValueType.STRING, WRITTEN_AS[architecture]),
        "general.type": (GGUFValueType.STRING, "adapter"),
        "adapter.type": (GGUFValueType.STRING, "lora"),
        "adapter.lora.alpha": (GGUFValueType.FLOAT32, 1.0),  # the rank; llama.cpp multiplies by their ratio
        "adaras.rule": (GGUFValueType.STRING, rule.fingerprint),
        _SOURCE: (GGUFValueType.STRING, architecture),
    }


def _lora(rule: SteeringRule, base: Checkpoint) -> dict[str, Array]:
    """A, (1, M), which selects the constant neuron, and B, (D, 1) = strength * vector, of each steered layer."""
    tensors: dict[str, Array] = {}
    for layer, vector_D in model.folded(rule, base).items():
        name = f"blk.{layer}.ffn_down.weight.lora"
        tensors |= {f"{name}_a": _constant(rule.base, 1.0)[None], f"{name}_b": vector_D[:, None]}
    return tensors


def _constant(base: BaseModel, value: float) -> Array:
    """A value for the constant neuron, and zeros for all others, (M,) float32."""
    values = np.zeros(base.widest + NEURONS, np.float32)
    values[base.widest] = value
    return values


@dataclass(frozen=True)
class _Plan:
    """How a model is made of its source, and a source of its model.

    Attributes:
        base: the base's sizes.
        architecture: the source's.
        heads: the number of attention heads, by q and k; empty where their rows do not move.
    """

    base: BaseModel
    architecture: str
    heads: Mapping[str, int]

    @classmethod
    def of(cls, path: Path, base: BaseModel, architecture: str, more: int) -> "_Plan":
        """The plan for a source, or with ``more`` neurons for a model.

        Raises:
            ArtifactError: the file has other sizes.
        """
        file, size = reader.opened(path), base.widest + more
        sizes = {"gate": (base.hidden_size, size), "up": (base.hidden_size, size), "down": (size, base.hidden_size)}
        expected = {f"blk.{layer}.ffn_{its}.weight": sizes[its] for its in sizes for layer in range(base.layers)}
        found = {tensor.name: tensor.shape for tensor in file.tensors if _WIDENED.fullmatch(tensor.name)}
        prefix = WRITTEN_AS[architecture] if more else architecture
        names = _HEADS if architecture != WRITTEN_AS[architecture] else {}
        heads = {its: file.entries.get(f"{prefix}.{name}") for its, name in names.items()}
        counts = [*heads.values(), file.entries.get(f"{prefix}.feed_forward_length")]
        if found != expected or not all(count and count[0] == GGUFValueType.UINT32 for count in counts):
            raise ArtifactError(
                f"{path}: its MLPs, or its counts of heads or neurons, are not as in {base.id}; expected "
                f"{base.layers} gated MLPs of {size} neurons, and one count for all layers"
            )
        return cls(base, architecture, {its: count[1] for its, count in heads.items() if count})

    def switchable(self, source: Content) -> Content:
        """The model of a source."""
        names = (self.architecture, WRITTEN_AS[self.architecture])
        biases = {
            f"blk.{layer}{ending}": _constant(self.base, value)
            for layer in range(self.base.layers)
            for ending, value in _BIASES.items()
        }
        entries = _renamed(source.entries, *names, self.base.widest + NEURONS)
        parts = (_moved(_wider(part), self._heads_of(part), back=False) for part in source.parts)
        return replace(source, entries=entries, parts=(*parts, *(content.floats(*one) for one in biases.items())))

    def source(self, found: Content) -> Content:
        """The source of a model: without the neurons that `switchable` adds, whose values may be damaged."""
        entries = _renamed(found.entries, WRITTEN_AS[self.architecture], self.architecture, self.base.widest)
        kept = (part for part in found.parts if not part.name.endswith(tuple(_BIASES)))
        parts = (_moved(_narrower(part), self._heads_of(part), back=True) for part in kept)
        return replace(found, entries=entries, parts=tuple(parts))

    def _heads_of(self, part: Part) -> int | None:
        """The heads of a tensor whose rows move."""
        match = _MOVED.fullmatch(part.name)
        return self.heads.get(match[1]) if match else None


def _differing(one: Content, other: Content) -> list[str]:
    """Names of tensors that differ; of the entries, which are few, only that they do."""
    parts, others = ({part.name: part for part in its.parts} for its in (one, other))
    wrong = [name for name, part in parts.items() if name not in others or not _same(part, others[name])]
    return wrong + sorted(others.keys() - parts.keys()) + ["metadata"] * (one.entries != other.entries)


def _same(one: Part, other: Part) -> bool:
    if one is other:  # neither direction changes it
        return True
    return (one.kind, one.shape) == (other.kind, other.shape) and one.digest() == other.digest()


def _renamed(entries: Mapping[str, bytes], old: str, new: str, mlp_size: int) -> dict[str, bytes]:
    """The entries of a model under another architecture's name, and with MLPs of another size."""
    renamed = {}
    for key, stored in entries.items():
        name = new + key.removeprefix(old) if key.startswith(f"{old}.") else key
        renamed[name] = stored if name == key else content.text(name) + stored[len(content.text(key)) :]
    key = "general.architecture"
    renamed[key] = content.entry(key, GGUFValueType.STRING, content.text(new))
    key = f"{new}.feed_forward_length"
    renamed[key] = content.entry(key, GGUFValueType.UINT32, struct.pack("<I", mlp_size))
    return renamed


def _wider(part: Part) -> Part:
    """A tensor of an MLP with `NEURONS` zero rows, or zeros at the end of each row, more."""
    match = _WIDENED.fullmatch(part.name)
    if match is None:
        return part
    first, second = part.shape
    if match[1] == "down":
        gap = bytes(part.row_size(NEURONS))
        rows = partial(_rows, part)
        return replace(part, shape=(first + NEURONS, second), pieces=lambda: (row + gap for row in rows()))
    gap = bytes(NEURONS * part.row_size(first))
    return replace(part, shape=(first, second + NEURONS), pieces=lambda: chain(part.pieces(), [gap]))


def _narrower(part: Part) -> Part:
    """A tensor of an MLP without what `_wider` adds."""
    match = _WIDENED.fullmatch(part.name)
    if match is None:
        return part
    first, second = part.shape
    if match[1] == "down":
        size = part.row_size(first - NEURONS)
        return replace(part, shape=(first - NEURONS, second), pieces=lambda: (row[:size] for row in _rows(part)))
    narrow = replace(part, shape=(first, second - NEURONS))
    return replace(narrow, pieces=lambda: _beginning(part.pieces(), narrow.size))


def _rows(part: Part) -> Iterator[bytes]:
    return stream.runs(part.pieces(), part.row_size(part.shape[0]))


def _beginning(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    for piece in pieces:
        yield piece[:size]
        size = max(0, size - len(piece))


def _moved(part: Part, heads: int | None, *, back: bool) -> Part:
    """A tensor whose rows, of each head, go from half and half to side by side, or back."""
    if heads is None:
        return part
    rows = part.shape[-1]
    if not heads or rows % (2 * heads) or part.size % rows:
        raise ArtifactError(f"{part.name}: has {rows} rows; expected as many, even, for each of {heads} heads")
    axes = (-1, 2, part.size // rows) if back else (2, -1, part.size // rows)

    def pieces() -> Iterator[bytes]:
        for head in stream.runs(part.pieces(), part.size // heads):
            yield np.frombuffer(head, np.uint8).reshape(axes).swapaxes(0, 1).tobytes()

    return replace(part, pieces=pieces)
