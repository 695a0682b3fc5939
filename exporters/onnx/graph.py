"""The graph of target `onnx`: a base model as plain ONNX, and the surgery that puts a rule into it.

The surgery sees names only: it finds what enters and leaves each down projection by the module path that the nodes
carry, adds the vectors behind it, and lets the gate read the layers below. Weights stay where they are.

B sequences, S tokens of this call, A columns of the attention mask, P columns of the KV cache before this call,
F gate features, H gate width, L decoder layers.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from adaras_export.core import families
from adaras_export.core.gate import Gate
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ExportError, first_line
from adaras_export.exporters.onnx import functions
from adaras_export.exporters.onnx.session import STRENGTH, THRESHOLD
from adaras_export.files.safetensors_record import Array

OPSET = 23
DATA_FILE = "model.onnx_data"
_LAST_PROMPT_TOKEN = "steering_last_prompt_token"
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class CacheShape:
    """The KV cache of a model: (B, heads, columns, size) for keys and for values of each of its layers."""

    layers: int
    heads: int
    size: int


def cache_shape(model: nn.Module) -> CacheShape:
    """What one forward pass leaves in the KV cache.

    Raises:
        ExportError: the layers differ in shape, or there is no cache; a runtime could not carry it.
    """
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True).past_key_values
    layers = list(getattr(cache, "layers", ()))
    if any(hasattr(layer, "conv_states") or getattr(layer, "keys", None) is None for layer in layers):
        kind = model.config.model_type  # type: ignore[union-attr]
        raise ExportError(
            f"{_name(model)}: layers of {kind} have states of a convolution or of linear attention, or use the keys "
            "and values of other layers; expected keys and values of its own in each; choose target hf or peft"
        )
    shapes = {tuple(part.shape) for layer in layers for part in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise ExportError(f"{_name(model)}: KV cache of shapes {sorted(shapes)}; expected one shape for all layers")
    [(_, heads, _, size)] = shapes
    return CacheShape(len(cache.layers), heads, size)


def plain_graph(model: nn.Module, out: Path) -> None:
    """Write ``model`` as ONNX with a KV cache: ``out`` and, beside it, `DATA_FILE` with the weights.

    Inputs input_ids, attention_mask, position_ids and past_key_values.{layer}.{key,value}; outputs logits and
    present.{layer}.{key,value}, as Optimum, GenAI and Transformers.js name them.

    Raises:
        ExportError: torch cannot export it.
    """
    _require_constant_rotation(model)
    shape = cache_shape(model)
    pasts = [f"past_key_values.{layer}.{part}" for layer in range(shape.layers) for part in ("key", "value")]
    batch, tokens, past = 2, 3, 2  # any sizes but 0 and 1, which torch would take for constants
    example = {
        "input_ids": torch.ones(batch, tokens, dtype=torch.int64),
        "attention_mask": torch.ones(batch, past + tokens, dtype=torch.int64),
        "position_ids": torch.arange(past, past + tokens).repeat(batch, 1),
        "past": [torch.zeros(batch, shape.heads, past, shape.size, dtype=_dtype(model)) for _ in pasts],
    }
    dynamic = {  # Transformers.js makes the first, empty cache from these names: it takes any but batch_size for 0
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": {0: "batch_size", 1: "sequence_length"},
        "past": [{0: "batch_size", 2: "past_sequence_length"} for _ in pasts],
    }
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                _WithFlatCache(model),
                kwargs=example,
                dynamic_shapes=dynamic,
                input_names=["input_ids", "attention_mask", "position_ids", *pasts],
                output_names=["logits", *(name.replace("past_key_values", "present") for name in pasts)],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = first_line(error.__cause__ or error)
        raise ExportError(f"{_name(model)}: torch cannot export it to ONNX ({reason})") from error
    assert program is not None
    _name_by_module(program.model)
    _cast_to_scales(program.model)
    ir.save(program.model, out, external_data=DATA_FILE)


def _require_constant_rotation(model: nn.Module) -> None:
    """Refuse rotary frequencies that change with the length of the prompt: a graph has one set of them."""
    config: Any = model.config.to_dict()  # type: ignore[operator, union-attr]
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = {str(one.get("rope_type", one.get("type"))) for one in (found, *found.values()) if isinstance(one, dict)}
    if changing := sorted(kinds & {"dynamic", "longrope"}):
        raise ExportError(
            f"{_name(model)}: rotary frequencies of type {changing[0]} change with the length of the prompt; expected "
            "constant ones: default, linear, llama3 or yarn"
        )


class _WithFlatCache(nn.Module):
    """A causal language model whose KV cache is a list of tensors: key, value, key, value, ..."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return outputs.logits, [part for layer in cache.layers for part in (layer.keys, layer.values)]


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide what the exporter says of its own deprecations and of packages that it does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_by_module(model: ir.Model) -> None:
    """Name nodes by the module that they come from, as in /model/layers.0/mlp/down_proj/MatMul; drop the traces."""
    seen: dict[str, int] = {}
    for node in model.graph:
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
        node.metadata_props.clear()
        if len(scopes) < 2:
            continue
        path = scopes[-2].removeprefix("model").removeprefix(".")  # the wrapper's own name
        name = f"{_node_path(path)}/{node.op_type}"
        seen[name] = seen.get(name, 0) + 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    rename = {name: name.removeprefix("model.") for name in model.graph.initializers if name.startswith("model.")}
    for old, new in rename.items():
        if new not in model.graph.initializers:
            model.graph.initializers[old].name = new


