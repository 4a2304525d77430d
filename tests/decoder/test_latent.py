"""Latent attention: what is cached and how large it is, published shapes, float8 in blocks, graphs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import llmkit
from llmkit.architecture.registry import default_registry
from llmkit.decoder.branches import Branches
from llmkit.decoder.contract import random_checkpoint, random_ids
from llmkit.decoder.kv import KVCache
from llmkit.decoder.load import load_decoder
from llmkit.decoder.packed import Packed
from llmkit.errors import RequirementError
from llmkit.evaluation.cost import Costs
from llmkit.onnx.export import export
from llmkit.onnx.genai import unfed_inputs
from llmkit.onnx.kv_cache import CacheScales
from llmkit.onnx.model import build_graph
from llmkit.tensors.rearrange import zeros
from llmkit.tensors.spec import DType, TensorSpec

PLUGINS = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}
V3, MINICPM3 = PLUGINS["deepseek3"], PLUGINS["minicpm3"]
_YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
_LITE = {
    "attention_bias": False, "aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 1.0,
    "rope_scaling": {**_YARN, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}, "scoring_func": "softmax",
    "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128,
    "vocab_size": 102400,
}  # fmt: skip
_V3 = _LITE | {
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "routed_scaling_factor": 2.5,
    "rope_scaling": {**_YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}, "scoring_func": "sigmoid",
    "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280,
}  # fmt: skip
_K2 = _V3 | {
    "first_k_dense_replace": 1, "max_position_embeddings": 131072, "n_group": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip


def decoder_of(architecture, variant=None):
    config = architecture.tiny_config(variant)
    return load_decoder(random_checkpoint(architecture, config), architecture=architecture), config


def test_one_vector_a_token_is_held_once_in_every_cache():
    decoder, config = decoder_of(V3)
    width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    ids = random_ids(V3, config)[:1]
    cache = KVCache(4)
    for start in range(0, 12, 3):  # it grows
        decoder(ids[:, start : start + 3], cache)
        keys, values = cache.layer(1)
        assert values is keys
        assert keys.shape == (1, 1, start + 3, width)
    packed = Packed(cache, [3, 5], keep=True)
    decoder.hidden(ids[:, 12:20], packed)
    keys, values = packed.segment(1).layer(0)
    assert values is keys
    assert keys.shape == (1, 1, 17, width)
    branches = Branches([packed], 4)
    for rows in ([0, 1], [1]):
        branches.keep(rows)
        assert all(values is keys for keys, values in branches._tails.values())
    assert Costs.of(decoder.model, 2).cache_nbytes == 2 * width * config["num_hidden_layers"]


@pytest.mark.parametrize(
    ("name", "config", "n"),
    [("deepseek2", _LITE, 15_706_484_224), ("deepseek3", _V3, 671_026_419_200),
     ("deepseek3", {**_K2, "model_type": "kimi_k2"}, 1_026_408_232_448)],
    ids=["V2-Lite", "V3", "Kimi-K2"],
)  # fmt: skip
def test_published_shapes(name, config, n):
    """The parameters that the model cards state (15.7B, 671B, 1T)."""
    architecture = PLUGINS[name]
    config = {"model_type": architecture.model_types[0], **config, "architectures": list(architecture.matches)}
    model = architecture.bind(config)
    assert (model.unread.refused, model.unread.unknown) == ((), ())
    assert model.n_parameters == n
    # The layer that guesses a second token is left alone.
    assert model.table.is_ignored("model.layers.61.eh_proj.weight") == (name == "deepseek3")


def test_float8_in_blocks_is_read_as_deepseek_dequantizes_it(tmp_path):
    """weight * scale of its block of 128 x 128 (inference/fp8_cast_bf16.py); blocks at the edges are smaller."""
    config = V3.tiny_config() | {"kv_lora_rank": 160, "intermediate_size": 200, "hidden_size": 144}
    tensors, floats = {}, {}
    for slot in V3.bind(config).slots.values():
        generator = torch.Generator().manual_seed(len(floats))
        w = torch.randn(slot.shape, generator=generator) * slot.shape[-1] ** -0.5
        if slot.kind == "linear":
            rows, columns = (-(-n // 128) for n in w.shape)
            scales = torch.rand(rows, columns, generator=generator) * 2e-3 + 1e-3
            spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
            tensors[slot.name] = (w / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[f"{slot.name}_scale_inv"] = scales
            floats[slot.name] = tensors[slot.name].float() * spread
        else:
            tensors[slot.name] = floats[slot.name] = w.abs() if slot.kind == "norm" else w
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                    "weight_block_size": [128, 128]}  # fmt: skip
    for name, stored, more in (("q", tensors, {"quantization_config": quantization}), ("f", floats, {})):
        (tmp_path / name).mkdir()
        save_file(stored, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config | more))
    quantized, plain = (llmkit.open_checkpoint(tmp_path / name) for name in "qf")
    ids = random_ids(V3, config)
    torch.testing.assert_close(load_decoder(quantized)(ids), load_decoder(plain)(ids), rtol=0, atol=2e-6)


def test_graphs_that_would_cache_keys_and_values_are_refused():
    ckpt = random_checkpoint(MINICPM3, MINICPM3.tiny_config())
    with pytest.raises(RequirementError, match="one compressed vector a token"):
        export(ckpt, attention="gqa")
    scales = (zeros(TensorSpec(DType.F32, (4, 1, 4))),) * 2
    with pytest.raises(RequirementError, match="an int8 cache holds keys and values"):
        build_graph(
            ckpt.require_model(),
            ckpt.tensors,
            lambda name, lazy: None,
            attention="gqa",
            cache=CacheScales(scales, scales),
        )


def test_a_graph_has_one_state_a_layer():
    ckpt = random_checkpoint(MINICPM3, MINICPM3.tiny_config())
    graph = build_graph(ckpt.require_model(), ckpt.tensors, lambda name, lazy: None)
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.graph.input}
    assert [n for n in shapes if n.startswith("past")] == ["past_latents.0", "past_latents.1"]
    assert shapes["past_latents.0"] == [0, 1, 0, 20]
    assert unfed_inputs(graph, ckpt.require_model())  # GenAI has no such cache: no genai_config.json is written
