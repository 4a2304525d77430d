"""Verbs over quantized folders of each layout: what they leave keeps its bytes, what cannot be is refused."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmkit
from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.cli.app import main
from llmkit.decoder.contract import random_checkpoint
from llmkit.errors import RequirementError
from llmkit.quantization.matrix import matrix_of
from llmkit.quantization.packing import pack_words
from llmkit.quantization.recognition import find_quantization
from llmkit.quantization.words import words_of
from llmkit.tensors.lazy import Apply
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.transforms import lora, vocab
from llmkit.transforms.quantize import quantize
from tests.cli.conftest import write_model
from tests.transforms.test_convert_codes import write_adapter
from tests.transforms.test_quantize_loaders import by_bitsandbytes

TOUCHED = "model.layers.0.self_attn.q_proj"
MADE = {
    "pack-quantized": {"bits": 4},
    "float-quantized": {"bits": 8, "type": "fp8"},
    "gptq": {"bits": 4, "format": "gptq", "symmetric": True},
    "gptq_v2": {"bits": 3, "format": "gptq_v2", "symmetric": False},
    "awq": {"bits": 4, "format": "awq"},
    "nf4": {"bits": 4, "format": "bitsandbytes"},
    "nested": {"bits": 4, "format": "bitsandbytes_nested"},
    "int8": {"bits": 8, "format": "bitsandbytes"},
}
# Layouts that differ from one above in what is said of them: by config.json, or by a file beside it.
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
SAID = {
    "fbgemm": ("float-quantized", {"quantization_config": FBGEMM}),
    "no quant_method": ("gptq", {"quantization_config": {"bits": 4, "group_size": 32, "sym": True}}),
    "file alone": ("gptq", {}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    d = tmp_path_factory.mktemp("verbs")
    base = llmkit.open_checkpoint(write_model(d / "float"))
    for name, options in MADE.items():
        llmkit.save(quantize(base, group_size=32 if options["bits"] < 8 else "auto", **options), d / name)
    for name, (source, said) in SAID.items():
        shutil.copytree(d / source, d / name)
        (d / name / "llmkit.json").unlink()
        if said:
            (d / name / "quantize_config.json").unlink(missing_ok=True)
        config = json.loads((d / name / "config.json").read_text())
        del config["quantization_config"]
        (d / name / "config.json").write_text(json.dumps(config | said))
    write_adapter(d / "adapter")
    return d


def weights(folder, **options):
    return {
        name: lazy.load().float()
        for name, lazy in dequantized(llmkit.open_checkpoint(folder), **options).tensors.items()
    }


def update(world):
    factors = load_file(world / "adapter" / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{TOUCHED}.lora_{x}.weight"] for x in "AB")
    return 2 * b @ a


@pytest.mark.parametrize("name", [name for name in [*MADE, *SAID] if name != "fbgemm"])
def test_a_merge_stays_in_the_layout_of_its_base(world, tmp_path, name):
    """Which of two versions of a layout it is, too. The rest keeps its bytes, but for the last bit of SCB."""
    base = llmkit.open_checkpoint(world / name)
    llmkit.save(lora.merge(base, [lora.open_adapter(world / "adapter")], requantize=True), tmp_path / "out")
    merged = llmkit.open_checkpoint(tmp_path / "out")
    assert describe(merged) == describe(base)
    assert {n: lazy.spec for n, lazy in merged.tensors.items()} == {n: lazy.spec for n, lazy in base.tensors.items()}
    for n, lazy in base.tensors.items():
        if not n.startswith(f"{TOUCHED}."):
            found, stored = merged.tensors[n].load(), lazy.load()
            assert torch.equal(found, stored) or (n.endswith(".SCB") and torch.allclose(found, stored, rtol=1e-6)), n
    before, after = weights(world / name)[f"{TOUCHED}.weight"], weights(tmp_path / "out")[f"{TOUCHED}.weight"]
    wanted = before + update(world)
    assert (after - wanted).norm() < 0.35 * (before - wanted).norm()


@pytest.mark.parametrize("name", [*MADE, *SAID])
def test_the_way_to_floats_works(world, tmp_path, monkeypatch, capsys, name):
    """What refuses a quantized model names a command; what that writes merges exactly."""
    monkeypatch.chdir(tmp_path)
    adapter = lora.open_adapter(world / "adapter")
    with pytest.raises(RequirementError, match="already quantized") as caught:
        lora.merge(llmkit.open_checkpoint(world / name), [adapter])
    for args in (["--bits", "8"], ["--bits", "4", "--format", "gptq"], ["--bits", "4", "--format", "gguf"]):
        assert main(["quantize", str(world / name), *args, "--calibration", "none", "-o", "q"]) == 2
        said = capsys.readouterr().err
        assert "already quantized" in said
        assert "--to dense" in said
    command = caught.value.hint.split("`")[1]
    assert main(shlex.split(command)[1:]) == 0
    llmkit.save(lora.merge(llmkit.open_checkpoint("FLOATS"), [adapter], dtype="float32"), tmp_path / "merged")
    before = weights(world / name)
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.allclose(after[f"{TOUCHED}.weight"], before[f"{TOUCHED}.weight"] + update(world), atol=1e-5)
    assert all(torch.equal(after[n].float(), w) for n, w in before.items() if not n.startswith(TOUCHED))


@pytest.mark.parametrize(("bits", "format"), [(4, "bitsandbytes"), (8, "bitsandbytes"), (4, "gptq")])
def test_an_adapter_in_layers_that_are_stored_transposed(tmp_path, monkeypatch, bits, format):
    """GPT-2's Conv1D, of which transformers makes linear layers for bitsandbytes, and GPTQ's loaders do."""
    architecture = default_registry().load(next(p for p in default_registry().plugins if p.name == "gpt2"))
    config = architecture.tiny_config() | {"n_embd": 64, "n_head": 2}
    llmkit.save(quantize(random_checkpoint(architecture, config), bits=bits, format=format), tmp_path / "q")
    module = "transformer.h.0.attn.c_attn"
    shape = weights(tmp_path / "q")[f"{module}.weight"].shape
    assert shape == (64, 192)
    a, b = torch.randn(4, 64) * 0.1, torch.randn(192, 4) * 0.1
    (tmp_path / "a").mkdir()
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(about))
    names = (f"base_model.model.{module}.lora_{x}.weight" for x in "AB")
    save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "a" / "adapter_model.safetensors")
    base = llmkit.open_checkpoint(tmp_path / "q")
    llmkit.save(lora.merge(base, [lora.open_adapter(tmp_path / "a")], requantize=True), tmp_path / "out")
    before, after = weights(tmp_path / "q"), weights(tmp_path / "out")
    wanted = before[f"{module}.weight"] + 2 * (b @ a).T
    assert (after[f"{module}.weight"] - wanted).norm() < 0.35 * (before[f"{module}.weight"] - wanted).norm()
    assert all(torch.equal(after[n], w) or bits == 8 for n, w in before.items() if not n.startswith(module))
    if format == "bitsandbytes":
        from transformers import GPT2Config, GPT2LMHeadModel

        entry = llmkit.open_checkpoint(tmp_path / "out").config["quantization_config"]
        taken = by_bitsandbytes(monkeypatch, GPT2LMHeadModel(GPT2Config(**config)), entry)
        assert taken == {name.removesuffix(".weight") for name in before if ".h." in name and before[name].dim() == 2}


def test_words_for_several_bits_and_for_floats():
    def layer(name, bits):
        return {
            f"{name}.qweight": TensorSpec(DType.I32, (64 * bits // 32, 32)),
            f"{name}.qzeros": TensorSpec(DType.I32, (2, 32 * bits // 32)),
            f"{name}.scales": TensorSpec(DType.F16, (2, 32)),
        }

    specs = layer("a", 8) | layer("b", 4) | layer("c", 4)
    found = find_quantization(specs, {"quantization_config": {"bits": 4}})
    assert str(found) == "int4 group 32, int8 group 32, gptq"
    packed = {"a.weight_packed": TensorSpec(DType.U8, (32, 32)), "a.weight_scale": TensorSpec(DType.U8, (32, 2))}
    entry = {"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp", "group_size": 32}
    assert str(find_quantization(packed, {"quantization_config": entry})).startswith("float4")


def test_a_vocabulary_without_float_rows_is_refused_with_a_way(world, tmp_path):
    """ChatGLM's int8 embedding; and sizes that only the language part of a model's config has."""
    (tmp_path / "text.txt").write_text("w1 w2 quokka\n")
    ckpt = llmkit.open_checkpoint(world / "float")
    rows = ckpt.tensors["model.embed_tokens.weight"]
    whole = Apply("int8", [rows], TensorSpec(DType.I8, rows.shape), lambda x: x.to(torch.int8)).output()
    tensors = {**ckpt.tensors, "model.embed_tokens.weight": whole}
    with pytest.raises(RequirementError, match=r"embed_tokens\.weight is I8: rows cannot be added") as caught:
        vocab.extend(ckpt.derive(tensors=tensors), tmp_path / "text.txt")
    assert "float model first" in caught.value.hint
    config = {"model_type": "llava", "text_config": dict(ckpt.config)}
    with pytest.raises(RequirementError, match=r"no embedding found.*none of vocab_size") as caught:
        vocab.extend(ckpt.derive(config=config), tmp_path / "text.txt")
    assert "language model alone" in caught.value.hint


def merged_into(base, world, out):
    """The base with the adapter in it, from disk."""
    llmkit.save(lora.merge(base, [lora.open_adapter(world / "adapter")], requantize=True), out)
    return llmkit.open_checkpoint(out)


FP8_TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("float-quantized", FP8_TOKENS), ("float-quantized", None), ("pack-quantized", FP8_TOKENS)],
)
def test_a_merge_says_of_inputs_what_its_base_says(world, tmp_path, name, inputs):
    """FP8_DYNAMIC of llm-compressor, float8 weights alone, and W4AFP8: vLLM rounds inputs by what is said."""
    base = llmkit.open_checkpoint(world / name)
    entry = json.loads(json.dumps(base.config["quantization_config"]))
    for group in entry["config_groups"].values():
        group["input_activations"] = inputs
    base = base.derive(config={**base.config, "quantization_config": entry})
    found = merged_into(base, world, tmp_path / "out").config["quantization_config"]
    assert [group["input_activations"] for group in found["config_groups"].values()] == [inputs]
    assert found == entry


@pytest.mark.parametrize("name", ["nf4", "nested", "gptq"])
def test_what_is_rounded_again_keeps_the_dtypes_that_are_stored(world, tmp_path, name):
    """Not those of config.json, which says how the whole model is loaded."""
    base = llmkit.open_checkpoint(world / name)
    base = base.derive(config={**base.config, "torch_dtype": "bfloat16"})
    merged = merged_into(base, world, tmp_path / "out")
    assert {n: lazy.spec for n, lazy in merged.tensors.items()} == {n: lazy.spec for n, lazy in base.tensors.items()}
    states = [n for n in base.tensors if "quant_state" in n]
    assert bool(states) == (name != "gptq")
    for n in states:
        before, after = (json.loads(bytes(x.tensors[n].load().tolist())) for x in (base, merged))
        assert before.pop("nested_offset", 0) == after.pop("nested_offset", 0) or n.startswith(TOUCHED)
        assert after == before


def test_a_form_that_is_not_written_is_said(world, tmp_path):
    """AWQ's GEMV becomes GEMM where an adapter changes it."""
    base = llmkit.open_checkpoint(world / "awq")
    tensors = {n: lazy.load() for n, lazy in base.tensors.items()}
    for name, lazy in dequantized(base).tensors.items():
        if (matrix := matrix_of(lazy)) is None:
            continue
        n_out, stem = matrix.shape[0], name.removesuffix("weight")
        scales, zeros = torch.zeros(n_out, 32, dtype=torch.float16), torch.zeros(n_out, 32, dtype=torch.uint8)
        scales[:, : matrix.n_groups], zeros[:, : matrix.n_groups] = matrix.scales.load(), matrix.zeros.load()
        tensors[f"{stem}qweight"], tensors[f"{stem}scales"] = words_of(matrix).load(), scales
        tensors[f"{stem}qzeros"] = pack_words(zeros, 4)
    (tmp_path / "gemv").mkdir()
    save_file(tensors, tmp_path / "gemv" / "model.safetensors")
    entry = {**base.config["quantization_config"], "version": "gemv"}
    (tmp_path / "gemv" / "config.json").write_text(json.dumps({**base.config, "quantization_config": entry}))
    before = weights(world / "awq")
    assert all(torch.equal(w, before[n]) for n, w in weights(tmp_path / "gemv").items())
    adapter = lora.open_adapter(world / "adapter")
    said = lora.merge(llmkit.open_checkpoint(tmp_path / "gemv"), [adapter], requantize=True).notes
    assert "stored as int4 group 32, awq; the base is int4 (gemv), awq" in said
    assert not any("the base is" in note for note in lora.merge(base, [adapter], requantize=True).notes)
