"""Attacks on files of tensors: by reader, what is attacked, the bytes, and what the refusal says."""

import json
import struct

import numpy as np
from fuzz.mutations import packed
from fuzz.readers import READERS, tensors, values
from safetensors.numpy import save

from adaras_export.files import safetensors_record


def file_of(name, record=(), arrays=()):
    """A value of ours with other records or arrays; None takes one away."""
    value = values()[name]
    changed = {**value._arrays(), **dict(arrays)}
    return safetensors_record.to_bytes(
        value.kind, {key: one for key, one in changed.items() if one is not None}, {**value._record(), **dict(record)}
    )


def with_metadata(text):
    return save({"layer": np.zeros(1)}, metadata={"adaras": text})


def with_header(header, data=b""):
    """A safetensors file with just this header; "x" is a tensor of eight bytes."""
    return packed(header if isinstance(header, bytes) else json.dumps(header).encode(), data)


def tensor(shape, offsets, dtype="F32"):
    return {
        "x": {"dtype": dtype, "shape": shape, "data_offsets": offsets},
        "__metadata__": {"adaras": '{"kind":"rule"}'},
    }


def twice(name):
    """The tensors of a base with a second entry for one of them."""
    content = save(tensors())
    start = 8 + int.from_bytes(content[:8], "little")
    entry = json.dumps({name: json.loads(content[8:start])[name]}).encode()
    return packed(content[8:start].rstrip()[:-1] + b"," + entry[1:], content[start:])


def base_of(**changes):
    return {"base": {**values()["rule"].base.as_record(), **changes}}


def gguf(old=b"", new=b""):
    """The seed with other bytes in place of some."""
    content = READERS["gguf"].seeds()[0]
    assert old in content
    return content.replace(old, new, 1)


def _long_text(name):
    """An entry with a text of a mebibyte."""
    return struct.pack("<Q4sIQ", 4, name.encode(), 8, 1 << 20) + bytes(1 << 20)


def _record(name, place, kind=0):
    """The record of a vector of four numbers, float32 or of another type."""
    return name.encode() + struct.pack("<IQIQ", 1, 4, kind, place)


RULE = values()["rule"].to_bytes()
NAN, HUGE = np.array([1.0, np.nan, 2.0], np.float32), np.array([1, 2, 2**63 - 1])

