"""Target `onnx`: a graph that stock ONNX runtimes run, gate included; no library of ours, no registered kernel.

The base is exported as plain ONNX, the rule is put into the graph (`onnx_graph`) as functions of domain `adaras`
(`onnx_functions`, docs/onnx-ops.md), and what the gate has seen and decided rides in one more layer of the KV cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.inliner import inline_local_functions
from torch import Tensor

from adaras_export import models, storage
from adaras_export.errors import ArtifactError, ExportError
from adaras_export.exporters import calibration, hf, hf_thin, onnx_functions, onnx_graph, onnx_quantize
from adaras_export.exporters.base import (
    Commission,
    Exporter,
    Feature,
    Written,
    copy_companions,
    stock_reference,
)
from adaras_export.exporters.onnx_graph import DATA_FILE, STRENGTH, THRESHOLD
from adaras_export.parity import Artifact, Check, Mode, Play, Player, Tolerance, play_model
from adaras_export.rule import SteeringRule
from adaras_export.storage import Array

GRAPH = "onnx/model.onnx"
PRECISIONS = ("fp32", "fp16", "int8", "int4")
_BITS = {"int8": 8, "int4": 4}

# Units of float32. ONNX Runtime's kernels sum in other orders than PyTorch's, and a sharp softmax magnifies that:
# measured over fifteen toy bases in all modes: up to 82 units (Granite), 19 without it.
_TOLERANCES = {"fp32": Tolerance(256, off=True), "fp16": Tolerance(64 * 2**13, off=True, probability=2e-2)}


@dataclass(frozen=True)
class OnnxExporter:
    """The exporter of target `onnx`."""

    precision: str = "fp32"
    inline: bool = False
    calibration: str | Path | None = None

    name: ClassVar[str] = "onnx"
    drops: ClassVar[frozenset[Feature]] = frozenset()
    options: ClassVar[frozenset[str]] = frozenset({"precision", "inline", "calibration"})

    def commissioned(self, commission: Commission) -> Exporter:
        """As `Exporter` says."""
        chosen = replace(self, **commission.options)
        if chosen.precision not in PRECISIONS:
            raise ExportError(f"onnx: precision {chosen.precision}; expected one of: {', '.join(PRECISIONS)}")
        if chosen.calibration is not None and chosen.precision == "fp32":
            raise ExportError("onnx: calibration with precision fp32, where the gate decides as the rule's does")
        return chosen

    def recorded(self) -> Mapping[str, Any]:
        """As `Exporter` says."""
        return {"precision": self.precision, "inline": self.inline}

    def write(self, rule: SteeringRule, base: Path, out: Path) -> Written:
        """As `Exporter` says."""
        config = hf.plain_config(base)
        _require_tokenizer(base)
        prompts = self._gate_prompts(rule)
        graph = out / GRAPH
        graph.parent.mkdir()
        self._write_plain(base, graph)
        model = ir.load(graph)
        onnx_graph.steer(model, rule, hf.vectors(rule, base))
        ir.save(model, graph)  # the weights stay in their file
        written = Written(rule)
        if prompts is not None:
            written = calibration.calibrated(rule, base, _SteeredGraph(graph, _TOLERANCES[self.precision]), prompts)
            rule = written.rule
            model.graph.initializers[THRESHOLD].const_value = ir.tensor(
                onnx_graph.tensors(rule, {})[THRESHOLD], name=THRESHOLD
            )
            ir.save(model, graph)
        if self.inline:
            onnx.save(inline_local_functions(onnx.load(graph, load_external_data=False)), graph)
        onnx.checker.check_model(graph, full_check=True)
        hf.write_json(out / "config.json", self._config(config, rule))
        copy_companions(base, out)
        return written

    def inspect(self, folder: Path, rule: SteeringRule, base: Path) -> Sequence[Check]:
        """As `Exporter` says."""
        model = _graph(folder)
        strange = sorted({*_strange_functions(model), *_strange_operators(model), *_strange_files(model)})
        expected = self._config(storage.read_json(base / "config.json"), rule)
        found = storage.read_json(folder / "config.json")
        settings = [key for key in sorted({*expected, *found}) if found.get(key) != expected.get(key)]
        stored = {name: value.const_value for name, value in model.graph.initializers.items()}
        wanted = onnx_graph.tensors(rule, hf.vectors(rule, base))
        wrong = [name for name, value in wanted.items() if not _equal(stored.get(name), value)]
        changed = hf.changed_companions(folder, base)
        return [
            Check("operators that are not the library's", len(strange), 0, " ".join(strange)),
            Check("config entries that differ", len(settings), 0, " ".join(settings)),
            Check("files of the base that differ", len(changed), 0, " ".join(changed)),
            Check("steering tensors that differ", len(wrong), 0, " ".join(wrong)),
        ]

    def reference(self, folder: Path, rule: SteeringRule, base: Path) -> tuple[Player, int]:
        """As `Exporter` says: with fewer bits, vectors folded from the base's weights on a base with rounded ones."""
        if self.precision == "fp32":
            return stock_reference(rule, base)
        with TemporaryDirectory() as scratch:
            repository = Path(scratch) / "reference"  # Transformers keeps the code of each name that it has met
            repository.mkdir()
            hf_thin.EXPORTER.write(rule, base, repository)
            opened: Any = hf.open_repository(repository)
        if self.precision == "fp16":
            onnx_quantize.round_to_half(opened.model)
        else:
            onnx_quantize.overwrite(opened.model, _graph(folder))
        return opened, int(opened.model.config.vocab_size)

    def load(self, folder: Path) -> Artifact:
        """As `Exporter` says."""
        return _SteeredGraph(folder / GRAPH, _TOLERANCES[self.precision])

    def tags(self) -> Sequence[str]:
        """As `Exporter` says."""
        return ("onnx", "onnxruntime", "transformers.js")

    def usage(self) -> str:
        """As `Exporter` says."""
        return _USAGE

    def _write_plain(self, base: Path, graph: Path) -> None:
        from transformers import AutoModelForCausalLM

        dtype = torch.float16 if self.precision == "fp16" else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        if self.precision not in _BITS:
            onnx_graph.plain_graph(model, graph)
            return
        with TemporaryDirectory(dir=graph.parent) as scratch:
            plain = Path(scratch) / graph.name
            onnx_graph.plain_graph(model, plain)
            del model
            quantised = ir.load(plain)  # whose weights are read from the file, one by one
            onnx_quantize.quantise(quantised, _BITS[self.precision])
            ir.save(quantised, graph, external_data=DATA_FILE)

    def _gate_prompts(self, rule: SteeringRule) -> calibration.Prompts | None:
        """What the gate is asked, where its decisions may differ from those that the rule was made with."""
        if rule.gate is None and self.calibration is not None:
            raise ExportError("onnx: calibration of a rule without a gate, which has no threshold")
        if rule.gate is None or self.precision == "fp32":
            return None
        return calibration.Prompts.of(self.calibration)

    def _config(self, config: dict[str, Any], rule: SteeringRule) -> dict[str, Any]:
        """The base's config.json; with a gate, it counts the layer of the KV cache that the gate's state is in.

        Transformers.js takes the number of layers from there.
        """
        steered = {**config, "adaras": hf.steered_config(config, rule)["adaras"]}
        if rule.gate is not None:
            layers = models.FAMILIES[rule.base.family].sizes[0]
            steered[layers] = config[layers] + 1
            if "layer_types" in config:
                steered["layer_types"] = [*config["layer_types"], "full_attention"]
        # Its name for the file without a suffix; types it takes from the graph.
        steered["transformers.js_config"] = {"dtype": "fp32", "use_external_data_format": True}
        return steered


