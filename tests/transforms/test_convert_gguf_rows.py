"""Names, rows and bits of the tensors in GGUF files: of the gguf library, and of plain torch."""

from __future__ import annotations

import re

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf import quants

from llmkit.tensors.spec import DType
from llmkit.transforms.convert import convert
from tests.transforms.test_convert_gguf import FAMILIES, tiny, values, written

# The table lacks W_pack, and has other names for what RWKV is mixed by and flash-linear-attention calls so.
RENAMED = ("baichuan", "rwkv6", "rwkv7")


@pytest.mark.parametrize("name", [n for n in FAMILIES if not n.startswith(RENAMED)])
def test_names_are_those_of_the_librarys_table(tmp_path, name):
    """`gguf.TensorNameMap` knows by itself what each of transformers' names becomes."""
    ckpt = tiny(name)
    file = written(ckpt, tmp_path / "out")
    arch = file.fields["general.architecture"].contents()
    arch = {"deepseek32": "glm-dsa"}.get(arch, arch)  # which llama.cpp knows before the library does
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    table = gguf.get_tensor_name_map(kind, ckpt.config.get("num_hidden_layers", 4))
    stored = {t.name for t in file.tensors}
    expected = set()
    if name == "gemma3n":  # layers that take keys of others have some in published files, and must have them in these
        expected |= {f"blk.{i}.attn_{part}.weight" for i in (20, 21) for part in ("k", "k_norm", "v")}
    for tensor in ckpt.tensors:
        if tensor.endswith("attention.wqkv.weight"):  # its converter takes them apart first
            expected |= {f"blk.{tensor.split('.')[2]}.attn_{part}.weight" for part in "qkv"}
            continue
        if "act_fn" in tensor:  # metadata
            continue
        if tensor.endswith("kv_b_proj.weight") and "attn.k_b" in FAMILIES[name].gguf.slots:  # its converter halves them
            expected |= {f"blk.{tensor.split('.')[2]}.attn_{part}_b.weight" for part in "kv"}
            continue
        if name == "granitehybrid" and "shared_mlp" in tensor:  # and these are no experts without others
            parts = ("gate", "up") if "input" in tensor else ("down",)
            expected |= {f"blk.{tensor.split('.')[2]}.ffn_{part}.weight" for part in parts}
            continue
        if tensor.endswith("in_proj_qkvz.weight"):
            expected |= {f"blk.{tensor.split('.')[2]}.attn_{part}.weight" for part in ("qkv", "gate")}
            continue
        tensor = re.sub(r"\.experts\.\d+\.", ".experts.", tensor)  # its converter stacks them first
        tensor = re.sub(r"((sinks|_proj)|(_proj)_(bias))$", lambda m: f"{m[2] or m[3]}.{m[4] or 'weight'}", tensor)
        if halves := re.search(r"(experts\.gate_up_proj|input_linear)(\.\w+)$", tensor):  # and halves these
            of = "shexp" if "shared" in tensor else "exps"
            expected |= {f"blk.{tensor.split('.')[2]}.ffn_{part}_{of}{halves[2]}" for part in ("gate", "up")}
            continue
        tensor = re.sub(r"(altup\w+projections)\.\d", r"\1", tensor)
        tensor = re.sub(r"((layer_scalar|correct_output_scale))$", r"\1.weight", tensor)
        tensor = tensor.replace("e_score_correction_bias", "e_score_correction.bias")  # and calls these so
        tensor = tensor.replace("feed_forward.expert_bias", "feed_forward.expert_bias.bias")
        tensor = re.sub(r"feed_forward(\.experts\.w\d)", r"block_sparse_moe\1", tensor)
        tensor = tensor.replace(".dt_bias", ".dt_proj.bias")
        # llama.cpp's converter leaves this prefix out for two families.
        spelled = (tensor, tensor.removeprefix("transformer."))
        names = [n for t in spelled if (n := table.get_name(t, (".weight", ".bias")))]
        assert names, tensor
        expected.add(names[0])
    assert stored - {"rope_freqs.weight"} == expected
    allowed = {gguf.TENSOR_NAMES[t].split(".")[-1] for t in gguf.MODEL_TENSORS[kind]}
    assert {re.sub(r"\.(weight|bias)$", "", n).split(".")[-1] for n in stored} <= allowed


