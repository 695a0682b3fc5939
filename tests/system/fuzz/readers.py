"""Every reader of foreign bytes: the file that it reads, valid seeds of it, and what holds of what it gives.

Knows neither pytest nor Hypothesis nor atheris, so that both kinds of fuzzing share it.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import evaluations
import numpy as np
from gguf import GGUFValueType
from onnx import TensorProto, helper
from safetensors.numpy import save

from adaras_export.core import trace_files
from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.gate import Gate
from adaras_export.core.neuron_stats import AttributionStats, NeuronStats
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.rule import SteeringRule
from adaras_export.core.traces import Question, Trace
from adaras_export.core.value import Value
from adaras_export.delivery import documents, verifier
from adaras_export.delivery import receipt as delivery_receipt
from adaras_export.errors import AdarasError
from adaras_export.evaluation.report.render import html, report_of, write
from adaras_export.exporters import checkpoint as exported
from adaras_export.exporters.checks import Check, ParityReport
from adaras_export.exporters.gguf import files
from adaras_export.exporters.gguf.reader import opened
from adaras_export.exporters.manifest import Disclosed
from adaras_export.exporters.onnx import exporter as onnx_target
from adaras_export.exporters.onnx import genai
from adaras_export.exporters.onnx.chat_template import chat_template
from adaras_export.exporters.onnx.session import end_ids
from adaras_export.exporters.peft.settings import require, require_fits
from adaras_export.exporters.stock import stream, switchable
from adaras_export.files import atomic

BASE = BaseModel("tiny", "llama", 2, 6, 4, fingerprint="ab" * 32)
_VECTOR = np.arange(4, dtype=np.float32)


@dataclass(frozen=True)
class Reader:
    """``read`` takes the folder in which ``name`` lies; what else it needs, ``beside`` puts there."""

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    beside: Callable[[Path], None] = lambda folder: None


def verdict(reader: Reader, folder: Path, content: bytes) -> AdarasError | None:
    """Let it read ``content``: the error that it gives, None where it takes it.

    Whatever is neither goes through: another exception, or an error that is no printable line about the file.
    """
    (folder / reader.name).write_bytes(content)
    try:
        reader.read(folder)
    except AdarasError as error:
        require_line(str(error), folder)
        return error
    return None


def require_line(message: str, folder: Path) -> None:
    """One printable line of bearable length, which names the file, or its folder."""
    assert message.isprintable(), ascii(message)
    assert 20 < len(message) <= 2100, ascii(message)
    # Options of a receipt are refused by the target that has them, settings by PEFT's own class: they know no folder.
    assert str(folder) in message or message.startswith(("receipt", "adapter_config.json")), ascii(message)


def prepared(reader: Reader, folder: Path) -> Path:
    """The folder, with what lies beside the file."""
    folder.mkdir(parents=True, exist_ok=True)
    reader.beside(folder)
    return folder


@cache
def values() -> dict[str, Value]:
    """A value of each kind of ours, with all optional parts."""
    columns = {"mean_correct": np.ones(3), "mean_incorrect": np.zeros(3), "score": np.arange(3.0)}
    neurons = NeuronSet(layer=[1, 1, 1], index=[0, 5, 2], delta=[1.0, -2.0, 0.5], questions=("01",), **columns)
    gate = Gate(
        layer=[0, 0], index=[3, 1], attention_weight=[0.5, -1.0], attention_bias=0.25, hidden_weight=np.ones((2, 2)),
        hidden_bias=[0.0, 1.0], output_weight=[1.0, -1.0], output_bias=0.1, threshold=0.5, questions=("02",),
    )  # fmt: skip
    draw = np.random.default_rng(0)
    return {
        "neurons": neurons,
        "gate": gate,
        "rule": SteeringRule(neurons=neurons, strength=2.0, base=BASE, gate=gate),
        "stats": NeuronStats.empty(BASE).update("01", *draw.normal(size=(2, 3, 2, 6))),
        "attribution": AttributionStats.empty(BASE).update("01", draw.normal(size=(2, 6))),
    }


def _value(name: str) -> Reader:
    value = values()[name]

    def read(folder: Path) -> None:
        loaded = type(value).load(folder / "value")
        loaded.save(folder / "again")
        assert type(value).load(folder / "again") == loaded

    return Reader("value", lambda: [value.to_bytes()], read)


def _read_csv(folder: Path) -> None:
    assert len(NeuronSet.from_reference_csv(folder / "top.csv")) > 0


_CSV = b"overall_neuron_index,layer,neuron_index_in_layer,weight\n6,1,0,1.5\n11,1,5,-2\n2,0,2,0.25\n"


def _lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _trace_seeds() -> list[bytes]:
    trace = {"id": "q#0", "question_id": "q", "prompt": "1+1=", "completion": "2", "correct": True}
    chat = {**trace, "id": "q#1", "question_id": "r", "prompt": [{"role": "user", "content": "1+1="}]}
    theirs = {"id": 3, "_id": 1, "question": "1+1=", "thinking": "2", "is_good": False}
    return [_lines(trace, chat), _lines(theirs)]


def _question_seeds() -> list[bytes]:
    ours = {"id": "q", "prompt": "1+1=", "answer": "2"}
    chat = {"id": "r", "prompt": [{"role": "user", "content": "1+1="}], "answer": 0.10}
    return [_lines(ours, chat), _lines({"id": 3, "question": "1+1=", "answer": 2})]


def _read_lines(folder: Path) -> None:
    path, again = folder / "lines.jsonl", folder / "again.jsonl"
    found = trace_files.read_prompts(path)
    if isinstance(found[0], Trace):
        trace_files.write_traces(again, found)
    else:
        assert isinstance(found[0], Question)
        trace_files.write_questions(again, found)
    assert trace_files.read_prompts(again) == found


def _receipt_seeds() -> list[bytes]:
    rule = values()["rule"]
    digest = "cd" * 32
    common = {"drops": (), "rule": rule.fingerprint, "given_rule": rule.fingerprint, "base": BASE, "source": "/base"}
    parity = ParityReport((Check("files changed", 0, 0), Check("share", 0.5, None, "of 3")))
    more = {"base_tensors": {"a": digest}, "base_card": {"license": "mit"}, "parity": parity, "files": {"a.b": digest}}
    more["tensors"] = (Disclosed("a", "m.safetensors", "F32", (2, 3), digest, "added"),)
    into = {"into": {"file": "m.gguf", "content": digest}}
    chosen = {"hf": {}, "peft": {"adaptive": True}, "gguf": into, "stock": {"switchable": True}, "onnx": {"page": True}}
    more |= {"repository": "x", "tensors": (Disclosed("a", "a.b", "F32", (4,), digest, "added"),)}
    return [
        delivery_receipt.Receipt(target=name, options=how, **common, **more).to_bytes() for name, how in chosen.items()
    ]


def _read_receipt(folder: Path) -> None:
    receipt = delivery_receipt.read(folder)
    assert isinstance(delivery_receipt.file_checks(folder, receipt), list)
    exporter = verifier.exporter_of(receipt)
    assert exporter.spec.recorded().keys() <= exporter.spec.options
    receipt.write(folder)
    assert delivery_receipt.read(folder).to_bytes() == receipt.to_bytes()


def tensors() -> dict[str, Any]:
    """The tensors of a base, as far as this library reads them."""
    down = {f"model.layers.{layer}.mlp.down_proj.weight": np.ones((4, 6), np.float32) for layer in (0, 1)}
    return {"model.embed_tokens.weight": np.ones((3, 4), np.float32), **down}


CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "intermediate_size": 6, "hidden_size": 4}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_inner": None, "n_embd": 4}


def write_base(folder: Path) -> None:
    """A base in one file."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(save(tensors(), metadata={"format": "pt"}))