RULE_ATTACKS = {
    "empty": (b"", "header too small; expected a rule file of adaras_export"),
    "seven bytes": (RULE[:7], "header too small"),
    "a header of 2**60 bytes": (
        b"\x00" * 7 + b"\x10" + RULE[8:],
        "says that its header has 1152921504606846976 bytes; at most",
    ),
    "a header of 2**64 - 1 bytes": (b"\xff" * 8 + RULE[8:], "its header has 18446744073709551615 bytes; at most"),
    "cut off in the header": (RULE[:100], "invalid header length"),
    "cut off in the tensors": (RULE[:-1], "expected a rule file"),
    "more behind the tensors": (RULE + b"x", "expected a rule file"),
    "a header that is no object": (with_header(b"[1]"), "invalid JSON in header"),
    "a header that is no JSON": (with_header(b"{"), "invalid JSON in header"),
    "an entry that is none": (with_header({"x": 7}), "invalid type: integer `7`"),
    "negative offsets": (with_header(tensor([2], [-8, 0]), bytes(8)), "invalid value: integer `-8`"),
    "offsets that are fractions": (
        with_header(tensor([2], [0.0, 8.0]), bytes(8)),
        "invalid type: floating point `0.0`",
    ),
    "a shape that is true": (with_header(tensor([True], [0, 4]), bytes(4)), "invalid type: boolean `true`"),
    "offsets that go back": (with_header(tensor([2], [8, 0]), bytes(8)), "expected a rule file"),
    "tensors that overlap": (
        with_header({**tensor([2], [0, 8]), "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
        "expected a rule file",
    ),
    "a shape that overflows": (with_header(tensor([2**32, 2**32], [0, 8]), bytes(8)), "overflow computing buffer size"),
    "an empty tensor with an axis of 2**62": (with_header(tensor([0, 2**62], [0, 0])), "says 4611686018427387904 of"),
    "a type that lies about its size": (with_header(tensor([2], [0, 8], "F64"), bytes(8)), "expected a rule file"),
    "a type that NumPy lacks": (with_header(tensor([4], [0, 8], "BF16"), bytes(8)), "holds BF16"),
    "a type that nobody has": (with_header(tensor([2], [0, 8], "Q7"), bytes(8)), "unknown variant `Q7`"),
    "a type that is a number": (with_header(tensor([2], [0, 8], 7), bytes(8)), "invalid type: integer `7`"),
    "no metadata": (save({"x": np.zeros(1)}), "has no adaras metadata"),
    "metadata of another tool": (save({"x": np.zeros(1)}, {"format": "pt"}), "has no adaras metadata"),
    "metadata that is no text": (with_header({"__metadata__": {"adaras": {"kind": "rule"}}}), "invalid JSON in header"),
    "metadata that is no object": (with_metadata("[1]"), "damaged metadata; expected a rule file"),
    "NaN in the metadata": (with_metadata('{"kind": "rule", "strength": NaN}'), "damaged metadata: holds NaN"),
    "a record twice": (with_metadata('{"kind": "rule", "kind": "gate"}'), "has the key 'kind' twice"),
    "another kind": (values()["gate"].to_bytes(), "is a gate file; expected a rule file"),
    "a kind with escapes": (with_metadata('{"kind": "\\u001b[2J"}'), r"is a \\x1b\[2J file"),
    "a later version": (file_of("rule", {"version": 2}), "format version 2; expected 1; use a newer adaras-export"),
    "a version that is true": (file_of("rule", {"version": True}), "format version True; expected 1"),
    "a version that is a fraction": (file_of("rule", {"version": 1.0}), "format version 1.0; expected 1"),
    "strength as text": (file_of("rule", {"strength": "2"}), "strength is '2'; expected a finite number"),
    "strength true": (file_of("rule", {"strength": True}), "strength is True; expected a finite number"),
    "threshold 2": (file_of("rule", {"threshold": 2}), "threshold 2 is not a probability"),
    "threshold null": (file_of("rule", {"threshold": None}), "threshold is None; expected a finite number"),
    "a start of nobody's": (file_of("rule", {"start": ["x"]}), r"start is \['x'\]; expected one of"),
    "questions in one text": (file_of("rule", {"questions": "abc"}), "questions are 'abc'; expected a list of digests"),
    "questions that are numbers": (file_of("rule", {"questions": [1]}), r"questions are \[1\]; expected a list"),
    "questions of two kinds": (file_of("rule", {"questions": ["a", 1]}), "expected a list of digests"),
    "no base": (file_of("rule", {"base": None}), "damaged base record"),
    "a base with more": (file_of("rule", base_of(more=1)), "damaged base record"),
    "a base of 10**30 layers": (
        file_of("rule", base_of(layers=10**30)),
        "layers is 1000.*; expected a positive integer",
    ),
    "a base of true layers": (file_of("rule", base_of(layers=True)), "layers is True; expected a positive integer"),
    "a base of 2.0 layers": (file_of("rule", base_of(layers=2.0)), "layers is 2.0; expected a positive integer"),
    "a base of no neurons": (file_of("rule", base_of(mlp_size=0)), "mlp_size is 0; expected a positive integer"),
    "a base without a name": (file_of("rule", base_of(id=["x"])), r"id is \['x'\]; expected text"),
    "a revision that is a number": (file_of("rule", base_of(revision=7)), "revision is 7; expected text"),
    "a family with escapes": (
        file_of("rule", base_of(family="\x1b[2J\n")),
        r"model_type \\x1b\[2J\\n is not supported",
    ),
    "a family that is a list": (file_of("rule", base_of(family=["llama"])), "is not supported"),
    "a layer that the base lacks": (
        file_of("rule", (), {"neurons.layer": np.array([1, 1, 2])}),
        r"layer \[2\] outside 0..1",
    ),
    "negative layers": (
        file_of("rule", (), {"neurons.layer": np.array([1, 1, -(2**63)])}),
        r"layer \[-9223372036854775808\]",
    ),
    "an index of 2**63 - 1": (file_of("rule", (), {"neurons.index": HUGE}), r"index \[9223372036854775807\] outside"),
    "an unsigned index": (
        file_of("rule", (), {"neurons.index": HUGE.astype(np.uint64) + np.uint64(9)}),
        "outside 0..5",
    ),
    "a neuron twice": (file_of("rule", (), {"neurons.index": np.array([1, 1, 2])}), "given more than once"),
    "layers as fractions": (
        file_of("rule", (), {"neurons.layer": np.ones(3)}),
        "layer holds float64; expected integers",
    ),
    "layers as booleans": (
        file_of("rule", (), {"neurons.layer": np.ones(3, bool)}),
        "layer holds bool; expected integers",
    ),
    "a layer without an axis": (
        file_of("rule", (), {"neurons.layer": np.array(1)}),
        r"layer has shape \(\); expected one",
    ),
    "one delta less": (file_of("rule", (), {"neurons.delta": np.ones(2, np.float32)}), "lengths differ"),
    "a delta that is NaN": (file_of("rule", (), {"neurons.delta": NAN}), "delta holds NaN or infinity"),
    "a delta beyond float32": (file_of("rule", (), {"neurons.delta": np.array([1, 2, 1e300])}), "exceeds the range"),
    "no delta": (file_of("rule", (), {"neurons.delta": None}), "damaged rule file"),
    "an unknown tensor": (file_of("rule", (), {"neurons.../x": np.ones(1)}), "damaged rule file"),
    "thousands of tensors": (
        file_of("rule", (), {f"neurons.{n}": np.ones(1) for n in range(3000)}),
        "damaged rule file",
    ),
    "a gate of other shapes": (file_of("rule", (), {"gate.hidden_weight": np.ones((2, 3))}), "hidden_weight has shape"),
    "half a gate": (file_of("rule", (), {"gate.hidden_bias": None}), "damaged rule file"),
}
STATS_ATTACKS = {
    "counts as text": (file_of("stats", {"trace_count": "6"}), "trace_count is '6'; expected a count"),
    "a negative count": (file_of("stats", {"correct_count": -1}), "correct_count is -1; expected a count"),
    "a count of 90 digits": (file_of("stats", {"trace_count": 10**89}), "trace_count is 1000.*; expected a count"),
    "a contrast of nobody's": (file_of("stats", {"contrast": 7}), "contrast is 7; expected one of: within_question"),
    "sums of other shapes": (file_of("stats", (), {"trace_sum": np.ones((2, 7))}), r"trace_sum has shape \(2, 7\)"),
    "a base of terabytes": (file_of("stats", base_of(layers=10**6, mlp_size=10**6)), r"expected \(1000000, 1000000\)"),
    "sums that are NaN": (file_of("stats", (), {"trace_sum": np.full((2, 6), np.nan)}), "trace_sum holds NaN"),
}
MATRIX = "model.layers.1.mlp.down_proj.weight"
WEIGHT_ATTACKS = {
    "empty": (b"", "model.safetensors: .*header too small; expected a safetensors file"),
    "a pickle": (b"\x80\x04\x95" + bytes(40), "its header has 9766016 bytes; at most"),
    "a tensor twice, of which the library takes the last": (twice(MATRIX), f"has the key '{MATRIX}' twice"),
    "cut off": (save(tensors())[:-1], "expected a safetensors file"),
    "a matrix on its side": (save({**tensors(), MATRIX: np.ones((6, 4))}), r"has shape \[6, 4\]; expected \[4, 6\]"),
    "a matrix of one axis": (save({**tensors(), MATRIX: np.ones(24)}), r"has shape \[24\]; expected \[4, 6\]"),
    "one layer less": (save({key: one for key, one in tensors().items() if key != MATRIX}), "has weights of 1 layers"),
    "a layer of another name": (
        save({**tensors(), "model.layers.\x1b[2J.x": np.ones(1)}), "has weights of 3 layers; expected 2",
    ),
    "layers without down projections": (
        save({"model.layers.0.x": np.ones(1), "model.layers.1.x": np.ones(1)}), "no tensor model.layers.0.mlp.down",
    ),
}  # fmt: skip
GGUF_ATTACKS = {
    "empty": (b"", "ends before its entries and tensors do; expected a GGUF file"),
    "another magic": (gguf(b"GGUF", b"GGML"), "does not begin with GGUF"),
    "version 9": (gguf(b"GGUF\x03", b"GGUF\x09"), "is of version 9, or big-endian; only versions 2 and 3 are read"),
    "big-endian": (gguf(b"GGUF\x03\x00\x00\x00", b"GGUF\x00\x00\x00\x03"), "is of version 50331648, or big-endian"),
    "2**60 entries": (
        b"GGUF" + b"\x03\x00\x00\x00" + bytes(8) + bytes(7) + b"\x10",
        "says 1152921504606846976 entries",
    ),
    "2**60 tensors": (
        b"GGUF" + b"\x03\x00\x00\x00" + bytes(7) + b"\x10" + bytes(8),
        "says 1152921504606846976 tensors",
    ),
    "an array of 2**60 numbers": (
        gguf(
            b"a.list\x09\x00\x00\x00\x05\x00\x00\x00\x03" + bytes(7),
            b"a.list\x09\x00\x00\x00\x05\x00\x00\x00" + bytes(7) + b"\x10",
        ),
        "says 1152921504606846976 elements; at most",
    ),
    "an array of arrays": (
        gguf(b"a.list\x09\x00\x00\x00\x05", b"a.list\x09\x00\x00\x00\x09"),
        "has arrays of arrays",
    ),
    "a text of 2**60 bytes": (gguf(b"\x01" + bytes(7) + b"a", bytes(7) + b"\x10a"), "bytes of text; at most"),
    "texts of 20 MiB in all": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 20) + b"".join(_long_text(f"a.{at:02}") for at in range(20)),
        "says 1048576 bytes of text; at most [0-9]+ are read",
    ),
    "an entry twice": (
        gguf(b"a.count", b"a.words"),
        "has the entry 'a.words' twice",
    ),
    "a tensor twice": (gguf(b"direction.2", b"direction.1"), "has two tensors of one name"),
    "a type that nobody has": (gguf(b"a.count\x05", b"a.count\x63"), "says 99 as the type of a value"),
    "an alignment of 3": (
        gguf(b"alignment\x04\x00\x00\x00\x40", b"alignment\x04\x00\x00\x00\x03"),
        "aligns its tensors to 3 bytes",
    ),
    "an alignment of 2**31": (
        gguf(b"alignment\x04\x00\x00\x00\x40\x00\x00\x00", b"alignment\x04\x00\x00\x00\x00\x00\x00\x80"),
        "aligns its tensors to 2147483648 bytes",
    ),
    "cut off in the tensors": (gguf()[:-80], "ends before the values of 'direction.2' do"),
    "half a block": (
        gguf(_record("direction.2", 32), _record("direction.2", 32, kind=8)),
        "has 'direction.2' with 4 values in a row, which are no whole blocks of 32",
    ),
    "tensors that share their bytes": (
        gguf(_record("direction.2", 32), _record("direction.2", 0)),
        "has 'direction.2' where the values of another tensor are",
    ),
}

TABLE = {"rule": RULE_ATTACKS, "stats": STATS_ATTACKS, "weights": WEIGHT_ATTACKS, "gguf": GGUF_ATTACKS}
