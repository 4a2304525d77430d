"""llama.cpp itself computes what our decoder computes, from files written here: every family, and SmolLM2's text.

Needs a Python that has llama-cpp-python (it compiles for minutes): LLMKIT_LLAMA_CPP=/path/to/python pytest …
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

import llmkit
from llmkit.architecture.registry import default_registry
from llmkit.decoder.contract import random_checkpoint
from llmkit.tensors.lazy import Apply
from llmkit.transforms.convert import convert
from tests.quantization.test_mxfp4 import published
from tests.transforms.test_convert_gguf import FAMILIES, LIKE_GEMMA_3N, NEEDS_HEAD, TIED, tiny_config

PYTHON = os.environ.get("LLMKIT_LLAMA_CPP")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="set LLMKIT_LLAMA_CPP to a Python with llama_cpp"),
]
IDS = [1, 5, 90, 17, 33, 47, 8, 8, 30, 77, 12, 95, 44, 10, 31, 7, 7, 9, 60, 23]
LOGITS = """
import sys, json, numpy, llama_cpp
import llama_cpp.llama_cpp as library
defaults = library.llama_model_default_params
def params():
    found = defaults()
    found.use_extra_bufts = False  # rows packed anew for matrix units: 0.3.36 crashes there, with its own files, too
    return found
library.llama_model_default_params = llama_cpp.llama_model_default_params = params
path, out, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = llama_cpp.Llama(path, n_ctx=64, n_threads=2, verbose=False, logits_all=True, type_k=0, type_v=0)
model.eval(ids)
numpy.save(out, model.scores[: len(ids)])
"""
TEXT = """
import sys, json, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=2, verbose=False)
found = []
for prompt in json.loads(sys.argv[2]):
    ids = model.tokenize(prompt.encode(), add_bos=True, special=True)
    model.reset(); model.eval(ids)
    new = []
    while len(new) < 24 and (token := int(model.sample(temp=0.0))) != model.token_eos():
        new.append(token); model.eval([token])
    found.append([ids, new])
