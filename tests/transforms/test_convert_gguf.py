"""GGUF files written here: read by the gguf library, compared with its quantization and with plain torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmkit
from llmkit.architecture.difference import difference
from llmkit.architecture.registry import default_registry, find
from llmkit.checkpoint.embeddings import find_embeddings
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.reference import reference_logits
from llmkit.errors import InputError, LlmkitError, RequirementError
from llmkit.inspection.check import check_output
from llmkit.tensors.spec import DType
from llmkit.transforms.convert import Overflow, convert, targets
from llmkit.transforms.schemes import head_and_embedding_recipe

PLUGINS = {a.name: a for p in default_registry().plugins if p.is_builtin and (a := default_registry().load(p))}
FAMILIES = {name: a for name, a in PLUGINS.items() if a.gguf is not None}
DTYPES = {"f32": DType.F32, "f16": DType.F16, "bf16": DType.BF16}
# What llama.cpp has no place for, by the reason that is given. Everything else must come back.
REFUSED = {
    ("arcee", "biases"): "it reads no biases",
    ("bloom", "normed-residual"): "residual is NormedResidual, here PreNorm",
    ("dots1", "groups"): "attention.qkv_bias is True, here False",
    ("dots1", "window"): "it reads a key head for each query head",
    ("lfm2_moe", "no-correction"): "attention.bias is True, here False",
    ("lfm2_moe", "sizes"): "mlp.router.scale is 1.5, here 1.0",
    ("chatglm2", "linear biases"): "attention.out_bias is True, here False",
    ("cohere", "r-plus"): "it reads norms of heads of models from 64 layers on",
    ("cohere2", "transformers-5"): "attention.qkv_bias is True, here False",
    ("ernie4_5", "biases"): "attention.qkv_bias is True, here False",
    ("deepseek2", "groups"): "it chooses groups by their two best experts",
    ("deepseek2", "plain-queries"): "attention.bias is True, here False",
    ("deepseek3", "plain-queries"): "attention.bias is True, here False",
    ("deepseek_v32", "chosen"): "heads of its indexer are 4 wide, no multiple of 64",
    ("glm5", "chosen"): "heads of its indexer are 4 wide, no multiple of 64",
    ("youtu", "biases"): "attention.bias is True, here False",
    ("kimi_linear", "compressed-queries"): "it reads queries that are not compressed",
    ("ernie4_5_moe", "unshared"): "mlp is GatedMLP, here Experts",
    ("falcon", "rw-1b"): "attention.qkv_bias is True",
    ("falcon", "rw-twelve-heads"): "attention.qkv_bias is True",
    ("falcon", "rw-1b-2023"): "attention.qkv_bias is True",
    ("falcon", "sequential"): "residual is PreNorm, here SharedParallel",
    ("gemma", "untied"): "its head is not tied to the embedding",
    ("gemma", "attention-bias"): "attention.qkv_bias is True",
    ("gemma2", "untied"): "its head is not tied to the embedding",
    ("gemma2", "exact-gelu"): "mlp.act is 'gelu', here 'gelu_pytorch_tanh'",
    ("gemma3n", "scaled"): "it scales the rotary positions of layers with a window, too",
    ("gemma3n", "streams"): "it knows 4 streams",
    ("gemma4", "per-layer"): "it takes keys of the last two layers that have some",
    ("glm", "defaults"): "its heads are 512 wide together, not 32",
    ("glm", "wide-heads"): "its heads are 64 wide together, not 32",
    ("gpt_oss", "no-biases"): "attention.qkv_bias is False, here True",
    ("gpt_oss", "transformers-5"): "sliding_window is None, here 7",
    ("gpt2", "by-layer"): "attention.scale is",
    ("gpt2", "unscaled"): "attention.scale is 1.0",
    ("gpt_bigcode", "unscaled"): "attention.scale is 1.0",
    ("gpt_neox", "no-bias"): "attention.qkv_bias is False, here True",
    ("falcon_h1", "norm-after"): "attention.recurrence.conv_bias is False, here True",
    ("bamba", "tied"): "attention.conv_bias is False, here True",
    ("granitehybrid", "rope"): "attention.conv_bias is False, here True",
    ("granitehybrid", "attention"): "all its layers have attention",
    ("granitemoehybrid", "rope"): "attention.conv_bias is False, here True",
    ("glm4_moe_lite", "types"): "mlp is Experts, here GatedMLP",
    ("falcon_h1", "norm"): "attention.recurrence.norm_before_gate is True, here False",
    ("internlm2", "biases"): "attention.qkv_bias is True, here False",
    ("internlm2", "dynamic"): "rope_scaling is 'dynamic'",
    ("hunyuan", "plain"): "attention.qkv_bias is True, here False",
    ("hunyuan_moe", "plain"): "attention.qkv_bias is True, here False",
    ("lfm2", "biases"): "attention.bias is True, here False",
    ("mamba", "defaults"): "its layers are 32 wide, and not twice the 32 of the stream",
    ("mamba", "untied"): "attention.conv_bias is False, here True",
    ("falcon_mamba", "defaults"): "its layers are 32 wide, and not twice the 32 of the stream",
    ("falcon_mamba", "untied"): "attention.conv_bias is False, here True",
    ("mamba2", "tied"): "attention.conv_bias is False, here True",
    ("jamba", "dense"): "attention.conv_bias is False, here True",
    ("llama4", "chunks"): "attention.chunk is 5, here 8192",
    ("llama4", "types"): "attention.chunk is None, here 8192",
    ("llama", "dynamic"): "rope_scaling is 'dynamic'",
    ("llama", "yarn-mscale"): "rope_scaling.mscale is 1.0, here None",
    ("minicpm3", "plain-queries"): "attention.bias is True, here False",
    ("minicpm3", "other-scales"): "multiplier is 1.41421",
    ("olmo2", "bias"): "attention.qkv_bias is True, here False",
    ("olmo3", "transformers-5"): "sliding_window is None, here 7",
    ("olmoe", "clipped"): "it reads a key head for each query head",
    ("olmoe", "normalized"): "attention.qkv_bias is True, here False",
    ("phi", "grouped"): "attention.qk_norm is LayerNorm, here None",
    ("mpt", "scaled"): "attention.scale is 0.5",
    ("qwen2", "window-above"): "sliding_window is 7, here None",
    ("qwen3_5", "biases"): "heads of its Gated DeltaNets have keys and values of two widths",
    ("qwen3_5_moe", "biases"): "heads of its Gated DeltaNets have keys and values of two widths",
    ("qwen3_next", "biases"): "heads of its Gated DeltaNets have keys and values of two widths",
    ("qwen3_next", "dense-below"): "mlp is GatedMLP, here Experts",
    ("qwen2_moe", "dense-above"): "mlp.router.is_normalized is True, here False",
    ("qwen2_moe", "no-bias"): "attention.qkv_bias is False, here True",
    ("qwen3_moe", "dense-below"): "mlp is GatedMLP, here Experts",
    ("qwen3_moe", "window"): "attention.qkv_bias is True, here False",
    ("qwen2", "window-layer-types"): "sliding_window is 7, here None",
    ("qwen3", "attention-bias"): "attention.qkv_bias is True, here False",
    ("qwen3", "window-above"): "sliding_window is 7, here None",
    ("qwen3", "transformers-5"): "sliding_window is 7, here None",
    ("seed_oss", "output-bias"): "attention.out_bias is True, here False",
    ("smollm3", "window"): "attention.qkv_bias is True, here False",
    ("starcoder2", "no-bias"): "its layers have no biases",
}
# Keys in the first 20 layers, zeros in the first 10; what is 256 wide in llama.cpp, and 64.
LIKE_GEMMA_3N = {
    "num_hidden_layers": 22, "num_kv_shared_layers": 2, "layer_types": None, "intermediate_size": 48,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12, "hidden_size_per_layer_input": 256, "laurel_rank": 64,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
NEEDS_HEAD = [name for name, a in FAMILIES.items() if a.gguf.has_own_head]
CASES = [
    pytest.param(name, variant, marks=[] if variant is None or (name, variant) in REFUSED else pytest.mark.slow)
    for name, a in FAMILIES.items()
    for variant in (None, *a.variants)
]
UNCHANGED = sorted(name for name, a in FAMILIES.items() if a.gguf.fold is None)
UNFOLDED = {("baichuan", "baichuan2-7b"), ("baichuan13b", "baichuan2-13b")}


def tiny_config(name: str, variant: str | None = None) -> dict:
    config = FAMILIES[name].tiny_config(variant)
    if "query_pre_attn_scalar" in FAMILIES[name].tiny:  # llama.cpp always scales by the head's size
        config["query_pre_attn_scalar"] = config["head_dim"]
    if name == "gemma3n":  # llama.cpp knows these by heart
        config |= LIKE_GEMMA_3N
    if name == "exaone4":  # llama.cpp gives windows to the model of 64 layers
        config |= {"sliding_window": None, "layer_types": ["full_attention"] * config["num_hidden_layers"]}
    return config


def tiny(name: str, variant: str | None = None, dtype: DType = DType.F32):
    ckpt = random_checkpoint(FAMILIES[name], tiny_config(name, variant))
    return replace(ckpt, tensors={n: t.cast(dtype) for n, t in ckpt.tensors.items()}, label="tiny")


def written(ckpt, folder: Path, type_: str = "f32") -> gguf.GGUFReader:
    llmkit.save(convert(ckpt, to="gguf", type=type_), folder)
    return gguf.GGUFReader(folder / f"{ckpt.label}-{type_.upper()}.gguf")


def values(tensor) -> torch.Tensor:
    if tensor.tensor_type is Q.BF16:
        return torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16)
    return torch.from_numpy(np.array(tensor.data))


def is_back(name: str, tensor: str, want: torch.Tensor, found: torch.Tensor) -> bool:
    """Bit for bit, but for what files have as another number: norms plus one, and -exp of the logarithm of a decay."""
    if tensor.endswith("A_log") or (FAMILIES[name].gguf.norm_offset and "norm" in tensor):
        return bool(((found - want).abs() <= 2**-23 * want.abs().clamp(min=1)).all())
    return torch.equal(found, want)


@pytest.mark.parametrize(("name", "variant"), CASES, ids=lambda x: str(x))
def test_there_and_back(tmp_path, name, variant):
    ckpt = tiny(name, variant)
    reason = REFUSED.get((name, variant))
    if reason is not None:
        with pytest.raises(RequirementError) as caught:
            convert(ckpt, to="gguf", type="f32")
        assert reason in caught.value.message
        assert caught.value.hint is not None
        return
    written(ckpt, tmp_path / "out")
    back = llmkit.open_checkpoint(tmp_path / "out")
    twice = FAMILIES[name].gguf.has_own_head and ckpt.require_model().is_tied
    assert sorted(back.tensors) == sorted([*ckpt.tensors, *([ckpt.require_model().name_of("head.weight")] * twice)])
    if FAMILIES[name].gguf.fold is not None:  # its multipliers are in the weights
        ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            want, found = (llmkit.load_decoder(each, dtype="float32")(ids) for each in (ckpt, back))
        assert (found - want).abs().max() <= 1e-5 * want.abs().max()
        return
    for tensor, lazy in ckpt.tensors.items():
        want, found = lazy.load(), back.tensors[tensor].load()
        if tensor == "lm_head.weight" and (name, variant) in UNFOLDED:
            want = want / want.norm(dim=-1, keepdim=True)
            assert torch.allclose(found, want, atol=1e-6)
        else:
            assert is_back(name, tensor, want, found), tensor
    reader = find(back.config)
    assert reader is not None
    assert reader.name == name
    plain = [m.bind(c) for m, c in ((FAMILIES[name], dict(ckpt.config)), (reader, dict(back.config)))]
    plain = [replace(m, head=replace(m.head, normalized=False)) for m in plain]
    assert difference(*plain) is None
    assert plain[0].dims.context in (None, plain[1].dims.context)


ONE_SORT = {  # without attention, and with attention alone
    "lfm2": ({"layer_types": ["conv"] * 2}, {"layer_types": ["full_attention"] * 2}),
    "qwen3_5": ({"layer_types": ["linear_attention"] * 2}, {"layer_types": ["full_attention"] * 2}),
    "jamba": ({"attn_layer_offset": 9, "attn_layer_period": 10}, {"attn_layer_offset": 0, "attn_layer_period": 1}),
    "kimi_linear": ({"layer_types": ["linear_attention"] * 2}, {"layer_types": ["full_attention"] * 2}),
    "bamba": ({"attn_layer_indices": []}, {"attn_layer_indices": [0, 1]}),
}


@pytest.mark.parametrize("name", ONE_SORT)
def test_a_hybrid_of_one_sort_of_layers_is_refused(name):
    """llama.cpp stops at an assertion: it has no buffer for keys and values, or for states, of no layer."""
    for changes, words in zip(ONE_SORT[name], ("none of its layers has", "all its layers have"), strict=True):
        config = tiny_config(name) | {"num_hidden_layers": 2} | changes
        with pytest.raises(RequirementError, match=f"{words} attention"):
            convert(random_checkpoint(FAMILIES[name], config), to="gguf", type="f32")


@pytest.mark.parametrize("name", NEEDS_HEAD)
def test_a_tied_head_that_llama_cpp_does_not_tie_is_written_twice(tmp_path, name):
    """test_gguf_in_llama_cpp.py has what it computes."""
    ckpt = replace(random_checkpoint(FAMILIES[name], tiny_config(name) | TIED), label="tiny")
    tensors = {t.name: values(t) for t in written(ckpt, tmp_path / "out").tensors}
    assert torch.equal(tensors["output.weight"], tensors["token_embd.weight"])
    back = llmkit.open_checkpoint(tmp_path / "out")
    assert back.config["tie_word_embeddings"]
    assert not back.notes
    model = back.require_model()
    assert torch.equal(*(back.tensors[model.name_of(f"{end}.weight")].load() for end in ("embed", "head")))


def test_a_tied_head_written_twice_may_have_other_blocks(tmp_path):
    ckpt = random_checkpoint(FAMILIES["gpt_neox"], tiny_config("gpt_neox") | TIED | {"hidden_size": 256})
    ckpt = replace(ckpt, label="tiny")
    types = {t.name: t.tensor_type for t in written(ckpt, tmp_path / "q4", "q4_k_m").tensors}
    assert (types["output.weight"], types["token_embd.weight"]) == (Q.Q6_K, Q.Q4_K)  # as llama-quantize has them
    assert not llmkit.open_checkpoint(tmp_path / "q4").config["tie_word_embeddings"]
    recipe = head_and_embedding_recipe(targets()["gguf"].as_filed(ckpt), head_bits=8, embedding_bits=6)
    types = convert(ckpt, to="gguf", type="q4_k_m", recipe=recipe).container.types
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q8_0", "Q6_K")


@pytest.mark.parametrize(("name", "variant"), [("deepseek3", None), ("exaone4", "1.2b"), ("mpt", None)])
def test_transformers_computes_what_is_read_back(tmp_path, name, variant):
    """Also where its class takes values that no file holds: the number of heads, the types of layers, an integer."""
    written(tiny(name, variant), tmp_path / "out")
    back = llmkit.open_checkpoint(tmp_path / "out")
    theirs = reference_logits(FAMILIES[name], back.config, back)
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    want = theirs(ids)
    assert (llmkit.load_decoder(back, dtype="float32")(ids) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(UNCHANGED), st.sampled_from(sorted(DTYPES)), st.integers(3000, 60_000), st.data())
def test_there_and_back_from_shards_in_any_float(name, type_, shard, data):
    usable = [v for v in (None, *FAMILIES[name].variants) if (name, v) not in {*REFUSED, *UNFOLDED}]
    ckpt = tiny(name, data.draw(st.sampled_from(usable)), DTYPES[type_])
    with TemporaryDirectory() as scratch:
        home = Path(scratch)
        llmkit.save(ckpt, home / "hf", max_shard_size=shard)
        hf = llmkit.open_checkpoint(home / "hf")
        llmkit.save(convert(hf, to="gguf", type=type_), home / "gguf")
        assert check_output(home / "gguf").is_ok
        llmkit.save(convert(llmkit.open_checkpoint(home / "gguf"), to="hf"), home / "back")
        back = llmkit.open_checkpoint(home / "back")
        ends, copies = find_embeddings(back), []
        if FAMILIES[name].gguf.has_own_head and find_embeddings(hf).is_tied:  # the file has the matrix twice
            copies = [ends.head]
            assert torch.equal(back.tensors[copies[0]].load(), back.tensors[ends.embed].load())
        assert sorted(back.tensors) == sorted([*hf.tensors, *copies])
        for tensor, lazy in hf.tensors.items():
            want, found = lazy.load(), back.tensors[tensor].load()
            assert found.dtype == want.dtype, tensor
            if (name, want.dtype) == ("rwkv6", torch.float16):  # halves of the smallest have no place in it
                assert (found.float() - want.float()).abs().max() <= 2**-24, tensor
            else:
                assert is_back(name, tensor, want.float(), found.float()), tensor


METADATA = {
    "llama": {"rope.dimension_count": 8, "rope.freq_base": 10000.0, "attention.head_count_kv": 2, "vocab_size": 96,
              "attention.layer_norm_rms_epsilon": 1e-5, "context_length": 64, "feed_forward_length": 48},
    "bloom": {"attention.layer_norm_epsilon": 1e-5, "context_length": 64, "feed_forward_length": 128,
              "attention.max_alibi_bias": 8.0},
    "gpt_neox": {"rope.dimension_count": 2, "use_parallel_residual": True},
    "falcon40b": {"tensor_data_layout": "jploski", "context_length": 2048, "attention.head_count_kv": 2},
    "baichuan": {"tensor_data_layout": "Meta AI original pth", "rope.dimension_count": 8},
    "chatglm2": {"rope.dimension_count": 8, "rope.freq_base": 10000.0, "attention.head_count_kv": 2},
    "gemma2": {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "attention.sliding_window": 7,
               "attention.key_length": 16},
    "gemma3": {"rope.freq_base": 1000000.0, "rope.freq_base_swa": 10000.0, "attention.sliding_window": 7,
               "attention.sliding_window_pattern": [True, True, False]},
    "glm4": {"rope.dimension_count": 8, "attention.key_length": 16},
    "stablelm": {"rope.dimension_count": 4, "use_parallel_residual": False},
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
def test_metadata(tmp_path, name):
    ckpt = tiny(name)
    if name == "gemma2":
        ckpt = replace(ckpt, config={**ckpt.config, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0})
    fields = {k: f.contents() for k, f in written(ckpt, tmp_path / "out").fields.items()}
    arch = fields["general.architecture"]
    for key, value in METADATA[name].items():
        found = fields[f"{arch}.{key}"]
        assert found == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


def test_mistral_with_a_window_warns():
    after = convert(tiny("mistral"), to="gguf")
    assert after.warnings[0] == "llama.cpp runs llama models without a sliding window; this one has 7"


def test_overflow_to_f16_is_counted(tmp_path):
    ckpt = tiny("llama")
    big = ckpt.tensors["lm_head.weight"]
    from llmkit.tensors.lazy import Apply

    scaled = Apply("scale", [big], big.spec, lambda x: x * 1e6, {"by": 1e6}).output()
    ckpt = replace(ckpt, tensors={**ckpt.tensors, "lm_head.weight": scaled})
    overflow = Overflow()
    llmkit.save(convert(ckpt, to="gguf", type="f16", overflow=overflow), tmp_path / "out")
    want = int((scaled.load().abs() > 65519).sum())
    assert want > 0
    assert overflow.by_tensor() == {"output.weight": want}


@pytest.mark.parametrize("name", ["chatglm", "gptj", "opt", "rwkv"])
def test_families_that_llama_cpp_does_not_know_are_refused_by_name(name):
    ckpt = random_checkpoint(PLUGINS[name], PLUGINS[name].tiny_config())
    with pytest.raises(LlmkitError, match=f"is of the {name} architecture, which llama.cpp does not know") as caught:
        convert(ckpt, to="gguf")
    assert caught.value.hint == "--to hf or --to bin holds any"


def test_wrong_types_and_options():
    with pytest.raises(InputError, match=r"--type 'q4_k' is no type that llmkit writes; expected f32, f16") as caught:
        convert(tiny("llama"), to="gguf", type="q4_k")
    assert caught.value.hint == "did you mean --type q4_k_s?"
    with pytest.raises(InputError, match="--to gguf stores matrices as --type says, not --dtype"):
        convert(tiny("llama"), to="gguf", dtype="float16")
    with pytest.raises(InputError, match=r"--to hf has no option --type; it goes with --to gguf"):
        convert(tiny("llama"), to="hf", type="f16")


@pytest.mark.slow
def test_transformers_loads_it_with_the_same_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    ckpt = tiny("llama")
    ckpt = replace(ckpt, config={**ckpt.config, "vocab_size": 96})
    folder = tmp_path / "out"
    after = convert(ckpt, to="gguf", type="f32")
    metadata = {**after.container.metadata, "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": [f"t{i}" for i in range(96)],
                "tokenizer.ggml.scores": [0.0] * 96, "tokenizer.ggml.token_type": [1] * 96}  # fmt: skip
    llmkit.save(replace(after, container=replace(after.container, metadata=metadata)), folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny-F32.gguf", dtype=torch.float32)
    model = llmkit.load_decoder(ckpt, dtype="float32")
    ids = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = reference(ids).logits
        assert (model(ids) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.slow
def test_transformers_reads_smollm2_as_we_do(shallow_smollm2, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llmkit.save(convert(llmkit.open_checkpoint(shallow_smollm2), to="gguf", type="q8_0"), tmp_path / "out")
    path = next((tmp_path / "out").glob("*.gguf"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=path.name, dtype=torch.float32)
    ckpt = llmkit.open_checkpoint(path)
    model = llmkit.load_decoder(ckpt, dtype="float32")
    text = "def fibonacci(n):"
    ids = AutoTokenizer.from_pretrained(shallow_smollm2)(text).input_ids
    assert load_tokenizer(ckpt)(text).input_ids == ids
    with torch.inference_mode():
        want = reference(torch.tensor([ids])).logits
        assert (model(torch.tensor([ids])) - want).abs().max() <= 1e-5 * want.abs().max()
        new = reference.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
        for token in new:
            assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
            ids.append(token)