def write_shards(folder: Path) -> None:
    """A base in two files."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, part in (("a", 0), ("b", 1)):
        held = {key: value for at, (key, value) in enumerate(tensors().items()) if (at > 0) == part}
        (folder / f"{name}.safetensors").write_bytes(save(held, metadata={"format": "pt"}))


def _index_seeds() -> list[bytes]:
    weight_map = {key: "ab"[at > 0] + ".safetensors" for at, key in enumerate(tensors())}
    return [json.dumps({"metadata": {"total_size": 144}, "weight_map": weight_map}).encode()]


def _read_base(folder: Path) -> None:
    base = BaseModel.of(folder)
    found = Checkpoint(folder)
    assert found.hashes.keys() == found.files.keys()
    for path in {*found.files.values()}:
        assert stream.same_tensors(path, stream.streams(path))
    index = np.array([base.mlp_size - 1])
    columns = found.down_columns(base.layers - 1, index)
    assert columns.shape == (base.hidden_size, 1)


def _read_adapter_tensors(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    assert isinstance(exported.stored_names(path), set)
    exported.stores(path, "a", _VECTOR)


def _lora_config() -> bytes:
    return json.dumps(switchable.adapter_config(values()["rule"])).encode()


def _write_lora(folder: Path) -> None:
    (folder / "steering-lora").mkdir(exist_ok=True)


def _read_lora(folder: Path) -> None:
    assert isinstance(switchable.changed_settings(values()["rule"], folder), list)


def _gguf_seeds() -> list[bytes]:
    kinds = {
        "general.architecture": (GGUFValueType.STRING, "controlvector"),
        "a.count": (GGUFValueType.INT32, 2),
        "a.strength": (GGUFValueType.FLOAT64, 1.5),
        "general.alignment": (GGUFValueType.UINT32, 64),
        "a.list": (GGUFValueType.ARRAY, [1, 2, 3]),
        "a.words": (GGUFValueType.ARRAY, ["a", "bc"]),
    }
    held = {"direction.1": _VECTOR, "direction.2": _VECTOR, "m": np.ones((2, 3), np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        files.write(Path(folder, "seed"), kinds, held)
        return [Path(folder, "seed").read_bytes()]


def _read_gguf(folder: Path) -> None:
    found = opened(folder / "control-vector.gguf")
    vectors = files.floats(found)
    files.differing(vectors, dict.fromkeys(vectors, _VECTOR))
    assert len(files.content_digest(folder / "control-vector.gguf")) == 64


def _read_runner_settings(folder: Path) -> None:
    chat_template(folder)
    assert all(isinstance(end, int) for end in end_ids(folder))


def _template_seeds() -> list[bytes]:
    named = {"chat_template": [{"name": "default", "template": "{{ messages }}"}], "eos_token": {"content": "<eos>"}}
    return [json.dumps(named).encode(), json.dumps({"chat_template": "{{ bos_token }}", "bos_token": "<s>"}).encode()]


@cache
def _evaluation_seeds() -> list[bytes]:
    """One answer to each question, and three with a comparison."""
    draw = np.random.default_rng(0)
    arms = ("off", "gated", "everywhere", "flipped", "random 0")
    one, three = ({arm: draw.random((3, answers)) < 0.5 for arm in arms} for answers in (1, 3))
    figure = {"value": 0.1, "low": 0.0, "high": 0.2}
    kl = dict.fromkeys(("kl_reference", "kl_reference_first", "kl_off", "kl_off_first"), figure)
    gap = {"name": "gated", "difference": figure, "fixed": 1, "broken": 0, "p_value": 0.5, **kl}
    comparison = {"reference": "gated", "tokens": 8, "mean_tokens": 7.5, "gaps": [gap, {**gap, "name": "everywhere"}]}
    records = evaluations.record(one), evaluations.record(three, comparison=comparison)
    return [json.dumps({**record, "rule": values()["rule"].fingerprint}).encode() for record in records]


def _read_evaluation(folder: Path) -> None:
    assert documents.evaluation_of(folder / "evaluation.json", values()["rule"])


ADAPTIVE = {
    "steered": ["model.layers.1.mlp.down_proj"],
    "features": {"model.layers.0.mlp.down_proj": [1, 3]},
    "gate_module": "model.layers.0.mlp.down_proj",
    "gate_size": 2,
    "hidden_size": 4,
    "strength": 2.0,
    "threshold": 0.5,
    "start": "last_prompt_token",
}


def _read_adaptive(folder: Path) -> None:
    settings = {**ADAPTIVE, **atomic.read_json(folder / "adapter_config.json")}
    require(settings)
    for name in (*settings["steered"], *settings["features"]):
        require_fits(name, settings, width=6, hidden_size=4)


def _graph_seeds() -> list[bytes]:
    cache = [helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, [1, 2, "p", 4])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    held = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    elsewhere = helper.make_tensor("v", TensorProto.FLOAT, [2], np.ones(2, np.float32).tobytes(), raw=True)
    elsewhere.ClearField("raw_data")
    elsewhere.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx_data"), ("offset", "0"), ("length", "8")):
        elsewhere.external_data.add(key=key, value=value)
    node = helper.make_node("Add", ["x", "w"], ["y"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph([node], "g", [x, *cache], [y], [held, elsewhere])
    return [helper.make_model(graph).SerializeToString()]


def _read_graph(folder: Path) -> None:
    model = onnx_target._graph(folder)
    for strange in (onnx_target._strange_functions(model), onnx_target._strange_operators(model)):
        assert all(isinstance(one, str) for one in strange)
    onnx_target._strange_files(model, folder)
    for value in model.graph.initializers.values():
        onnx_target._equal(value.const_value, _VECTOR[:2])
    genai.genai_config(model, CONFIG, {}, "llama", str(folder / onnx_target.GRAPH))


def _write_graph_folder(folder: Path) -> None:
    (folder / "onnx").mkdir(exist_ok=True)
    (folder / "onnx" / "model.onnx_data").write_bytes(bytes(8))


def _read_json(folder: Path) -> None:
    value = atomic.read_json(folder / "value.json")
    exported.write_json(folder / "again.json", value)
    assert atomic.read_json(folder / "again.json") == value


def _read_report(folder: Path) -> None:
    """Without the charts, each of which takes a tenth of a second."""
    report = report_of([folder / "evaluation.json"])
    write(report, folder / "report.json")
    assert "<script" not in html(report.markdown(), {})


READERS = {
    **{name: _value(name) for name in values()},
    "csv": Reader("top.csv", lambda: [_CSV], _read_csv),
    "traces": Reader("lines.jsonl", _trace_seeds, _read_lines),
    "questions": Reader("lines.jsonl", _question_seeds, _read_lines),
    "receipt": Reader("receipt.json", _receipt_seeds, _read_receipt),
    "config": Reader("config.json", lambda: [json.dumps(CONFIG).encode()], _read_base, write_base),
    "index": Reader("model.safetensors.index.json", _index_seeds, _read_base, write_shards),
    "weights": Reader("model.safetensors", lambda: [save(tensors(), {"format": "pt"})], _read_base, write_base),
    "adapter": Reader(
        "adapter_model.safetensors", lambda: [save({"a": _VECTOR, "b": np.ones((1, 1))})], _read_adapter_tensors
    ),
    "adapter config": Reader("steering-lora/adapter_config.json", lambda: [_lora_config()], _read_lora, _write_lora),
    "gguf": Reader("control-vector.gguf", _gguf_seeds, _read_gguf),
    "tokenizer config": Reader("tokenizer_config.json", _template_seeds, _read_runner_settings, write_base),
    "generation config": Reader(
        "generation_config.json", lambda: [b'{"eos_token_id": [1, 2]}'], _read_runner_settings, write_base
    ),
    "adaptive config": Reader("adapter_config.json", lambda: [json.dumps(ADAPTIVE).encode()], _read_adaptive),
    "graph": Reader("onnx/model.onnx", _graph_seeds, _read_graph, _write_graph_folder),
    "evaluation": Reader("evaluation.json", _evaluation_seeds, _read_evaluation),
    "report": Reader("evaluation.json", _evaluation_seeds, _read_report),
    "json": Reader("value.json", lambda: [b'{"a": [1, 2.5, "x", null, true], "b": {}}'], _read_json),
}
