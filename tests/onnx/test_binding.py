"""Sessions over torch tensors: what is bound stays bound, and nothing else is read or written in its place."""

from __future__ import annotations

import pytest
import torch
from onnx import TensorProto, helper

from llmkit.errors import InputError
from llmkit.onnx.binding import BoundSession

ort = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
CPU = torch.device("cpu")


@pytest.fixture
def doubling():
    """Y [m, 2] = X + X."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", 2]) for name in "XY"]
    graph = helper.make_graph([helper.make_node("Add", ["X", "X"], ["Y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return BoundSession(ort.InferenceSession(model.SerializeToString()), CPU)


def test_a_tensor_that_stays_is_bound_once(doubling, monkeypatch):
    x, y = torch.ones(3, 2), torch.zeros(3, 2)
    places, data_ptr = [], torch.Tensor.data_ptr
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: places.append(tensor) or data_ptr(tensor))
    for step in range(3):
        x.fill_(step)
        assert doubling.run({"X": x}, {"Y": y}, {})["Y"] is y
        assert torch.equal(y, torch.full((3, 2), 2.0 * step))
    assert len(places) == 2


def test_a_tensor_is_bound_again_after_another(doubling):
    """The output went to ONNX Runtime's own memory meanwhile, as its size was not known."""
    y = torch.zeros(1, 2)
    doubling.run({"X": torch.ones(1, 2)}, {"Y": y}, {})
    found = doubling.run({"X": torch.full((1, 2), 3.0)}, {}, {})["Y"]
    assert torch.equal(found, torch.full((1, 2), 6.0))
    assert torch.equal(y, torch.full((1, 2), 2.0))
    doubling.run({"X": torch.full((1, 2), 5.0)}, {"Y": y}, {})
    assert torch.equal(y, torch.full((1, 2), 10.0))


def test_what_is_not_in_order_is_copied_for_each_call(doubling):
    x = torch.arange(6.0).view(2, 3).t()
    for _ in range(2):
        assert torch.equal(doubling.run({"X": x}, {}, {"m": 3})["Y"], 2 * x)
        x += 1
    plain = torch.ones(3, 2)
    assert torch.equal(doubling.run({"X": plain}, {}, {"m": 3})["Y"], 2 * plain)
    assert torch.equal(doubling.run({"X": x}, {}, {"m": 3})["Y"], 2 * x)


def test_tensors_that_are_gone_are_not_taken_for_new_ones(doubling):
    """A new tensor may get the address, and Python's number, of one that is gone."""
    for n in range(1, 30):
        found = doubling.run({"X": torch.full((n, 2), float(n))}, {}, {"m": n})["Y"]
        assert torch.equal(found, torch.full((n, 2), 2.0 * n))


def test_empty_tensors(doubling):
    assert doubling.run({"X": torch.zeros(0, 2)}, {}, {"m": 0})["Y"].shape == (0, 2)


def test_what_the_nodes_do_not_take_is_refused(doubling):
    """ONNX Runtime's own errors are those of a graph, no bugs."""
    with pytest.raises(InputError, match="ONNX Runtime cannot run the graph"):
        doubling.run({"X": torch.ones(3, 5)}, {}, {"m": 3})