print(json.dumps(found))
"""
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MISTRAL_4 = {**YARN, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0,
             "llama_4_scaling_beta": 0.1}  # fmt: skip
# llama.cpp knows sizes and positions of some families by the number of layers, and applies no window to some.
CASES = {
    ("baichuan", None): {"num_hidden_layers": 32}, ("baichuan", "baichuan2-7b"): {"num_hidden_layers": 32},
    ("baichuan13b", None): {"num_hidden_layers": 40}, ("bloom", None): {}, ("bloom", "six-heads"): {},
    ("chatglm2", None): {}, ("falcon", None): {}, ("falcon", "11b"): {}, ("falcon", "multi-head"): {},
    ("falcon40b", None): {}, ("gemma", None): {}, ("gemma2", None): {},
    ("gemma2", "transformers-5"): {}, ("gemma3", None): {},
    ("gemma3", "scaled"): {}, ("glm", None): {}, ("glm4", None): {},
    ("gpt2", None): {}, ("gpt_neox", None): {}, ("gpt_neox", "redpajama"): {}, ("gpt_neox", "linear"): {},
    ("llama", None): {}, ("llama", "attention-bias"): {}, ("llama", "linear"): {}, ("llama", "llama3"): {},
    ("llama", "tied"): {}, ("llama", "wide-heads"): {}, ("llama", "yarn"): {}, ("llama", "yarn-attention-factor"): {},
    ("mixtral", None): {}, ("olmoe", None): {}, ("qwen2_moe", None): {}, ("qwen3_moe", None): {},
    ("mistral", "window-beyond"): {}, ("phi3", "medium"): {}, ("phi3", "128k-long"): {}, ("phi3", "phi-4-mini"): {},
    ("qwen2", None): {}, ("qwen3", None): {}, ("stablelm", None): {}, ("stablelm", "2-12b"): {},
    ("cohere", None): {}, ("cohere2", None): {}, ("ernie4_5", None): {}, ("granite", None): {}, ("hunyuan", None): {},
    ("ministral3", None): {}, ("nemotron", "biases"): {}, ("olmo", None): {}, ("olmo2", None): {},
    ("olmo3", "yarn"): {}, ("phi", "phi-2"): {}, ("seed_oss", None): {}, ("smollm3", None): {},
    ("starcoder2", None): {"sliding_window": 30}, ("cohere", "r-plus"): {"num_hidden_layers": 64},
    ("deepseek2", None): {}, ("deepseek2", "yarn"): {}, ("deepseek3", None): {},
    ("deepseek3", "no-groups"): {}, ("deepseek3", "yarn"): {},
    ("deepseek3", "plain-queries"): {"attention_bias": False},
    ("glm4_moe_lite", "yarn"): {"rope_parameters": YARN}, ("glm4_moe_lite", "types"): {"mlp_layer_types": None},
    ("kimi_linear", None): {}, ("kimi_linear", "published"): {},
    ("deepseek_v32", None): {}, ("deepseek_v32", "yarn"): {},
    ("deepseek_v32", "chosen"): {"index_head_dim": 64, "attention_bias": False, "mlp_layer_types": None},
    ("glm5", None): {}, ("glm5", "shared"): {},
    ("dots1", "groups"): {"attention_bias": False, "tie_word_embeddings": False},
    ("minicpm3", None): {}, ("minicpm3", "longrope"): {}, ("youtu", None): {}, ("youtu", "half"): {},
    ("gpt_bigcode", None): {}, ("internlm2", None): {}, ("minicpm", None): {},
    ("minicpm", "untied"): {}, ("mpt", None): {}, ("mpt", "clipped"): {}, ("qwen", None): {}, ("xverse", None): {},
    ("gpt_oss", None): {}, ("glm4_moe", None): {}, ("ernie4_5_moe", None): {}, ("hunyuan_moe", None): {},
    ("minimax_m2", None): {}, ("granitemoe", None): {}, ("granitemoe", "biases"): {}, ("granitemoeshared", None): {},
    ("granitemoeshared", "unshared"): {}, ("glm4_moe", "groups"): {}, ("solar_open", None): {},
    ("glm4_moe", "defaults"): {}, ("gpt_oss", "transformers-5"): {"layer_types": None},
    ("ernie4_5_moe", "unshared"): {"moe_layer_end_index": -1},
    ("hunyuan_moe", "plain"): {"attention_bias": False, "moe_topk": 2},
    ("lfm2", None): {}, ("lfm2", "adjusted"): {}, ("mamba", None): {}, ("falcon_mamba", None): {"mixer_rms_eps": 1e-5},
    ("mamba2", None): {}, ("mamba2", "tied"): {"use_conv_bias": True}, ("jamba", None): {},
    ("falcon_h1", None): {}, ("falcon_h1", "norm"): {"mamba_norm_before_gate": False, "mamba_n_groups": 2},
    ("falcon_h1", "norm-after"): {"tie_word_embeddings": True, "mamba_conv_bias": True},
    ("bamba", None): {}, ("bamba", "tied"): {"mamba_conv_bias": True}, ("granitemoehybrid", None): {},
    ("granitemoehybrid", "rope"): {"mamba_conv_bias": True}, ("granitehybrid", None): {},
    ("glm4_moe_lite", None): {}, ("mistral4", None): {},
    ("mistral4", "groups"): {"rope_parameters": MISTRAL_4}, ("apertus", None): {},
    ("apertus", "defaults"): {},
    ("rwkv7", None): {}, ("rwkv6", None): {}, ("rwkv6", "rescaled"): {}, ("rwkv6", "defaults"): {},
    ("jamba", "dense"): {"mamba_conv_bias": True}, ("qwen3_next", None): {},
    ("qwen3_next", "one-key-head"): {}, ("qwen3_5", None): {},
    ("qwen3_5", "one-key-head"): {},
    ("qwen3_next", "transformers-5"): {},
    ("qwen3_5_moe", None): {},
    ("dots1", None): {}, ("lfm2_moe", None): {}, ("arcee", None): {}, ("arcee", "yarn"): {}, ("llama4", None): {},
    ("gemma3n", None): LIKE_GEMMA_3N, ("gemma3n", "transformers-5"): LIKE_GEMMA_3N, ("gemma3n", "released"): {},
    ("gemma4", None): {}, ("gemma4", "e2b"): {}, ("gemma4", "31b"): {}, ("gemma4", "26b-a4b"): {},
    ("gemma4", "defaults"): {},
    ("exaone4", "1.2b"): {},
    ("exaone4", None): {"num_hidden_layers": 64, "layer_types": None, "sliding_window_pattern": 4},
}  # fmt: skip


def run(script: str, *args: object) -> str:
    done = subprocess.run([str(PYTHON), "-c", script, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, "\n".join(x for x in done.stderr.splitlines() if "ASSERT" in x) or done.stderr[-800:]
    return done.stdout


def with_table(gelu):
    """GELU as llama.cpp has it: by a table of half precision, between -10 and 10."""

    def looked_up(x, approximate="none"):
        found = gelu(x.half().float(), approximate=approximate).half().float()
        return torch.where(x.abs() < 10, found, x.clamp(min=0)) if approximate == "tanh" else gelu(x)

    return looked_up


def damped(ckpt):
    """Gemma 3n adding half of what its MLPs give: ten sparse ones enlarge rounding to what the tolerance is."""
    if "activation_sparsity_pattern" not in ckpt.config:
        return ckpt
    norms = {n: lazy for n, lazy in ckpt.tensors.items() if "post_feedforward" in n}
    halves = {n: Apply("half", [lazy], lazy.spec, lambda x: x / 2, {}).output() for n, lazy in norms.items()}
    return replace(ckpt, tensors={**ckpt.tensors, **halves})


def as_there(config):
    """Gemma 3n's sparsity, but for a standard deviation that llama.cpp takes over one gate less."""
    config, normal = dict(config), NormalDist()
    if any(config.get("activation_sparsity_pattern") or []):
        n = config["intermediate_size"]
        factor = (n / (n - 1)) ** 0.5
        config["activation_sparsity_pattern"] = [
            s and normal.cdf(normal.inv_cdf(s) * factor) for s in config["activation_sparsity_pattern"]
        ]
    return config


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NEEDS_HEAD])
def test_a_tied_head_is_loaded(tmp_path, name):
    ckpt = random_checkpoint(FAMILIES[name], tiny_config(name) | TIED)
    llmkit.save(without_vocabulary(convert(ckpt, to="gguf", type="f32")), tmp_path / "g")
    run(LOGITS.partition("model.eval")[0], next((tmp_path / "g").glob("*.gguf")), "", "[]")


