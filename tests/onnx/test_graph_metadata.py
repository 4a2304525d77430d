"""Metadata of a graph that contradicts the graph, and ends that cannot be fed, are refused when it is opened."""

from __future__ import annotations

import json

import pytest

onnx = pytest.importorskip("onnx")

import torch  # noqa: E402

from llmkit.errors import InputError  # noqa: E402
from llmkit.onnx.memory import Memory  # noqa: E402
from llmkit.onnx.parts import Parts  # noqa: E402

SOUND = {
    "llmkit.hidden": "h", "llmkit.hidden_size": "4", "llmkit.dtype": "FLOAT",
    "llmkit.state": json.dumps({"past": "present", "sum": "next_sum"}),
}  # fmt: skip


def parts(logits=(onnx.TensorProto.FLOAT, [1, "t", 4]), **metadata: str) -> Parts:
    ports = [onnx.helper.make_tensor_value_info(n, 1, [1, 2, "t", 4]) for n in ("past", "present")]
    ports.append(onnx.helper.make_tensor_value_info("logits", *logits))
    ports += [onnx.helper.make_tensor_value_info(n, 1, [1, 2, 3, 4]) for n in ("sum", "next_sum")]
    nodes = [onnx.helper.make_node("Identity", ["h"], ["logits"])]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ports[::3], ports[1:3] + ports[4:]))
    onnx.helper.set_model_props(model, SOUND | {f"llmkit.{k}": v for k, v in metadata.items()})
    return Parts(model, lambda _: None, torch.device("cpu"))


def test_a_sound_one() -> None:
    memory = Memory(parts(initial='{"sum": 2}'))
    assert memory.pasts == ["past"]
    assert torch.equal(memory.state_value("sum", {}, 1, 0), torch.full((1, 2, 3, 4), 2.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden", "x"), ("hidden_size", "x"), ("hidden_size", "9" * 5000), ("dtype", "X"), ("state", "[]"),
        ("state", "{"), ("state", '{"x": "present"}'), ("state", '{"past": 1}'), ("state", "[" * 3000),
        ("initial", '{"past": 1}'), ("initial", '{"x": 1}'), ("initial", '{"sum": ["1"]}'),
    ],
)  # fmt: skip
def test_what_is_refused(key: str, value: str) -> None:
    with pytest.raises(InputError):
        Memory(parts(**{key: value}))


@pytest.mark.parametrize(
    "logits",
    [
        (1, None),
        (1, [1, "t"]),
        (1, [1, "t", "v"]),
        (8, [1, "t", 4]),
        (0, [1, "t", 4]),
        (1, [1, "t", 2**40]),
        (1, [1, "t", -4]),
    ],
)
def test_logits_that_cannot_be_read(logits) -> None:
    with pytest.raises(InputError, match="logits"):
        parts(logits)


@pytest.mark.parametrize("shape", [[1, 0, "t", 4], [1, 2, 7, 4], [1, 2, "t", "w"], [1, 2, "t"], None])
def test_keys_of_another_program_that_state_no_sizes(shape) -> None:
    value = onnx.helper.make_tensor_value_info
    ports = [
        value("past_key_values.0.key", 1, shape),
        value("present.0.key", 1, shape),
        value("logits", 1, [1, "t", 4]),
    ]
    nodes = [onnx.helper.make_node("Identity", ["h"], ["logits"])]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:]))
    with pytest.raises(InputError, match="heads, past, head size"):
        Memory(Parts(model, lambda _: None, torch.device("cpu")))