def _cast_to_scales(model: ir.Model) -> None:
    """Give every RMSNormalization its input in the type of its scale: ONNX Runtime knows no mixture of types there.

    Gemma and OLMo 2 have a float32 scale for float16 activations.
    """
    for node in list(model.graph):
        if node.op_type != "RMSNormalization":
            continue
        entering, scale = node.inputs
        assert entering is not None
        assert scale is not None
        if scale.dtype is not None and entering.dtype != scale.dtype:
            cast = ir.node("Cast", [entering], attributes={"to": scale.dtype.value}, name=f"{node.name}_cast")
            cast.outputs[0].name = f"{entering.name}_cast_{node.name}"
            model.graph.insert_before(node, cast)
            node.replace_input_with(0, cast.outputs[0])


def _node_path(module: str) -> str:
    """A module's path as a path of nodes: /model/layers.0/mlp/down_proj for model.layers.0.mlp.down_proj."""
    return "".join(f".{part}" if part.isdigit() else f"/{part}" for part in module.split(".") if part)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _name(model: nn.Module) -> str:
    config: Any = model.config
    return str(config.name_or_path or type(model).__name__)


@dataclass(frozen=True)
class _Down:
    """One down projection in a graph: what enters it, and what leaves it."""

    entering: ir.Value
    leaving: ir.Value


def steer(model: ir.Model, rule: SteeringRule, vectors: dict[int, Array]) -> None:
    """Put ``rule`` into the plain graph of its base.

    Args:
        model: the graph; changed in place.
        rule: the rule.
        vectors: W_down[:, idx] @ delta of each steered layer, (D,) float32.

    Raises:
        ExportError: the graph is not a plain one of this base.
    """
    surgeon = _Surgeon(model, rule, tensors(rule, vectors))
    surgeon.run()
    model.graph.sort()
    for function in functions.functions().values():
        if function.name in surgeon.used:
            one = ir.serde.deserialize_function(function)
            model.functions[one.identifier()] = one
    model.opset_imports[functions.DOMAIN] = functions.VERSION


def tensors(rule: SteeringRule, vectors: dict[int, Array]) -> dict[str, Array]:
    """The initialisers that `steer` adds, by name: vectors, indices, the gate's weights as matrices, the dials."""
    layers = _layers(rule)
    last = rule.start == "last_prompt_token"
    found = {
        STRENGTH: np.asarray(rule.strength, np.float32),
        _LAST_PROMPT_TOKEN: np.asarray(last, np.float32),
        **{f"{layers}.{layer}.mlp.steering_vector": vector for layer, vector in vectors.items()},
    }
    if (gate := rule.gate) is not None:
        weights = gate.weights()
        shaped = {
            "attention_weight": weights["attention_weight"][:, None],
            "hidden_weight": np.ascontiguousarray(weights["hidden_weight"].T),
            "output_weight": weights["output_weight"][:, None],
        }
        prefix = f"{layers.rpartition('.')[0]}.steering_gate"
        found |= {f"{prefix}.{name}": value for name, value in {**weights, **shaped}.items()}
        found |= {
            f"{layers}.{layer}.mlp.steering_index": gate.index[gate.layer == layer] for layer in np.unique(gate.layer)
        }
        found[THRESHOLD] = np.asarray(gate.threshold, np.float32)
    return found


def _layers(rule: SteeringRule) -> str:
    """The module path of the list of decoder layers."""
    family = families.FAMILIES[rule.base.family]
    return f"{family.decoder}.{family.layers}"


def _shape(value: ir.Value) -> ir.Shape:
    assert value.shape is not None  # of an input of the plain graph
    return value.shape


