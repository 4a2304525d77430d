"""What `export --provider cuda` writes: no mask where flash kernels apply, and no op that CUDA lacks for the dtype.

Without a GPU the CPU runs the same float16 graph; that it is right there says that the graph is, not CUDA's kernels.
"""

from __future__ import annotations

import onnx
import pytest
from tiny_graphs import PLUGINS

from llmkit.api import save
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.errors import InputError
from llmkit.onnx.export import export
from llmkit.onnx.opening import load_onnx
from llmkit.onnx.parity import TOLERANCES, compare_decoders

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")


def exported(name, folder, **options):
    architecture = PLUGINS[name]
    ckpt = random_checkpoint(architecture, architecture.tiny_config())
    made = export(ckpt, provider="cuda", **options)
    save(made, folder)
    return onnx.load(folder / "model.onnx", load_external_data=False), ckpt, made.history[-1]


def attention_nodes(graph):
    return [n for n in graph.graph.node if n.op_type in ("GroupQueryAttention", "Attention", "MultiHeadAttention")]


@pytest.mark.parametrize(("name", "has_bias"), [("llama", False), ("mistral", False), ("bloom", True)])
def test_half_precision_has_a_mask_only_where_scores_have_biases(tmp_path, name, has_bias):
    graph, ckpt, _ = exported(name, tmp_path / "out", dtype="float16")
    nodes = attention_nodes(graph)
    assert {n.op_type for n in nodes} == {"GroupQueryAttention"}
    assert {len(n.input) > 10 and bool(n.input[10]) for n in nodes} == {has_bias}
    found = load_onnx(tmp_path / "out", threads=1)
    worst = {d.case: d.largest for d in compare_decoders(found, load_decoder(ckpt))}
    assert all(x <= TOLERANCES["float16"] for x in worst.values()), worst


def test_windows_are_the_ops_own(tmp_path):
    graph, *_ = exported("mistral", tmp_path / "out", dtype="float16")
    window = PLUGINS["mistral"].tiny_config()["sliding_window"]
    found = {a.i for n in attention_nodes(graph) for a in n.attribute if a.name == "local_window_size"}
    assert found == {window}


def test_float32_takes_the_standard_op(tmp_path):
    graph, *_ = exported("llama", tmp_path / "out")
    assert {n.op_type for n in attention_nodes(graph)} == {"Attention"}


@pytest.mark.parametrize("attention", ["gqa", "flash"])
def test_grouped_query_attention_in_float32_is_refused(tmp_path, attention):
    with pytest.raises(InputError) as caught:
        exported("llama", tmp_path / "out", attention=attention)
    assert str(caught.value) == (
        f"--attention {attention}: GroupQueryAttention on CUDA computes float16 and bfloat16, found float32"
    )
    assert caught.value.hint == "--dtype float16, or --attention attention"
    assert not (tmp_path / "out").exists()