@pytest.mark.parametrize("name", NEEDS_HEAD)
def test_logits_of_a_tied_head_written_twice(tmp_path, name):
    ckpt = random_checkpoint(FAMILIES[name], tiny_config(name) | CASES.get((name, None), {}) | TIED)
    llmkit.save(without_vocabulary(convert(ckpt, to="gguf", type="f32")), tmp_path / "g")
    run(LOGITS, next((tmp_path / "g").glob("*.gguf")), tmp_path / "logits.npy", json.dumps(IDS))
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    with torch.inference_mode():
        want = llmkit.load_decoder(ckpt, dtype="float32")(torch.tensor([IDS]))[0]
    assert (found - want).abs().max() <= 1e-3 * want.abs().max()


def without_vocabulary(converted):
    metadata = {**converted.container.metadata, "tokenizer.ggml.model": "no_vocab"}
    return replace(converted, container=replace(converted.container, metadata=metadata))


@pytest.mark.parametrize(("name", "variant"), CASES, ids=str)
def test_logits(tmp_path, monkeypatch, name, variant):
    architecture = next(a for p in default_registry().plugins if (a := default_registry().load(p)).name == name)
    changes = CASES[name, variant]
    ckpt = damped(random_checkpoint(architecture, {**architecture.tiny_config(variant), **changes}))
    after = convert(replace(ckpt, label="tiny"), to="gguf", type="f32")
    llmkit.save(without_vocabulary(after), tmp_path / "out")
    run(LOGITS, tmp_path / "out" / "tiny-F32.gguf", tmp_path / "logits.npy", json.dumps(IDS))
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    if name.startswith("gemma"):  # whose norms after the MLP enlarge what that leaves
        monkeypatch.setattr(torch.nn.functional, "gelu", with_table(torch.nn.functional.gelu))
    with torch.inference_mode():
        ckpt = replace(ckpt, config=as_there(ckpt.config))
        want = llmkit.load_decoder(ckpt, dtype="float32")(torch.tensor([IDS]))[0]
    assert (found - want).abs().max() <= 1e-3 * want.abs().max()


_BLOCKS = [("llama", each) for each in ("q2_k", "q3_k_m", "q4_k_m", "q5_k_s", "q6_k", "iq4_nl", "iq4_xs")]


