"""Quantized checkpoints keep their integers in the graph: the weights are what compressed-tensors and gguf restore.

A layer's matrix is taken out of the exported folder and restored in numpy here; the other side is the library.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import onnx_ir
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from llmkit.api import save
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.quantized import dequantized
from llmkit.decoder.contract import random_checkpoint
from llmkit.onnx.export import computed_weights, export
from llmkit.onnx.parity import compare_decoders
from llmkit.onnx.precision import Precision
from llmkit.tensors.spec import DType
from llmkit.transforms.quantize import quantize

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
from tiny_graphs import PLUGINS, exported_decoders

from tests.published import write_published

SHAPES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def tiny(tmp_path, **changes):
    """A tiny llama on disk."""
    config = PLUGINS["llama"].tiny_config(None) | SHAPES | {"head_dim": 16} | changes
    folder = tmp_path / "float"
    save(random_checkpoint(PLUGINS["llama"], config), folder)
    return open_checkpoint(folder)


def parts_in(folder: Path):
    """Initializers of a folder by name. Read by place: onnx and onnx-ir refuse files that are hard-linked."""
    graph = onnx_ir.load(folder / "model.onnx").graph
    found = {}
    for name, value in graph.initializers.items():
        held = value.const_value
        if isinstance(held, onnx_ir.ExternalTensor):
            data = (folder / held.location).read_bytes()[held.offset : held.offset + held.length]
            found[name] = np.frombuffer(data, dtype=held.dtype.numpy()).reshape(held.shape.numpy())
    return found, graph


def matrices_in(folder: Path):
    """The float matrices that the integers of a folder stand for, by the name of the weight."""
    parts, graph = parts_in(folder)
    nodes = {}
    for node in graph:
        if node.op_type == "MatMulNBits":
            shaped = node.inputs[1].producer()  # a tied head sees the table in blocks
            nodes[(shaped.inputs[0] if shaped is not None else node.inputs[1]).name] = node
    found = {}
    for name, node in nodes.items():
        about = {name: a.value for name, a in node.attributes.items()}
        bits, k, n = about["bits"], about["K"], about["N"]
        codes, stem = parts[name], name.removesuffix("codes")
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], -1)
        codes = codes.reshape(n, -(-k // about["block_size"]), -1)
        scales = parts[f"{stem}scales"].astype(np.float32)
        zeros = np.full(scales.shape, 1 << (bits - 1))
        if f"{stem}zeros" in parts:
            zeros = parts[f"{stem}zeros"]
            if bits == 4:
                zeros = np.stack([zeros & 15, zeros >> 4], -1).reshape(n, -1)[:, : scales.shape[1]]
        values = (codes.astype(np.float32) - zeros.astype(np.float32)[..., None]) * scales[..., None]
        found[stem.removesuffix("_")] = values.reshape(n, -1)[:, :k]
    return found


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, "channel"), (8, "channel"), (8, 32)], ids=lambda x: str(x))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_weights(tmp_path, bits, group, symmetric, dtype):
    ckpt = tiny(tmp_path, torch_dtype=dtype)
    save(quantize(ckpt, bits=bits, group_size=group, symmetric=symmetric), tmp_path / "q")
    ckpt = open_checkpoint(tmp_path / "q")
    plan = export(ckpt)
    assert plan.notes[0].startswith("14 matrices stay on the grid that they are stored on (int")
    save(plan, tmp_path / "out")
    wanted = dequantized(ckpt, dtype=DType.F32).tensors
    found = matrices_in(tmp_path / "out")
    assert len(found) == 14
    for name, matrix in found.items():
        assert np.array_equal(matrix, wanted[name].load().numpy()), name
    differences = compare_decoders(*exported_decoders(tmp_path / "out", computed_weights(ckpt)))
    assert all(d.largest <= 1e-5 for d in differences), differences


def test_packed_words_stay_in_their_file(tmp_path):
    """Groups that are blocks: the words of compressed-tensors are the codes of MatMulNBits, byte for byte."""
    save(quantize(tiny(tmp_path), bits=4, group_size=32, symmetric=True), tmp_path / "q")
    plan = export(open_checkpoint(tmp_path / "q"))
    assert plan.tensors == {}
    save(plan, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").samefile(tmp_path / "q" / "model.safetensors")


def test_signed_int8(tmp_path):
    """`int-quantized`: int8 as numbers, written anew with 128 added."""
    ckpt = tiny(tmp_path)
    made = quantize(ckpt, bits=8, group_size="channel", symmetric=True)
    save(made, tmp_path / "q")
    packed = open_checkpoint(tmp_path / "q")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "q" / "model.safetensors")
    for name in [n for n in tensors if n.endswith("weight_packed")]:
        stem = name.removesuffix("_packed")
        n_in = int(tensors.pop(f"{stem}_shape")[1])
        tensors[stem] = unpack_from_int32(tensors.pop(name), 8, (0, n_in)).contiguous()
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["format"] = "int-quantized"
    (tmp_path / "i").mkdir()
    save_file(tensors, tmp_path / "i" / "model.safetensors")
    (tmp_path / "i" / "config.json").write_text(json.dumps(config))
    save(export(open_checkpoint(tmp_path / "i")), tmp_path / "out")
    wanted = dequantized(packed, dtype=DType.F32).tensors
    for name, matrix in matrices_in(tmp_path / "out").items():
        assert np.array_equal(matrix, wanted[name].load().numpy()), name


def test_zero_points_between_two_codes(tmp_path):
    """HQQ's: they become offsets of the blocks."""
    tiny(tmp_path)
    ckpt = open_checkpoint(write_published(tmp_path / "float", tmp_path / "q", "hqq"))
    plan = export(ckpt, dtype="float32")
    assert plan.notes[0].startswith("14 matrices stay on the grid that they are stored on (int4 group 32 asymmetric)")
    save(plan, tmp_path / "out")
    differences = compare_decoders(*exported_decoders(tmp_path / "out", dequantized(ckpt, dtype=DType.F32)))
    assert all(d.largest <= 1e-5 for d in differences), differences


