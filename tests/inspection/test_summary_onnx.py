"""`llmkit inspect` of graphs: those of other programs, tied heads with offsets, caches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmkit.api import save
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.cli.app import main
from llmkit.inspection.summary import summarize
from llmkit.onnx.export import export

ROOT = Path(__file__).resolve().parents[2]


def saved(folder, nodes, tensors, *, cache_dims=4):
    """A graph as another program writes it: weights inside it, no entry of llmkit's."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    shape = ["batch_size", 2, "past_sequence_length", cache_dims]
    past = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, shape)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", 96])
    held = [numpy_helper.from_array(values, name) for name, values in tensors.items()]
    graph = helper.make_graph(nodes, "main", [ids, past], [logits], held)
    folder.mkdir()
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, producer_name="another"), folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps({"architectures": ["OkapiForCausalLM"]}))
    return folder


def test_weights_inside_a_foreign_graph(tmp_path, capsys):
    rng = np.random.default_rng(0)
    weights = {"embed": rng.random((96, 64), np.float32), "onnx::MatMul_7": rng.random((64, 96), np.float32),
               "norm": np.ones(64, np.float32), "axes": np.array([1, 2], np.int64)}  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["x"]),
        helper.make_node("Mul", ["x", "norm"], ["y"]),
        helper.make_node("MatMul", ["y", "onnx::MatMul_7"], ["logits"]),
    ]
    folder = saved(tmp_path / "out", nodes, weights)
    found = summarize(open_checkpoint(folder))
    assert found.n_parameters == 2 * 96 * 64 + 64
    assert found.dtypes == {"F32": 4 * found.n_parameters, "I64": 16}
    assert found.nbytes == sum(a.nbytes for a in weights.values())
    assert found.files == {"model.onnx": (folder / "model.onnx").stat().st_size}
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "parameters    12.35 k  (12,352)\nstored        49.4 kB in 1 file, F32 49.4 kB, I64 16 B\n" in shown
    assert "weights in  model.onnx: 49.4 kB of weights and constants\n" in shown
    assert "part  tensors" not in shown
    assert "\nother ops  Gather 1, Mul 1, MatMul 1\n" in shown


def test_integers_of_a_foreign_graph_are_counted_as_matrices(tmp_path):
    codes = np.zeros((96, 2, 16), np.uint8)
    tensors = {"w": codes, "scales": np.ones((96, 2), np.float32), "table": np.zeros((96, 32), np.uint8),
               "steps": np.ones((96, 2), np.float32)}  # fmt: skip
    nodes = [
        helper.make_node("GatherBlockQuantized", ["table", "input_ids", "steps"], ["x"], domain="com.microsoft",
                         bits=4, block_size=32),
        helper.make_node("MatMulNBits", ["x", "w", "scales"], ["logits"], domain="com.microsoft",
                         K=64, N=96, bits=4, block_size=32),
    ]  # fmt: skip
    found = summarize(open_checkpoint(saved(tmp_path / "out", nodes, tensors)))
    assert found.n_parameters == 2 * 96 * 64
    assert found.quantization == (
        "1 × int4 blocks of 32 symmetric, rows of a table; 1 × int4 blocks of 32 symmetric, accuracy level 0"
    )


@pytest.mark.parametrize(("dims", "nbytes"), [(4, 2 * 4 * 4), ("kv_cache_dim", None)])
def test_bytes_of_a_cache_only_where_its_sizes_are_stated(tmp_path, capsys, dims, nbytes):
    nodes = [helper.make_node("Identity", ["input_ids"], ["logits"])]
    folder = saved(tmp_path / "out", nodes, {"w": np.ones((2, 2), np.float32)}, cache_dims=dims)
    cache = summarize(open_checkpoint(folder)).details["onnx"]["kv_cache"]
    assert cache == {"dtype": "FLOAT", "nbytes_per_token": nbytes}
    assert main(["inspect", str(folder)]) == 0
    line = "keys and values in FLOAT" + ("" if nbytes is None else f", {nbytes} B a token")
    assert f"cache       {line}\n" in capsys.readouterr().out


def test_a_tied_head_with_offsets_says_so(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests" / "onnx"), *sys.path])
    from gguf_models import written

    path = written(tmp_path, lambda name: "Q4_K", tie_word_embeddings=True)
    save(export(open_checkpoint(path)), tmp_path / "out")
    quantized = summarize(open_checkpoint(tmp_path / "out")).quantization
    assert quantized is not None
    assert {text.split(" × ")[1] for text in quantized.split("; ")} == {
        "int4 blocks of 32 with offsets, accuracy level 4",
        "int4 blocks of 32 with offsets, rows of a table",
    }
    assert sum(int(text.split(" × ")[0]) for text in quantized.split("; ")) == 16  # 14, the head, the embedding


def test_ops_take_a_few_lines(tmp_path, capsys):
    base = ROOT / "evalsets" / "mini" / "base"
    options = ["--kv-cache-dtype", "int8", "--no-check", "-q", "-o", str(tmp_path / "out")]
    assert main(["export", str(base), *options]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    ops = shown[shown.index("fused ops") :].partition("\n\n")[0].splitlines()
    assert all(len(line) <= 80 for line in ops)
    assert len(ops) < 8
    assert "GroupQueryAttention 4" in " ".join(ops)
    assert "cache       keys and values in INT8, 512 B a token\n" in shown  # 4 layers, 2 heads of 32 dims, both
    wanted = summarize(open_checkpoint(base)).n_parameters
    assert summarize(open_checkpoint(tmp_path / "out")).n_parameters == wanted  # scales of a cache are none