def _interleaved(w, heads):
    return w.view(heads, 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def test_rows_of_llama_lie_as_meta_has_them(tmp_path):
    ckpt = tiny("llama", "attention-bias")
    stored = {t.name: values(t) for t in written(ckpt, tmp_path / "out").tensors}
    for part, heads in (("q", 4), ("k", 2)):
        for leaf in ("weight", "bias"):
            want = ckpt.tensors[f"model.layers.1.self_attn.{part}_proj.{leaf}"].load()
            assert torch.equal(stored[f"blk.1.attn_{part}.{leaf}"], _interleaved(want, heads))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("bloom", "transformer.h.1.self_attention.query_key_value"),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value"),
    ],
)
def test_heads_are_sorted_into_queries_keys_and_values(tmp_path, name, tensor):
    ckpt = tiny(name)
    stored = {t.name: values(t) for t in written(ckpt, tmp_path / "out").tensors}
    for leaf in ("weight", "bias"):
        w = ckpt.tensors[f"{tensor}.{leaf}"].load()
        of_heads = w.view(4, 3, 8, *w.shape[1:])
        assert torch.equal(
            stored[f"blk.1.attn_qkv.{leaf}"], torch.cat([of_heads[:, i].flatten(0, 1) for i in range(3)])
        )


def test_groups_of_falcon_are_sorted_and_its_norms_cross(tmp_path):
    ckpt = tiny("falcon40b")
    stored = {t.name: values(t) for t in written(ckpt, tmp_path / "out").tensors}
    w = ckpt.tensors["transformer.h.1.self_attention.query_key_value.weight"].load().view(2, 4, 8, 32)
    want = torch.cat([w[:, :-2].flatten(0, 2), w[:, -2].flatten(0, 1), w[:, -1].flatten(0, 1)])
    assert torch.equal(stored["blk.1.attn_qkv.weight"], want)
    assert torch.equal(stored["blk.1.attn_norm.weight"], ckpt.tensors["transformer.h.1.ln_mlp.weight"].load())
    assert torch.equal(stored["blk.1.attn_norm_2.weight"], ckpt.tensors["transformer.h.1.ln_attn.weight"].load())


def test_gpt2_is_transposed_and_gemma_adds_one(tmp_path):
    ckpt = tiny("gpt2")
    stored = {t.name: values(t) for t in written(ckpt, tmp_path / "a").tensors}
    assert torch.equal(stored["blk.0.ffn_up.weight"], ckpt.tensors["transformer.h.0.mlp.c_fc.weight"].load().T)
    assert torch.equal(stored["blk.0.attn_qkv.weight"], ckpt.tensors["transformer.h.0.attn.c_attn.weight"].load().T)
    ckpt = tiny("gemma3")
    stored = {t.name: values(t) for t in written(ckpt, tmp_path / "b").tensors}
    for name, ours in (("norm", "output_norm"), ("layers.1.self_attn.q_norm", "blk.1.attn_q_norm")):
        assert torch.equal(stored[f"{ours}.weight"], ckpt.tensors[f"model.{name}.weight"].load() + 1)


def test_head_norms_of_stablelm_are_stacked(tmp_path):
    ckpt = tiny("stablelm", "2-12b")
    stored = {t.name: values(t) for t in written(ckpt, tmp_path / "out").tensors}
    norms = [ckpt.tensors[f"model.layers.0.self_attn.q_layernorm.norms.{j}.weight"].load() for j in range(4)]
    assert torch.equal(stored["blk.0.attn_q_norm.weight"], torch.stack(norms))


@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16], ids=lambda d: d.name)
def test_bits_are_the_librarys(tmp_path, type_, dtype):
    ckpt = tiny("qwen2", dtype=dtype)
    kind = Q[type_.upper()]
    file = written(ckpt, tmp_path / "out", type_)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    stored = {t.name: t for t in file.tensors}
    n_blocks = 0
    for name, lazy in ckpt.tensors.items():
        tensor = stored[table.get_name(name, (".weight", ".bias"))]
        x = lazy.load().float().numpy()
        wanted = Q.F32 if x.ndim == 1 else kind
        if tensor.name == "output.weight" and kind > Q.F16:  # the preset's Q6_K, whose place Q8_0 takes
            wanted = Q.BF16 if kind is Q.BF16 else Q.Q8_0
        if x.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            wanted = Q.F16
        n_blocks += wanted is kind
        assert tensor.tensor_type == wanted, name
        assert [int(n) for n in reversed(tensor.shape)] == list(x.shape)
        assert np.array_equal(np.array(tensor.data).view(np.uint8), quants.quantize(x, wanted).view(np.uint8)), name
    assert n_blocks
    fields = {k: f.contents() for k, f in file.fields.items()}
    assert fields["general.file_type"] == gguf.LlamaFileType[f"{'ALL' if type_ == 'f32' else 'MOSTLY'}_{kind.name}"]
    assert fields["general.quantization_version"] == 2


def test_rows_that_no_block_divides_are_noted(tmp_path):
    after = convert(tiny("qwen2"), to="gguf", type="q8_0")
    assert any(n == "2 matrices whose rows are no multiple of 32 stored as F16 instead of Q8_0" for n in after.notes)