EXPORTER = OnnxExporter()

_USAGE = """\
With [ONNX Runtime GenAI](https://onnxruntime.ai/docs/genai/), from the folder of this repository:

```python
import onnxruntime_genai as og

model = og.Model("{repo}")
tokenizer, parameters = og.Tokenizer(model), og.GeneratorParams(model)
parameters.set_search_options(max_length=256)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("What is 12 times 7?"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

With [Transformers.js](https://huggingface.co/docs/transformers.js), in Node or a browser:

```js
import { pipeline } from "@huggingface/transformers";

const generate = await pipeline("text-generation", "{repo}");
console.log(await generate("What is 12 times 7?", { max_new_tokens: 64 }));
```

With ONNX Runtime alone, `steering_strength` may be fed with each call (a float32 scalar; 0 is the base model).
"""


class _SteeredGraph:
    """An opened graph. Modes are set with the dials that users have: the two overridable initialisers."""

    def __init__(self, path: Path, tolerance: Tolerance) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # else it warns of every initialiser that may be overridden
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no class of their own in common
            raise ArtifactError(f"{path}: cannot be opened ({str(error).strip().partition(chr(10))[0]})") from error
        self.tolerance = tolerance
        self.outputs = [one.name for one in self.session.get_outputs()]
        self.pasts = {one.name: one for one in self.session.get_inputs() if one.name.startswith("past_key_values.")}
        self.gated = THRESHOLD in {one.name for one in self.session.get_overridable_initializers()}
        self.dials: dict[str, Array] = {}

    def findings(self) -> Sequence[Check]:
        return []

    def play(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: Tensor | None) -> Play:
        if mode == "off":
            self.dials = {STRENGTH: np.asarray(0, np.float32)}
        elif mode != "rule" and self.gated:
            self.dials = {THRESHOLD: np.asarray(2 if mode == "always" else mode, np.float32)}  # p(correct) is below 2
        try:
            return play_model(self, rows, follow_BS)
        finally:
            self.dials = {}

    def __call__(self, *, past_key_values: Any, use_cache: bool, **tokens: Tensor) -> Any:  # noqa: ANN401, ARG002
        """One call, as of a model of Transformers."""
        batch = len(tokens["input_ids"])
        past = self._empty(batch) if past_key_values is None else past_key_values.tensors
        feeds = {name: value.numpy() for name, value in tokens.items()} | past | self.dials
        found = dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
        logits = torch.from_numpy(found.pop("logits"))
        tensors = {name.replace("present.", "past_key_values."): value for name, value in found.items()}
        cache = SimpleNamespace(tensors=tensors)
        if self.gated:
            value = tensors[max((name for name in tensors if name.endswith(".value")), key=_layer_of)]
            cache.steering_state = SimpleNamespace(probability=torch.from_numpy(value[:, 0, 0, 0]))
        return SimpleNamespace(logits=logits, past_key_values=cache)

    def p_correct(self, rows: Sequence[Sequence[int]]) -> Array:
        """p(correct) of each prompt of token ids, (N,) float32."""
        found = np.zeros(len(rows), np.float32)
        for position, row in enumerate(rows):
            ids = torch.tensor([row])
            tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            tokens["position_ids"] = torch.arange(len(row)).unsqueeze(0)
            cache = self(**tokens, past_key_values=None, use_cache=True).past_key_values
            found[position] = cache.steering_state.probability.item()
        return found

    def _empty(self, batch: int) -> dict[str, Array]:
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            name: np.zeros((batch, one.shape[1], 0, one.shape[3]), types[one.type]) for name, one in self.pasts.items()
        }


