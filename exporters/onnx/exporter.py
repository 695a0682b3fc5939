"""Target `onnx`: a graph that stock ONNX runtimes run, gate included; no library of ours, no registered kernel.

The base is exported as plain ONNX, the rule is put into the graph (`onnx_graph`) as functions of domain `adaras`
(`onnx_functions`, docs/onnx-ops.md), and what the gate has seen and decided rides in one more layer of the KV cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.inliner import inline_local_functions

from adaras_export.core import families
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.folding import vectors
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import AdarasError, ArtifactError, ExportError, first_line
from adaras_export.exporters.base import (
    ExportContext,
    Exporter,
    TargetSpec,
    Written,
    sizes_of,
    stock_reference,
)
from adaras_export.exporters.checkpoint import (
    changed_companions,
    copy_companions,
    differing_keys,
    plain_config,
    same_content,
    same_json,
    unknown_files,
    write_json,
)
from adaras_export.exporters.checks import Check, Inspection
from adaras_export.exporters.hf import exporter, thin
from adaras_export.exporters.manifest import Disclosed
from adaras_export.exporters.onnx import comparison, functions, quantize, web_page
from adaras_export.exporters.onnx import graph as graphs
from adaras_export.exporters.onnx import tensors as manifest
from adaras_export.exporters.onnx.calibration import Prompts, calibrated
from adaras_export.exporters.onnx.genai import build_graph, genai_config
from adaras_export.exporters.onnx.graph import DATA_FILE, steer, tensors
from adaras_export.exporters.onnx.player import SteeredGraph
from adaras_export.exporters.onnx.session import GRAPH, THRESHOLD
from adaras_export.exporters.parity import Artifact, Reference, Tolerance
from adaras_export.files import atomic, safe_read
from adaras_export.files.safetensors_record import Array

GRAPH_DATA = f"onnx/{DATA_FILE}"
_GENAI_CONFIG = "genai_config.json"
PRECISIONS = ("fp32", "fp16", "int8", "int4")
_BITS = {"int8": 8, "int4": 4}
_LARGEST_GRAPH = 1 << 31  # what protobuf can hold; the weights are in a file of their own

# Units of float32. ONNX Runtime's kernels sum in other orders than PyTorch's, and a sharp softmax magnifies that:
# measured over fifteen toy bases in all modes: up to 88 units (Granite), 19 without it; with 8 and 4 bits up to 59.
_FLOAT32 = Tolerance(256, off=True)
# 2**13 of them are one of float16: measured over the same bases, which are small and steep, up to 17.4 and p(correct)
# off by 0.001; on SmolLM2-135M 0.8 and 0.0004. The effect of steering there: 880 and more.
_FLOAT16 = Tolerance(32 * 2**13, off=True, probability=4e-3, ties=True)


_OPTIONS = frozenset({"precision", "inline", "genai", "page", "calibration"})


@dataclass(frozen=True)
class OnnxExporter:
    """The exporter of target `onnx`."""

    precision: str = "fp32"
    inline: bool = False
    genai: bool = False
    page: bool = False
    calibration: str | Path | None = None

    @property
    def spec(self) -> TargetSpec:
        """As `Exporter` says."""
        return TargetSpec(
            "onnx",
            "exporters/onnx/card.md",
            self._entries,
            options=_OPTIONS,
            recorded=self._recorded,
            library="transformers.js",
            tags=("onnx", "onnxruntime", "transformers.js"),
            rounded=self.precision != "fp32",
        )

    def with_context(self, context: ExportContext) -> Exporter:
        """As `Exporter` says."""
        chosen = replace(self, **context.options)
        if chosen.precision not in PRECISIONS:
            raise ExportError(f"onnx: precision {chosen.precision}; expected one of: {', '.join(PRECISIONS)}")
        if chosen.genai and chosen.precision == "fp16":
            raise ExportError("onnx: --genai with fp16 runs on no CPU, so it could not be verified; expected another")
        if chosen.genai and chosen.precision in _BITS:
            raise ExportError(f"onnx: --genai with {chosen.precision}: its builder fuses weights; leave out --genai")
        if chosen.calibration is not None and chosen.precision == "fp32":
            raise ExportError("onnx: calibration with fp32, whose gate decides as the rule's; leave out --calibration")
        return chosen

    def write(self, rule: SteeringRule, base: Checkpoint, out: Path) -> Written:
        """As `Exporter` says."""
        config = plain_config(base)
        _require_tokenizer(base.folder)
        prompts = self._gate_prompts(rule)
        graph = out / GRAPH
        if self.page:  # first, because npm may fail
            web_page.write_files(out)
        model = self._write_steered(rule, base, graph)
        written = Written(rule)
        if prompts is not None:
            written = calibrated(rule, base, SteeredGraph(graph, self._tolerance()), prompts)
            rule = written.rule
            threshold = tensors(rule, {})[THRESHOLD]
            model.graph.initializers[THRESHOLD].const_value = ir.tensor(threshold, name=THRESHOLD)
            ir.save(model, graph)
        self._inline(graph)
        if not self.genai:  # the builder's own nodes do not pass
            onnx.checker.check_model(graph, full_check=True)
        if self.page:
            web_page.write_graph(graph, out)
        write_json(out / "config.json", self._config(config, rule))
        write_json(out / _GENAI_CONFIG, _genai_config(model, base, rule))
        copy_companions(base.folder, out)
        return written

    def inspect(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Inspection:
        """As `Exporter` says."""
        model = _graph(folder)
        strange = sorted({*_strange_functions(model), *_strange_operators(model), *_strange_files(model, folder)})
        expected = self._config(base.config, rule)
        found = atomic.read_json(folder / "config.json")
        settings = differing_keys(found, expected)
        if not same_json(atomic.read_json(folder / _GENAI_CONFIG), _genai_config(model, base, rule)):
            settings.append(_GENAI_CONFIG)
        stored = {name: value.const_value for name, value in model.graph.initializers.items()}
        wanted = tensors(rule, vectors(rule, base))
        wrong = [name for name, value in wanted.items() if not _equal(stored.get(name), value)]
        changed = changed_companions(folder, base.folder)
        page = web_page.differing(folder / GRAPH, folder) if self.page else []
        own = {GRAPH, GRAPH_DATA, "config.json", _GENAI_CONFIG, *(web_page.FILES if self.page else ())}
        return Inspection(
            Check.empty("operators or files that are not the library's", strange),
            Check.empty("config entries that differ", settings),
            (
                Check.empty("files of the base that differ", changed),
                Check.empty("steering tensors that differ", wrong),
                *([Check.empty("files of the page that differ", page)] if self.page else []),
                unknown_files(folder, base.folder, own),
            ),
        )

    def made_anew(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Sequence[Check]:
        """As `Remaking` says: a graph may compute anything on prompts that the comparison does not try."""
        name = "operators or weights other than a fresh export's"
        with TemporaryDirectory() as scratch:
            graph = Path(scratch) / GRAPH
            try:
                self._write_steered(rule, base, graph)
            except (AdarasError, OSError) as error:
                return [Check(name, 1, 0, f"none can be made here: {first_line(error)}")]
            self._inline(graph)
            other = comparison.differing(folder / GRAPH, graph)
            if not same_content(folder / GRAPH_DATA, Path(scratch) / GRAPH_DATA):
                other.append(GRAPH_DATA)
            return [Check.empty(name, other)]

    def reference(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Reference:
        """As `Exporter` says: with fewer bits, vectors folded from the base's weights on a base with rounded ones."""
        if self.precision == "fp32":
            return stock_reference(rule, base)
        with TemporaryDirectory() as scratch:
            repository = Path(scratch) / "reference"  # Transformers keeps the code of each name that it has met
            repository.mkdir()
            thin.EXPORTER.write(rule, base, repository)
            opened: Any = exporter.open_repository(repository)
        if self.precision == "fp16":
            quantize.round_to_half(opened.model)
        else:
            quantize.overwrite(opened.model, _graph(folder))
        return Reference(opened, *sizes_of(opened.model))

    def load(self, folder: Path) -> Artifact:
        """As `Exporter` says."""
        return SteeredGraph(folder / GRAPH, self._tolerance())

    def _recorded(self) -> Mapping[str, Any]:
        return {"precision": self.precision, "inline": self.inline, "genai": self.genai, "page": self.page}

    def _entries(self, folder: Path, _base_tensors: Mapping[str, str]) -> Sequence[Disclosed]:
        names = [GRAPH, *([web_page.GRAPH] if self.page else [])]
        return manifest.disclosed({name: _graph(folder, name) for name in names})

    def _tolerance(self) -> Tolerance:
        return _FLOAT16 if self.precision == "fp16" else _FLOAT32

    def _write_steered(self, rule: SteeringRule, base: Checkpoint, graph: Path) -> ir.Model:
        """Write the graph, with the rule in it, and its weights into a folder that does not exist yet."""
        graph.parent.mkdir()
        if self.genai:
            build_graph(base.folder, graph, rule.base.family)
        else:
            self._write_plain(base, graph)
        model = ir.load(graph)
        steer(model, rule, vectors(rule, base))
        ir.save(model, graph)  # the weights stay in their file
        return model

    def _inline(self, graph: Path) -> None:
        if self.inline:
            onnx.save(inline_local_functions(onnx.load(graph, load_external_data=False)), graph)

    def _write_plain(self, base: Checkpoint, graph: Path) -> None:
        from transformers import AutoModelForCausalLM

        dtype = torch.float16 if self.precision == "fp16" else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype)
        if self.precision not in _BITS:
            graphs.plain_graph(model, graph)
            return
        with TemporaryDirectory(dir=graph.parent) as scratch:
            plain = Path(scratch) / graph.name
            graphs.plain_graph(model, plain)
            del model
            quantised = ir.load(plain)  # whose weights are read from the file, one by one
            quantize.quantise(quantised, _BITS[self.precision])
            ir.save(quantised, graph, external_data=DATA_FILE)

    def _gate_prompts(self, rule: SteeringRule) -> Prompts | None:
        """What the gate is asked, where its decisions may differ from those that the rule was made with."""
        if rule.gate is None and self.calibration is not None:
            raise ExportError("onnx: calibration of a rule without a gate, which has no threshold")
        if rule.gate is None or self.precision == "fp32":
            return None
        return Prompts.of(self.calibration)

    def _config(self, config: dict[str, Any], rule: SteeringRule) -> dict[str, Any]:
        """The base's config.json; with a gate, it counts the layer of the KV cache that the gate's state is in.

        Transformers.js takes the number of layers from there.
        """
        settings = exporter.settings_of(rule) | {"precision": self.precision}
        steered = {**config, "adaras": settings}
        if rule.gate is not None:
            layers = families.FAMILIES[rule.base.family].sizes[0]
            steered[layers] = config[layers] + 1
            if "layer_types" in config:
                steered["layer_types"] = [*config["layer_types"], "full_attention"]
        # Its name for the file without a suffix; types it takes from the graph.
        steered["transformers.js_config"] = {"dtype": "fp32", "use_external_data_format": True}
        return steered