class _Surgeon:
    """Adds nodes to one graph; ``stored`` are the tensors that they need, by name."""

    def __init__(self, model: ir.Model, rule: SteeringRule, stored: dict[str, Array]) -> None:
        self.graph = model.graph
        self.rule = rule
        self.stored = stored
        self.used: set[str] = set()
        self.inputs = {str(value.name): value for value in self.graph.inputs}
        self.layers = _layers(rule)
        self.down = families.FAMILIES[rule.base.family].down

    def run(self) -> None:
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        last = self._constant(_LAST_PROMPT_TOKEN)
        tokens, prompt, first = self._call("SteeredTokens", [ids, mask, last], ["tokens", "prompt", "first"])
        strength = self._dial(STRENGTH)
        scale = self._op("Mul", [tokens, strength], "scale_of_tokens")
        if self.rule.gate is not None:
            decision = self._gate(self.rule.gate, prompt, first)
            scale = self._op("Mul", [scale, decision], "scale")
        for layer in self.rule.layers():
            down = self._find(layer)
            where = f"{self.layers}.{layer}.mlp"
            vector = self._constant(f"{where}.steering_vector")
            [steered] = self._call("AdaptiveSteer", [down.leaving, scale, vector], ["steered"], where)
            steered.type, steered.shape = down.leaving.type, down.leaving.shape
            node = steered.producer()
            assert node is not None
            down.leaving.replace_all_uses_with(steered)
            node.replace_input_with(0, down.leaving)

    def _gate(self, gate: Gate, prompt: ir.Value, first: ir.Value) -> ir.Value:
        """Add the gate and its layer of the KV cache; the decision that steers this call, (B, 1, 1)."""
        features = []
        for layer in np.unique(gate.layer).tolist():
            where = f"{self.layers}.{layer}.mlp"
            index = self._constant(f"{where}.steering_index")
            features.append(self._op("Gather", [self._find(layer).entering, index], "features", where, axis=-1))
        joined = self._op("Concat", features, "features", axis=-1)
        prefix = f"{self.layers.rpartition('.')[0]}.steering_gate"
        weights = [self._constant(f"{prefix}.{name}") for name in gate.weights()]
        key, value = self._more_cache()
        _, heads, _, size = _shape(key)
        assert isinstance(heads, int)
        assert isinstance(size, int)
        if (hidden := len(gate.hidden_bias)) > heads * size - 2:
            raise ExportError(
                f"rule: a gate of {hidden} hidden units; expected at most {heads * size - 2}, as its state rides in a "
                "column of the KV cache; train a smaller one"
            )
        threshold = self._dial(THRESHOLD)
        decision, present_key, present_value = self._call(
            "ReasoningGate",
            [joined, self.inputs["attention_mask"], key, value, prompt, first, *weights, threshold],
            ["decision", "present_key", "present_value"],
        )
        for present, past in ((present_key, key), (present_value, value)):
            present.name = str(past.name).replace("past_key_values", "present")
            present.type = past.type
            batch, heads, _, size = _shape(past)
            present.shape = ir.Shape([batch, heads, "present_state", size])
            self.graph.outputs.append(present)
        if self.rule.causal:
            return decision
        [before] = self._call("PastDecision", [key, first], ["decision_before"])
        return before

    def _more_cache(self) -> tuple[ir.Value, ir.Value]:
        """Two more inputs like those of the last layer's KV cache; a runtime takes them for one more layer."""
        layer = sum(name.endswith(".key") for name in self.inputs)
        like = self.inputs[f"past_key_values.{layer - 1}.key"]
        key, value = (
            ir.Value(name=f"past_key_values.{layer}.{part}", shape=_shape(like), type=like.type)
            for part in ("key", "value")
        )
        self.graph.inputs.extend([key, value])
        return key, value

    def _find(self, layer: int) -> _Down:
        """What enters and leaves the down projection of a layer of the base, whatever nodes it is made of."""
        prefix = _node_path(f"{self.layers}.{layer}.{self.down}") + "/"
        nodes = [node for node in self.graph if (node.name or "").startswith(prefix)]
        inside = set(nodes)
        # The first input is the data; others are weights, or the shape of a Reshape.
        made = {value for node in nodes for value in node.outputs}
        entering = {value for node in nodes if (value := node.inputs[0]) is not None and value not in made}
        leaving = [
            value
            for node in nodes
            for value in node.outputs
            if any(use.node not in inside and use.node.domain != functions.DOMAIN for use in value.uses())
        ]
        if len(entering) != 1 or len(leaving) != 1:
            raise ExportError(
                f"layer {layer}: {len(entering)} values enter and {len(leaving)} leave {prefix} in the graph; expected "
                "one; this model's ONNX graph has another form than this library knows"
            )
        return _Down(entering.pop(), leaving[0])

    def _constant(self, name: str) -> ir.Value:
        tensor = ir.tensor(self.stored[name], name=name)
        made = ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(self.stored[name].shape), type=ir.TensorType(tensor.dtype)
        )
        self.graph.register_initializer(made)
        return made

    def _dial(self, name: str) -> ir.Value:
        """A number that a caller may feed; an initialiser that is an input too, so that none need."""
        made = self._constant(name)
        self.graph.inputs.append(made)
        return made

    def _call(self, function: str, inputs: list[ir.Value], outputs: list[str], where: str = "") -> list[ir.Value]:
        self.used.add(function)
        return self._add(function, inputs, outputs, where, functions.DOMAIN)

    def _op(self, op: str, inputs: list[ir.Value], output: str, where: str = "", **attributes: int) -> ir.Value:
        return self._add(op, inputs, [output], where, "", **attributes)[0]

    def _add(
        self, op: str, inputs: list[ir.Value], outputs: list[str], where: str, domain: str, **attributes: int
    ) -> list[ir.Value]:
        prefix = f"{where}.adaras" if where else "adaras"
        name = f"{_node_path(prefix)}/{outputs[0] if domain == '' else op}"
        node = ir.node(op, inputs, attributes=attributes, domain=domain, num_outputs=len(outputs), name=name)
        for value, name in zip(node.outputs, outputs, strict=True):
            value.name = f"{prefix}.{name}"
        self.graph.append(node)
        return list(node.outputs)
