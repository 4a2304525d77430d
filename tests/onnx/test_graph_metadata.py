"""Metadata of a graph that contradicts the graph is refused when it is opened."""

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
    "llmkit.state": json.dumps({"past": "present"}),
}  # fmt: skip


def parts(**metadata: str) -> Parts:
    ports = [onnx.helper.make_tensor_value_info(n, 1, [1, 2, "t", 4]) for n in ("past", "present", "logits")]
    nodes = [onnx.helper.make_node("Identity", ["h"], ["logits"])]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:]))
    onnx.helper.set_model_props(model, SOUND | {f"llmkit.{k}": v for k, v in metadata.items()})
    return Parts(model, lambda _: None, torch.device("cpu"))


def test_a_sound_one() -> None:
    assert Memory(parts()).pasts == ["past"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden", "x"), ("hidden_size", "x"), ("hidden_size", "9" * 5000), ("dtype", "X"), ("state", "[]"),
        ("state", "{"), ("state", '{"x": "present"}'), ("state", '{"past": 1}'), ("state", "[" * 3000),
        ("initial", '{"past": 1}'), ("initial", '{"past": ["1"]}'),
    ],
)  # fmt: skip
def test_what_is_refused(key: str, value: str) -> None:
    with pytest.raises(InputError):
        Memory(parts(**{key: value}))