def _layer_of(name: str) -> int:
    return int(name.split(".")[1])


def _require_tokenizer(base: Path) -> None:
    if not (base / "tokenizer.json").exists():
        raise ExportError(
            f"{base}: no tokenizer.json; expected a fast tokenizer, which the runtimes need: write one with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def _graph(folder: Path) -> ir.Model:
    path = folder / GRAPH
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's own errors, a missing file, a field that onnx-ir does not know
        raise ArtifactError(f"{path}: {str(error).strip().partition(chr(10))[0]}; expected an ONNX graph") from error


def _strange_functions(model: ir.Model) -> list[str]:
    own = {name: ir.serde.deserialize_function(proto) for name, proto in onnx_functions.functions().items()}
    return [
        f"{domain}.{name}"
        for (domain, name, _), function in model.functions.items()
        if name not in own or _text(function) != _text(own[name])
    ]


def _text(function: ir.Function) -> bytes:
    return bytes(ir.serde.serialize_function(function).SerializeToString(deterministic=True))


def _strange_operators(model: ir.Model) -> list[str]:
    """Operators that only a library of somebody's could run; a graph of ONNX' own can compute, but nothing else."""
    known = {"", "ai.onnx", "com.microsoft", onnx_functions.DOMAIN}
    return [f"{node.domain}.{node.op_type}" for node in model.graph if node.domain not in known]


def _strange_files(model: ir.Model) -> list[str]:
    stored = (value.const_value for value in model.graph.initializers.values())
    files = {str(one.location) for one in stored if isinstance(one, ir.ExternalTensor)}
    return sorted(files - {DATA_FILE})


def _equal(found: Any, expected: Array) -> bool:  # noqa: ANN401 - a tensor, or None
    return found is not None and np.array_equal(found.numpy(), expected) and found.numpy().dtype == expected.dtype
