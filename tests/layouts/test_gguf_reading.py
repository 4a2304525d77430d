"""GGUF files written by the gguf library, from plain torch, open as what transformers' own loader makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_world import config, interleaved, same, state_of

import llmkit
from llmkit.architecture.registry import default_registry
from llmkit.architecture.scaling import Llama3Scaling
from llmkit.decoder.contract import random_checkpoint
from llmkit.errors import InputError, LlmkitError, RequirementError
from llmkit.formats.gguf_header import encode_header, read_header
from llmkit.layouts.gguf_values import llama3_factors, shortest
from llmkit.layouts.gguf_weights import from_gguf, to_gguf
from llmkit.transforms.convert import convert
from tests.quantization.lazies import held

TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]


def ggml_state(state, cfg):
    """ggml's names; q and k interleaved."""
    found = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    if "lm_head.weight" in state:
        found["output.weight"] = state["lm_head.weight"]
    names = {
        "input_layernorm": "attn_norm", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for i in range(cfg["num_hidden_layers"]):
        p, b = f"model.layers.{i}.", f"blk.{i}."
        found |= {f"{b}{ours}.weight": state[f"{p}{theirs}.weight"] for theirs, ours in names.items()}
        found[f"{b}attn_q.weight"] = interleaved(state[f"{p}self_attn.q_proj.weight"], cfg["num_attention_heads"])
        found[f"{b}attn_k.weight"] = interleaved(state[f"{p}self_attn.k_proj.weight"], cfg["num_key_value_heads"])
    return found


def write_gguf(path: Path, state, cfg, kind=Q.F32, *, tokens=TOKENS, extra=(), **split) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama", **split)
    writer.add_block_count(cfg["num_hidden_layers"])
    writer.add_context_length(cfg["max_position_embeddings"])
    writer.add_embedding_length(cfg["hidden_size"])
    writer.add_feed_forward_length(cfg["intermediate_size"])
    writer.add_head_count(cfg["num_attention_heads"])
    writer.add_head_count_kv(cfg["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(cfg["rms_norm_eps"])
    writer.add_rope_freq_base(cfg["rope_theta"])
    writer.add_rope_dimension_count(cfg["hidden_size"] // cfg["num_attention_heads"])
    writer.add_vocab_size(cfg["vocab_size"])
    for add in extra:
        add(writer)
    if tokens:
        writer.add_tokenizer_model("llama")
        padded = [*tokens, *(f"[PAD{i}]" for i in range(len(tokens), cfg["vocab_size"]))]
        writer.add_token_list(padded)
        writer.add_token_scores([-float(i) for i in range(len(padded))])
        kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259), *[5] * (len(padded) - len(tokens))]
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    for name, x in ggml_state(state, cfg).items():
        type_ = Q.F32 if x.dim() == 1 else kind
        writer.add_tensor(name, quants.quantize(x.float().numpy(), type_), raw_dtype=type_)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_as(state, kind):
    """What is left of the weights when matrices are stored as `kind`, by the library's own arithmetic."""
    plain = {Q.F32: torch.float32, Q.F16: torch.float16, Q.BF16: torch.bfloat16}
    if kind in plain:
        return {n: x if x.dim() == 1 else x.to(plain[kind]) for n, x in state.items()}
    return {
        n: x if x.dim() == 1 else torch.from_numpy(quants.dequantize(quants.quantize(x.numpy(), kind), kind))
        for n, x in state.items()
    }


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1], ids=lambda q: q.name)
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_tensors_and_config(tmp_path, kind, tied):
    cfg = config(4, 2, 16, ffn=96, vocab=270, tie_word_embeddings=tied, rms_norm_eps=1e-6, rope_theta=500000.0)
    state = state_of(cfg)
    ckpt = llmkit.open_checkpoint(write_gguf(tmp_path / "tiny.gguf", state, cfg, kind))
    same(ckpt, stored_as(state, kind))
    wanted = {k: v for k, v in cfg.items() if k != "torch_dtype"}
    assert {k: ckpt.config[k] for k in wanted} == wanted
    assert ckpt.config["torch_dtype"] == {Q.F16: "float16", Q.BF16: "bfloat16"}.get(kind, "float32")
    assert (ckpt.layout, ckpt.label) == ("gguf", "tiny")
    matrices = sum(x.dim() > 1 for x in state.values())
    assert ckpt.details["types"][kind.name]["tensors"] == (len(state) if kind is Q.F32 else matrices)


