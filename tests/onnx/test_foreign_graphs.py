"""Graphs of other programs: inputs and outputs by name, of whatever type and order; beside numpy on the same tables."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from llmkit.checkpoint.checkpoint import open_checkpoint  # noqa: E402
from llmkit.errors import InputError  # noqa: E402
from llmkit.onnx.opening import load_onnx  # noqa: E402

WORDS = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
PAST = ["batch", 1, "past", 16]
SIZES = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "all"], "position_ids": ["batch", "sequence"]}
IDS = torch.tensor([[5, 6, 7], [9, 10, 11]])


def folder(path, shapes=SIZES, types=None, logits=TensorProto.FLOAT, is_last=False, has_default=False):
    """A graph of one table: its logits are the words' rows, plus the positions, plus the mask's mean."""
    kinds = dict.fromkeys(shapes, TensorProto.INT64) | (types or {})
    ports = [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in shapes.items()]
    ports.append(helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, PAST))
    held = [numpy_helper.from_array(WORDS, "words"), numpy_helper.from_array(np.array([1]), "one"),
            numpy_helper.from_array(np.array([2]), "two")]  # fmt: skip
    if has_default:
        ports.append(helper.make_tensor_value_info("words", TensorProto.FLOAT, [16, 16]))
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["rows"]),
        helper.make_node("Unsqueeze", ["rows", "one"], ["new"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
    ]
    total = "rows"
    for name in list(shapes)[1:]:
        nodes.append(helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT))
        if name == "attention_mask":
            nodes.append(helper.make_node("ReduceMean", [f"{name}.float"], [f"{name}.mean"], axes=[1], keepdims=1))
        column = f"{name}.mean" if name == "attention_mask" else f"{name}.float"
        nodes.append(helper.make_node("Unsqueeze", [column, "two"], [f"{name}.column"]))
        nodes.append(helper.make_node("Add", [total, f"{name}.column"], [f"{name}.sum"]))
        total = f"{name}.sum"
    nodes.append(helper.make_node("Cast", [total], ["logits"], to=logits))
    outputs = [helper.make_tensor_value_info("logits", logits, ["batch", "sequence", 16]),
               helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ["batch", 1, "all", 16])]  # fmt: skip
    graph = helper.make_graph(nodes, "g", ports, outputs[::-1] if is_last else outputs, held)
    path.mkdir(exist_ok=True)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, path / "model.onnx")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
    return path


def expected(has_positions=True):
    return WORDS[IDS.numpy()] + (np.arange(3)[None, :, None] if has_positions else 0) + 1


def without(name):
    return {k: v for k, v in SIZES.items() if k != name}


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"is_last": True},
        {"has_default": True},
        {"types": dict.fromkeys(SIZES, TensorProto.INT32)},
        {"types": {"attention_mask": TensorProto.FLOAT}},
        {"types": {"attention_mask": TensorProto.BOOL}},
        {"shapes": SIZES | {"input_ids": [1, "sequence"], "position_ids": [1, "sequence"]}},
        {"logits": TensorProto.FLOAT16},
        {"logits": TensorProto.DOUBLE},
    ],
)
def test_logits(tmp_path, made):
    logits = load_onnx(folder(tmp_path / "m", **made))(IDS)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), expected(), atol=1e-2 if made.get("logits") == 10 else 1e-6)


@pytest.mark.parametrize(
    ("made", "word"),
    [
        ({"shapes": SIZES | {"input_ids": [4, "sequence"]}}, r"input_ids is of shape \[4"),
        ({"shapes": SIZES | {"input_ids": ["batch", 8]}}, "input_ids is of shape .*8"),
        ({"shapes": SIZES | {"attention_mask": ["batch", "all", 1]}}, "attention_mask is of shape"),
        ({"logits": TensorProto.INT64}, "logits are int64"),
    ],
)
def test_what_cannot_be_run_is_told_at_once(tmp_path, made, word):
    with pytest.raises(InputError, match=word):
        load_onnx(folder(tmp_path / "m", **made))


def test_padding_needs_a_mask(tmp_path):
    model = load_onnx(folder(tmp_path / "m", shapes=without("attention_mask")))
    np.testing.assert_allclose(model(IDS).numpy(), expected() - 1, atol=1e-6)
    with pytest.raises(InputError, match="attention_mask"):
        model(IDS, mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))


def test_weights_under_usual_names_go_before_a_graph_with_others(tmp_path):
    beside = folder(tmp_path / "m")
    save_file({"model.embed_tokens.weight": WORDS}, beside / "model.safetensors")
    ckpt = open_checkpoint(beside)
    assert list(ckpt.tensors) == ["model.embed_tokens.weight"]
    assert any("model.onnx" in warning for warning in ckpt.warnings)


@pytest.mark.parametrize("name", ["decoder_model.onnx", "onnx/model_q4.onnx"])
def test_a_graph_under_another_name(tmp_path, name):
    made = folder(tmp_path / "m")
    (made / "onnx").mkdir()
    (made / "model.onnx").rename(made / name)
    with pytest.raises(InputError, match=f"{name} is a graph.*read as model.onnx"):
        open_checkpoint(made)
