"""The projections of a plain graph in 8 or 4 bits, and the same weights put into a PyTorch model.

Every MatMul whose weight is its own becomes a MatMulNBits of ONNX Runtime's, in symmetric blocks of 32; so does the
Gemm of GPT-2, whose bias an Add keeps. Embeddings, norms and biases stay as they are, and so does a tied lm_head: in
fewer bits it would be a second copy of a matrix that has to stay. Knows nothing of steering: a rule that is put into
the graph afterwards keeps its vectors, folded from the base's weights, and the gate its float32 weights.

K inputs and N outputs of a projection, G = ceil(K / 32) blocks of a row.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaras_export.errors import ArtifactError, ExportError
from adaras_export.files.safetensors_record import Array

BLOCK = 32
_DOMAIN, _OPERATOR = "com.microsoft", "MatMulNBits"

# At least float32 activations. 4 would let a runtime round them to 8 bits: measured, 0.5 % of the largest output,
# where 1 is as exact as a float32 MatMul. Without the attribute a runtime may choose.
_ACCURACY_LEVEL = 1


def quantise(model: ir.Model, bits: int) -> None:
    """Replace the weights of ``model`` by integers of so many bits, in place, one at a time.

    Raises:
        ExportError: there is no projection.
    """
    found = [node for node in model.graph if _has_own_weight(node)]
    if not found:
        raise ExportError("the graph has no MatMul with a weight of its own; choose precision fp16")
    quantiser = _quantiser(bits)
    for node in found:
        _quantise_node(model.graph, node, quantiser, bits)
    model.opset_imports[_DOMAIN] = 1


def overwrite(model: nn.Module, graph: ir.Model) -> None:
    """Give the modules of ``model`` the weights of the MatMulNBits of ``graph``; replaces parameters, writes into none.

    Raises:
        ArtifactError: a node belongs to no module or to one that another has changed, or a weight is further from the
            module's than a rounding.
    """
    modules, seen = dict(model.named_modules()), set[str]()
    for one in _projections(graph):
        module: Any = modules.get(one.module)
        if one.module in seen or getattr(module, "weight", None) is None:
            raise ArtifactError(f"{one.node}: expected one {_OPERATOR} for a projection of the base")
        seen.add(one.module)
        is_transposed = isinstance(module, Conv1D)
        weight_NK, step_NK = torch.from_numpy(one.weight_NK), torch.from_numpy(one.step_NK)
        own_NK = (module.weight.T if is_transposed else module.weight).detach()
        # A weight may be a whole step off: with 4 bits, -8 steps can be said and +8 cannot.
        if own_NK.shape != weight_NK.shape or not bool(((own_NK - weight_NK).abs() <= 1.001 * step_NK).all()):
            raise ArtifactError(
                f"{one.node}: does not hold the base's {one.module}.weight; expected it within one step"
            )
        weight = (weight_NK.T if is_transposed else weight_NK).contiguous()
        module.weight = nn.Parameter(weight, requires_grad=False)


def round_to_half(model: nn.Module) -> None:
    """Give ``model`` the parameters that it would have in half precision, but for the steering's; writes into none."""
    for name, parameter in model.named_parameters():
        if "steering" not in name:
            parameter.data = parameter.detach().half().float()


def _has_own_weight(node: ir.Node) -> bool:
    if node.op_type == "Gemm":
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        if any(node.attributes[name].value != value for name, value in plain.items() if name in node.attributes):
            return False
    elif node.op_type != "MatMul":
        return False
    weight = node.inputs[1]
    assert weight is not None
    is_matrix = weight.is_initializer() and weight.shape is not None and len(weight.shape) == 2
    return is_matrix and len(weight.uses()) == 1 and bool(_module_of(node))


def _module_of(node: ir.Node) -> str:
    """The module path in a node's name: model.layers.0.mlp.down_proj for /model/layers.0/mlp/down_proj/MatMul."""
    return (node.name or "").rpartition("/")[0].strip("/").replace("/", ".")


def _quantiser(bits: int) -> Any:  # noqa: ANN401 - ONNX Runtime is not typed
    """ONNX Runtime's own. Its module sets up everybody's logging when it is imported, which is undone here."""
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    root.handlers[:] = handlers
    root.setLevel(level)
    config = library.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    return library.DefaultWeightOnlyQuantizer(config)


def _quantise_node(graph: ir.Graph, node: ir.Node, quantiser: Any, bits: int) -> None:  # noqa: ANN401
    entering, old = node.inputs[:2]
    assert old is not None
    assert old.const_value is not None
    weight_KN = old.const_value.numpy()
    packed, scales, _ = quantiser.qbits_block_quant(weight_KN)
    module, path = _module_of(node), str(node.name).rpartition("/")[0]
    stored = [
        _initializer(graph, f"{module}.weight_Q{bits}", packed),
        _initializer(graph, f"{module}.weight_scales", scales),
    ]
    sizes = {"K": weight_KN.shape[0], "N": weight_KN.shape[1], "bits": bits, "block_size": BLOCK}
    attributes = {**sizes, "accuracy_level": _ACCURACY_LEVEL}
    made = [
        ir.node(_OPERATOR, [entering, *stored], attributes=attributes, domain=_DOMAIN, name=f"{path}/{_OPERATOR}"),
        *(ir.node("Add", [None, bias], name=f"{path}/Add") for bias in node.inputs[2:]),
    ]
    if len(made) == 2:
        made[0].outputs[0].name = f"{module}.product"
        made[1].replace_input_with(0, made[0].outputs[0])
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, node.outputs, made[-1].outputs)
    graph.initializers.pop(str(old.name))


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    made = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(made)
    return made


@dataclass(frozen=True)
class _Projection:
    """What one node stores: (N, K) float32 weights and the size of a step at each of them."""

    node: str
    module: str
    weight_NK: Array
    step_NK: Array


def _projections(model: ir.Model) -> Iterator[_Projection]:
    for node in model.graph:
        if node.op_type == _OPERATOR:
            try:
                found = _projection(node)
            except (OSError, ValueError, KeyError, AttributeError) as error:  # cut off, or not as `quantise` writes it
                raise ArtifactError(f"{node.name}: its weight cannot be read ({error})") from error
            yield found


def _projection(node: ir.Node) -> _Projection:
    columns, bits = (node.attributes[name].as_int() for name in ("K", "bits"))
    packed, scales = (one.const_value.numpy() for one in node.inputs[1:3])  # type: ignore[union-attr]
    parts = [packed & 15, packed >> 4] if bits == 4 else [packed]
    value_NK = np.stack(parts, axis=-1).reshape(len(packed), -1).astype(np.float32) - 2 ** (bits - 1)
    scale_NK = np.repeat(scales.reshape(len(packed), -1), BLOCK, axis=1)
    weight_NK, step_NK = (value_NK * scale_NK)[:, :columns], np.abs(scale_NK)[:, :columns]
    return _Projection(str(node.name), _module_of(node), weight_NK, step_NK)