@pytest.mark.parametrize("kind", [Q.F32, Q.Q8_0], ids=lambda q: q.name)
def test_logits_are_those_of_transformers_loader(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    cfg = config(4, 2, 16, ffn=96, vocab=270)
    write_gguf(tmp_path / "m" / "tiny.gguf", state_of(cfg), cfg, kind)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m", gguf_file="tiny.gguf", dtype=torch.float32)
    model = llmkit.load_decoder(llmkit.open_checkpoint(tmp_path / "m"), dtype="float32")
    ids = torch.tensor([[1, 9, 27, 200, 14, 2]])
    with torch.inference_mode():
        want = reference(ids).logits
        assert (model(ids) - want).abs().max() <= 1e-5 * want.abs().max()


SCALES = {
    "blk.0.attn_q.scale": 0.5, "blk.0.ffn_down.scale": 3.0, "blk.1.attn_output.scale": 0.25, "output.scale": 1.5,
    "blk.0.attn_q.input_scale": 7.0,
}  # fmt: skip


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.Q8_0], ids=lambda q: q.name)
def test_weights_with_a_scale_beside_them(tmp_path, kind):
    """llama.cpp multiplies by it (its files of NVFP4 are so); the scale of inputs is for kernels that round these."""
    cfg = config(4, 2, 16, ffn=96, vocab=270)
    state = state_of(cfg)

    def add(writer):
        for name, value in SCALES.items():
            writer.add_tensor(name, np.array([value], np.float32))

    path, state = write_gguf(tmp_path / "m.gguf", state, cfg, kind, extra=[add]), stored_as(state, kind)
    by = {"model.layers.0.self_attn.q_proj": 0.5, "model.layers.0.mlp.down_proj": 3.0,
          "model.layers.1.self_attn.o_proj": 0.25, "lm_head": 1.5}  # fmt: skip
    wanted = {n: x.float() * by[stem] if (stem := n.removesuffix(".weight")) in by else x for n, x in state.items()}
    same(llmkit.open_checkpoint(path), wanted)