_MORE = ("qwen3_moe", "lfm2", "mamba", "jamba", "qwen3_5", "qwen3_next", "falcon_h1", "rwkv6", "rwkv7", "apertus",
         "deepseek3", "kimi_linear", "glm5", "gemma3n", "gemma4")  # fmt: skip


@pytest.mark.parametrize(("name", "type_"), [*_BLOCKS, *((n, "q4_k_m") for n in _MORE)])
def test_blocks(tmp_path, name, type_):
    """llama.cpp reads the weights that we read. It rounds activations to eight bits, which moves the logits: by 0.022
    to 0.027 of their deviation, for all types alike; where a state or a choice carries that on, by up to 0.068."""
    architecture = next(a for p in default_registry().plugins if (a := default_registry().load(p)).name == name)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    if "num_experts" in architecture.tiny:  # all of them for each token: rounded activations may choose others
        sizes |= {"moe_intermediate_size": 256, "num_experts_per_tok": architecture.tiny["num_experts"]}
    if "n_routed_experts" in architecture.tiny:
        sizes |= {"moe_intermediate_size": 256, "num_experts_per_tok": architecture.tiny["n_routed_experts"],
                  "n_group": 1, "topk_group": 1}  # fmt: skip
    if "kv_lora_rank" in architecture.tiny:
        sizes |= {"num_key_value_heads": 8, "kv_lora_rank": 256, "qk_nope_head_dim": 32, "v_head_dim": 32}
        sizes |= {"q_lora_rank": 256} if "q_lora_rank" in architecture.tiny else {}
    if "linear_num_heads" in architecture.tiny:
        sizes |= {"linear_num_heads": 8, "num_experts_per_token": architecture.tiny["num_experts"]}
    if "attention_hidden_size" in architecture.tiny:
        sizes["attention_hidden_size"] = 256
    variant = "released" if name == "gemma3n" else None
    ckpt = random_checkpoint(architecture, {**architecture.tiny_config(variant), **sizes})
    after = convert(replace(ckpt, label="tiny"), to="gguf", type=type_)
    metadata = {**after.container.metadata, "tokenizer.ggml.model": "no_vocab"}
    llmkit.save(replace(after, container=replace(after.container, metadata=metadata)), tmp_path / "out")
    path = next((tmp_path / "out").glob("*.gguf"))
    run(LOGITS, path, tmp_path / "logits.npy", json.dumps(IDS))
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    with torch.inference_mode():
        want = llmkit.load_decoder(llmkit.open_checkpoint(path), dtype="float32")(torch.tensor([IDS]))[0]
    assert (found - want).std() < (0.1 if name in _MORE else 0.05) * want.std()


def test_experts_in_float4(tmp_path):
    """gpt-oss as it is published, with the codes of its experts; all of them for each token, as above."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_experts_per_tok": 4}
    ckpt = llmkit.open_checkpoint(published(tmp_path, **sizes))
    after = convert(replace(ckpt, label="tiny"), to="gguf")
    metadata = {**after.container.metadata, "tokenizer.ggml.model": "no_vocab"}
    llmkit.save(replace(after, container=replace(after.container, metadata=metadata)), tmp_path / "out")
    run(LOGITS, tmp_path / "out" / "tiny-MXFP4.gguf", tmp_path / "logits.npy", json.dumps(IDS))
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    with torch.inference_mode():
        want = llmkit.load_decoder(ckpt, dtype="float32")(torch.tensor([IDS]))[0]
    assert (found - want).std() < 0.05 * want.std()


@pytest.mark.parametrize("type_", ["f32", "f16"])
def test_the_text_of_smollm2(smollm2, tmp_path, type_):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llmkit.save(convert(llmkit.open_checkpoint(smollm2), to="gguf", type=type_), tmp_path / "out")
    prompts = ["The capital of France is", "Once upon a time", "def fibonacci(n):"]
    prompts.append("<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n")
    path = next((tmp_path / "out").glob("*.gguf"))
    found = json.loads(run(TEXT, path, json.dumps(prompts)))
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for prompt, (ids, new) in zip(prompts, found, strict=True):
        assert ids == tokenizer(prompt).input_ids
        want = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
        assert new == want[: want.index(2)] if 2 in want else want