def test_columns_in_another_order_become_floats(tmp_path):
    save(quantize(tiny(tmp_path), bits=4, group_size=32), tmp_path / "q")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "q" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight_g_idx"
    tensors[name] = torch.arange(64, dtype=torch.int32) % 2
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    ckpt = open_checkpoint(tmp_path / "q")
    plan = export(ckpt)
    said = "1 quantized matrix becomes floats (1 int4 group 32 asymmetric, columns in another order: model.layers.0."
    assert said in " ".join(plan.notes)
    save(plan, tmp_path / "out")
    assert len(matrices_in(tmp_path / "out")) == 13
    differences = compare_decoders(*exported_decoders(tmp_path / "out", dequantized(ckpt)))
    assert all(d.largest <= 1e-5 for d in differences), differences


def test_other_bits_are_rounded_a_second_time_and_said(tmp_path):
    save(quantize(tiny(tmp_path), bits=8, group_size="channel"), tmp_path / "q")
    ckpt = open_checkpoint(tmp_path / "q")
    notes = " ".join(export(ckpt, precision=Precision(4, 32)).notes)
    assert "14 matrices were on another grid" in notes
    assert "14 matrices to int4 group 32 asymmetric" in notes
    assert "stay on the grid" in " ".join(export(ckpt, precision=Precision(8)).notes)


@pytest.mark.parametrize(("kind", "bits"), [("q4_0", 4), ("q8_0", 8)])
def test_gguf_blocks(tmp_path, kind, bits):
    """Rows of q and k are in another order in these files: codes and scales follow them."""
    from llmkit.transforms.convert.convert import convert

    config = PLUGINS["llama"].tiny_config(None) | SHAPES | {"head_dim": 16, "tie_word_embeddings": True}
    architecture = PLUGINS["llama"]
    source = random_checkpoint(architecture, config)
    save(convert(source, to="gguf", type=kind), tmp_path / "g")
    path = next((tmp_path / "g").glob("*.gguf"))
    ckpt = open_checkpoint(path)
    plan = export(ckpt)
    # llama.cpp's preset has Q8_0 for the output, here the embedding, where 256 does not divide a row.
    kinds = "Q8_0, Q4_0" if kind == "q4_0" else "Q8_0"
    assert f"({kinds}), bit for bit" in plan.notes[0]
    save(plan, tmp_path / "out")
    found = matrices_in(tmp_path / "out")
    raw = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for i in range(config["num_hidden_layers"]):
        for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
            tensor = raw[f"blk.{i}.{theirs}.weight"]
            assert tensor.tensor_type.name == kind.upper()
            wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(found[f"model.layers.{i}.{ours}.weight"], wanted)
    for name, matrix in found.items():  # q and k, in the order of transformers
        assert np.array_equal(matrix.reshape(-1), ckpt.tensors[name].load().numpy().reshape(-1)), name
    differences = compare_decoders(*exported_decoders(tmp_path / "out", ckpt))
    assert all(d.largest <= 1e-5 for d in differences), differences