@pytest.mark.parametrize("scales", [[3.0], [0.5, 2.0, 4.0, 8.0]], ids=["one", "each"])
def test_experts_with_a_scale_for_each(scales):
    architecture = default_registry().load(next(p for p in default_registry().plugins if p.name == "mixtral"))
    ckpt = random_checkpoint(architecture, architecture.tiny_config() | {"num_local_experts": 4})
    filed = to_gguf(ckpt.tensors, ckpt.require_model(), architecture.gguf)
    filed["blk.1.ffn_up_exps.scale"] = held(torch.tensor(scales))
    found = from_gguf(filed, ckpt.require_model(), architecture.gguf)
    by = {f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight": x for e, x in enumerate((scales * 4)[:4])}
    assert found.keys() == ckpt.tensors.keys() > by.keys()
    assert all(torch.equal(found[n].load(), lazy.load() * by.get(n, 1)) for n, lazy in ckpt.tensors.items())


def test_parts_and_folders(tmp_path):
    cfg = config(4, 2, 16, ffn=96, vocab=270)
    state = state_of(cfg)
    write_gguf(tmp_path / "m" / "x.gguf", state, cfg, Q.F16, split_max_tensors=5)
    for path in (tmp_path / "m", next((tmp_path / "m").glob("x-00002-of-*"))):
        same(llmkit.open_checkpoint(path), stored_as(state, Q.F16))


def test_a_vector_widened_here_gets_its_dtype_back(tmp_path):
    cfg = config(4, 2, 16, ffn=96, vocab=270)
    state = {n: x.half() for n, x in state_of(cfg).items()}
    add = lambda w: w.add_string("llmkit.source_dtype", "float16")  # noqa: E731
    same(llmkit.open_checkpoint(write_gguf(tmp_path / "a.gguf", state, cfg, Q.F16, extra=[add])), state)
    mixed = llmkit.open_checkpoint(write_gguf(tmp_path / "b.gguf", state, cfg, Q.Q8_0, extra=[add]))
    assert mixed.tensors["model.norm.weight"].dtype.name == "F32"


def _scaled(kind, **values):
    def add(writer):
        if kind:
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        for name, value in values.items():
            getattr(writer, f"add_rope_scaling_{name}")(value)

    return add


@pytest.mark.parametrize(
    ("add", "expected"),
    [
        (_scaled("linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (_scaled(None, factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (_scaled("none", factor=4.0), None),
        (
            _scaled("yarn", factor=2.0, orig_ctx_len=64, yarn_beta_fast=16.0, yarn_attn_factor=1.25),
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
             "attention_factor": 1.25},
        ),
    ],
    ids=["linear", "bare factor", "none", "yarn"],
)  # fmt: skip
def test_scaling_of_positions(tmp_path, add, expected):
    cfg = config(2, 2, 16, layers=1, ffn=32, vocab=270)
    ckpt = llmkit.open_checkpoint(write_gguf(tmp_path / "x.gguf", state_of(cfg), cfg, extra=[add]))
    assert ckpt.config.get("rope_scaling") == expected


def test_frequencies_of_llama_3(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(hidden_size=256, num_attention_heads=2, rope_theta=500000.0, rope_scaling={**scaling}), "cpu"
    )
    plain = 500000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    factors = llama3_factors(Llama3Scaling(32.0, 1.0, 4.0, 8192), 500000.0, 128)
    assert torch.allclose(torch.tensor(factors).double(), plain / theirs.double(), rtol=1e-5)

    cfg = config(2, 2, 128, layers=1, ffn=32, vocab=270, rope_theta=500000.0)
    state = state_of(cfg)
    for values, wanted in ((factors, scaling), ([1.0 + i for i in range(64)], None)):
        add = lambda w, values=values: w.add_tensor("rope_freqs.weight", np.array(values, dtype=np.float32))  # noqa: E731
        path = write_gguf(tmp_path / "x.gguf", state, cfg, extra=[add])
        if wanted is None:
            with pytest.raises(RequirementError, match=r"rope_freqs\.weight scales the rotary frequencies in a way"):
                llmkit.open_checkpoint(path)
        else:
            ckpt = llmkit.open_checkpoint(path)
            assert ckpt.config["rope_scaling"] == wanted
            same(ckpt, state)


@pytest.mark.parametrize("value", [1e-6, 1e-5, 0.1, 1.5625e-07, 10000.0, 500000.0, 8.0, 0.0, 1 / 3])
def test_shortest(value):
    stored = float(np.float32(value))
    assert np.float32(shortest(stored)) == np.float32(value)
    assert shortest(stored) == value or value == 1 / 3


@pytest.mark.parametrize(("arch", "experts", "what"), [("plamo", 0, "'plamo'"), ("grok", 8, "'grok' with 8 experts")])
def test_an_architecture_without_a_plugin_keeps_its_names(tmp_path, arch, experts, what):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", arch)
    if experts:
        writer.add_expert_count(experts)
    writer.add_tensor("blk.0.ssm_a.weight", np.ones((2, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ckpt = llmkit.open_checkpoint(tmp_path / "x.gguf")
    assert (list(ckpt.tensors), ckpt.config) == (["blk.0.ssm_a.weight"], {})
    assert ckpt.warnings == (
        f"no plugin describes GGUF's {what}: names stay as in the file, only tensor-wise work is possible",
    )
    with pytest.raises(RequirementError, match="no plugin describes the architecture of this GGUF file"):
        convert(ckpt, to="hf")


def test_the_encoder_of_images_is_no_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_type("mmproj")
    writer.add_tensor("mm.0.weight", np.ones((2, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(RequirementError, match="mmproj is a GGUF file of type mmproj, which belongs to a model"):
        convert(llmkit.open_checkpoint(tmp_path / "mmproj.gguf"), to="hf")


def test_metadata_that_do_not_fit_the_tensors_are_refused(tmp_path):
    cfg = config(4, 2, 16, ffn=96, vocab=270)
    path = write_gguf(tmp_path / "x.gguf", state_of(cfg), {**cfg, "intermediate_size": 64})
    with pytest.raises(InputError, match=r"x\.gguf: its tensors do not fit its metadata: .*expected \[64, 64\]"):
        llmkit.open_checkpoint(path)
    path = write_gguf(tmp_path / "y.gguf", state_of(cfg), {**cfg, "hidden_size": 65})
    with pytest.raises(InputError, match=r"y\.gguf: its description of the model does not hold"):
        llmkit.open_checkpoint(path)
    broken = write_gguf(tmp_path / "z.gguf", state_of(cfg), cfg, tokens=None)
    (tmp_path / "cut.gguf").write_bytes(broken.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"cut\.gguf is truncated"):
        llmkit.open_checkpoint(tmp_path / "cut.gguf")


def test_the_vocabulary_becomes_tokenizer_files(tmp_path):
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    cfg = config(2, 2, 16, layers=1, ffn=32, vocab=270)
    ckpt = llmkit.open_checkpoint(write_gguf(tmp_path / "x.gguf", state_of(cfg), cfg))
    (tmp_path / "t").mkdir()
    for name, content in ckpt.files.items():
        (tmp_path / "t" / name).write_bytes(content.read())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    piece = SentencePieceProcessor(model_file=str(tmp_path / "t" / "tokenizer.model"))
    for text in ("ab ab", "a  b", "ba é"):
        ids = tokenizer(text).input_ids
        assert ids == [1, *piece.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("ab</s>").input_ids == [1, TOKENS.index("▁ab"), 2]
    assert json.loads(ckpt.files["generation_config.json"].read()) == {"bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a file, and where its header ends."""
    cfg = config(2, 2, 16, layers=1, ffn=32, vocab=270)
    path = write_gguf(tmp_path_factory.mktemp("small") / "x.gguf", state_of(cfg), cfg)
    return path.read_bytes(), min(t.offset for t in read_header(path).tensors)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_header_is_an_error_or_another_model(small, data):
    """Bytes are changed anywhere before the data; nothing but an error of ours may come of it."""
    raw, header = small
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "x.gguf"
        path.write_bytes(damaged)
        try:
            files = llmkit.open_checkpoint(path).files
        except LlmkitError:
            return
        for content in files.values():
            content.read()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", 2**32 - 1, "llama.block_count is 4294967295, for 12 tensors in all"),
        ("llama.attention.head_count", 0, "is 0, expected a positive whole number"),
        ("llama.rope.scaling.factor", "four", "malformed metadata: "),
        ("llama.block_count", "two", "metadata llama.block_count is 'two'; expected a whole number"),
        ("general.architecture", ["llama"], "metadata general.architecture is list; expected text"),
        ("split.count", "2", "metadata split.count is '2'; expected a whole number"),
        ("split.no", 0.5, "metadata split.no is 0.5; expected a whole number"),
        ("general.alignment", True, "metadata general.alignment is True; expected a whole number"),
        ("tokenizer.ggml.model", ["llama"], "metadata tokenizer.ggml.model is list; expected text"),
        ("tokenizer.ggml.tokens", [1, 2], "metadata tokenizer.ggml.tokens is list; expected a list of texts"),
        ("tokenizer.ggml.tokens", 7, "metadata tokenizer.ggml.tokens is 7; expected a list of texts"),
        ("tokenizer.ggml.token_type", [0.5], "token_type is list; expected a list of whole numbers"),
        ("tokenizer.ggml.merges", "a b", "metadata tokenizer.ggml.merges is 'a b'; expected a list of texts"),
        ("tokenizer.ggml.eos_token_id", "</s>", "eos_token_id is '</s>'; expected a whole number"),
        ("tokenizer.ggml.add_bos_token", "no", "add_bos_token is 'no'; expected true or false"),
        ("tokenizer.ggml.scores", [0.5], "tokenizer.ggml.scores has 1 values for 270 tokens"),
        ("llama.feed_forward_length", [32, 32], "llama.feed_forward_length differs from layer to layer"),
    ],
)
def test_values_of_the_wrong_sort(small, tmp_path, key, value, message):
    (tmp_path / "x.gguf").write_bytes(small[0])
    file = read_header(tmp_path / "x.gguf")
    metadata = {**file.metadata, key: value}
    head, _, _ = encode_header(metadata, [(t.name, t.type, t.shape) for t in file.tensors])
    (tmp_path / "y.gguf").write_bytes(head + small[0][small[1] :])
    with pytest.raises(LlmkitError) as caught:
        llmkit.open_checkpoint(tmp_path / "y.gguf")
    assert message in caught.value.message
