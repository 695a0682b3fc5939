"""Concrete attacks on every reader, each refused in a line that names the file, what is wrong and what was expected."""

import numpy as np
import onnx
import pytest
from fuzz import attacks_on_tensors, attacks_on_text
from fuzz.readers import READERS, prepared, verdict
from onnx import TensorProto, helper

from adaras_export.exporters.onnx import exporter as onnx_target

TABLE = {**attacks_on_tensors.TABLE, **attacks_on_text.TABLE}
ATTACKS = [(name, attack) for name, attacks in TABLE.items() for attack in attacks]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attack"), ATTACKS, ids=[f"{name}: {attack}" for name, attack in ATTACKS])
def test_an_attack_is_refused_in_a_line_that_says_what_is_wrong(name, attack, tmp_path):
    content, said = TABLE[name][attack]
    error = verdict(READERS[name], prepared(READERS[name], tmp_path), content)
    assert error is not None
    with pytest.raises(type(error), match=said):
        raise error


def test_a_tensor_of_a_graph_whose_numbers_are_of_another_type_than_it_says_differs_from_any(tmp_path):
    """Found by atheris: onnx-ir asserts what the file says."""
    odd = TensorProto(name="odd", data_type=TensorProto.FLOAT, dims=[2], int32_data=[1, 2])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "odd"], ["y"])], "g", [x], [y], [odd])
    onnx.save(helper.make_model(graph), tmp_path / "odd.onnx")
    read = onnx_target._graph(tmp_path, "odd.onnx").graph.initializers["odd"].const_value
    assert not onnx_target._equal(read, np.array([1, 2], np.float32))