EXPORTER = OnnxExporter()


def _genai_config(model: ir.Model, base: Checkpoint, rule: SteeringRule) -> dict[str, Any]:
    path = base.folder / "generation_config.json"
    generation = atomic.read_json(path) if path.exists() else {}
    config = base.config
    return genai_config(model, config, generation, rule.base.family, GRAPH)


def _require_tokenizer(base: Path) -> None:
    if not (base / "tokenizer.json").exists():
        raise ExportError(
            f"{base}: no tokenizer.json; expected a fast tokenizer, which the runtimes need: write one with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def _graph(folder: Path, name: str = GRAPH) -> ir.Model:
    path = folder / name
    try:
        safe_read.size_of(path, _LARGEST_GRAPH)
        return ir.load(path)
    except Exception as error:  # protobuf's own errors, a missing file, a field that onnx-ir does not know
        raise ArtifactError(f"{path}: {first_line(error)}; expected an ONNX graph") from error


def _strange_functions(model: ir.Model) -> list[str]:
    own = {name: ir.serde.deserialize_function(proto) for name, proto in functions.functions().items()}
    return [
        f"{domain}.{name}"
        for (domain, name, _), function in model.functions.items()
        if name not in own or manifest.text(function) != manifest.text(own[name])
    ]


def _strange_operators(model: ir.Model) -> list[str]:
    """Operators that only a library of somebody's could run; a graph of ONNX' own can compute, but nothing else."""
    known = {"", "ai.onnx", "com.microsoft", functions.DOMAIN}
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return [f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in known]


def _strange_files(model: ir.Model, folder: Path) -> list[str]:
    stored = (value.const_value for value in model.graph.initializers.values())
    files = {str(one.location) for one in stored if isinstance(one, ir.ExternalTensor)}
    present = {DATA_FILE} if (folder / GRAPH).with_name(DATA_FILE).is_file() else set()
    return sorted(files - present)


def _equal(found: Any, expected: Array) -> bool:  # noqa: ANN401 - a tensor, or None
    if found is None or tuple(found.shape) != expected.shape:
        return False
    values = manifest.numbers(found)
    return values is not None and np.array_equal(values, expected) and values.dtype == expected.dtype
