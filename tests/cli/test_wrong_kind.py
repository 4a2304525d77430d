"""Every command that takes a model, given everything that is none: refused by what it is, with a way out."""

from __future__ import annotations

import json
import re
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from word_model import write_model

from llmkit.api import save
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.transforms import delta as deltas
from llmkit.transforms.convert import convert


def linear(state):
    return {k: v for k, v in state.items() if "_proj" in k}


def packed(state, parts):
    """A state whose linear layers are replaced by what `parts(out, in)` gives, leaf -> tensor."""
    found = {k: v.half() for k, v in state.items() if k not in linear(state)}
    for name, w in linear(state).items():
        found |= {name.removesuffix("weight") + leaf: t for leaf, t in parts(*w.shape).items()}
    return found


def words(*shape):
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def small(*shape, dtype=torch.int8):
    return torch.randint(0, 100, shape).to(dtype)


def half(*shape):
    return torch.rand(shape).half()


QUANTIZED = {
    "gptq": (lambda o, i: {"qweight": words(i // 8, o), "qzeros": words(i // 32, o // 8), "scales": half(i // 32, o),
                           "g_idx": torch.arange(i, dtype=torch.int32) // 32}, "int4 group 32, gptq"),
    "gptq8": (lambda o, i: {"qweight": words(i // 4, o), "qzeros": words(1, o // 4), "scales": half(1, o)},
              "int8.*gptq"),
    "gptq_of_march_2023": (lambda o, i: {"qweight": words(i // 8, o), "zeros": half(o, 1).float(),
                                         "scales": half(o, 1).float()}, "gptq"),
    "awq": (lambda o, i: {"qweight": words(i, o // 8), "qzeros": words(i // 32, o // 8), "scales": half(i // 32, o)},
            "int4 group 32, awq"),
    "awq_gemv": (lambda o, i: {"qweight": words(o, i // 8), "qzeros": words(o, 4), "scales": half(o, 32)}, "awq"),
    "packed": (lambda o, i: {"weight_packed": words(o, i // 8), "weight_scale": half(o, i // 32),
                             "weight_shape": torch.tensor([o, i])}, "compressed-tensors"),
    "integers": (lambda o, i: {"weight": small(o, i)}, "unknown method"),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    d = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    base = write_model(d / "base", torch_dtype="float16")
    state = {k: v.half() for k, v in load_file(base / "model.safetensors").items()}
    save_file(state, base / "model.safetensors", {"format": "pt"})
    beside = [p for p in base.iterdir() if p.suffix == ".json"]

    def folder(name, tensors=None, file="model.safetensors", *, files=beside):
        (d / name).mkdir()
        for path in files:
            (d / name / path.name).write_bytes(path.read_bytes())
        if tensors is not None:
            save_file({k: v.contiguous() for k, v in tensors.items()}, d / name / file, {"format": "pt"})
        return d / name

    tuned = {k: (v.float() + torch.randn(v.shape) * 1e-3).half() for k, v in state.items()}
    folder("tuned", tuned)
    folder("published_delta", {k: tuned[k] - v for k, v in state.items()})
    save(deltas.make(open_checkpoint(base), open_checkpoint(d / "tuned")), d / "delta")
    q = "base_model.model.model.layers.0.self_attn.q_proj."
    update = {f"{q}lora_A.weight": torch.rand(4, 64), f"{q}lora_B.weight": torch.rand(64, 4)}
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
             "base_model_name_or_path": "some-base"}  # fmt: skip
    for name, tensors in (("adapter", None), ("several", state)):
        folder(name, tensors, files=beside if tensors else ())
        save_file(update, d / name / "adapter_model.safetensors", {"format": "pt"})
        (d / name / "adapter_config.json").write_text(json.dumps(about))
    for name, (parts, _) in QUANTIZED.items():
        folder(name, packed(state, parts))
    torch.save(packed(state, QUANTIZED["gptq"][0]), folder("gptq_for_llama") / "llama-4bit-32g.pt")
    torch.save({"state": {0: {"exp_avg": torch.rand(4, 4), "exp_avg_sq": torch.rand(4, 4)}}}, d / "optimizer.pt")
    observed = {f"layers.0.attn.q.weight.{part}": torch.rand(64) for part in ("squares", "maxima")}
    save_file(observed, d / "statistics.safetensors", {"llmkit.statistics": '{"tokens": 9}'})
    distributions = {name: torch.rand(9) for name in ("codes", "high", "step", "top", "nll")}
    save_file(distributions, d / "distributions.safetensors", {"format": "llmkit.reference/1"})
    save(convert(open_checkpoint(base), to="gguf", type="q8_0"), d / "gguf_q8_0")
    folder("tokenizer", files=[p for p in beside if p.name.startswith("tokenizer")])
    folder("empty", files=())
    folder("diffusers", files=())
    (d / "diffusers" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (d / "diffusers" / "unet").mkdir()
    folder("flax", files=beside)
    (d / "flax" / "flax_model.msgpack").write_bytes(b"\x81\xa5model\x80")
    (d / "runs" / "checkpoint-10").mkdir(parents=True)
    (d / "runs" / "checkpoint-10" / "config.json").write_text("{}")
    (d / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with zipfile.ZipFile(d / "archive.zip", "w") as archive:
        archive.writestr("model/config.json", "{}")
    (d / "text.txt").write_text("t1 t2 t3 t4 " * 50)
    return d


NOT_OPENED = {
    "tokenizer": "a tokenizer", "empty": "empty", "diffusers": "pipeline of diffusers", "flax": "flax_model.msgpack",
    "runs": "runs/checkpoint-10", "image.png": "a PNG image", "archive.zip": "zip", "text.txt": "text",
    "optimizer.pt": "found the keys state",
}  # fmt: skip
# What a codec reads, and the commands that take it: they are tried below.
READ = ("gptq_for_llama", "gptq", "gptq8", "gptq_of_march_2023", "awq", "awq_gemv")
READERS = ("generate", "perplexity", "export", "convert")
WORDS = {name: said for name, (_, said) in QUANTIZED.items()} | NOT_OPENED | {
    "gptq_for_llama": "int4 group 32, gptq", "delta": "a delta", "published_delta": "a delta",
    "statistics.safetensors": "statistics of the inputs",
    "distributions.safetensors": "a reference of llmkit perplexity",
    "adapter": "a LoRA adapter of rank 4 for some-base", "several": "a model and an adapter at once",
}  # fmt: skip


def commands(x, d, out):
    model, adapter = d / "base", d / "adapter"
    yield from (
        ("generate", x, "t1", "--max-tokens", "1"), ("generate", x, "t1", "--backend", "transformers"),
        ("perplexity", x, "--text", d / "text.txt"), ("export", x, "--no-check", "-o", out),
        ("quantize", x, "--bits", "8", "-o", out), ("convert", x, "--to", "hf", "-o", out),
        ("quantize", x, "--bits", "8", "--calibration", d / "text.txt", "-o", out),
        ("convert", x, "--to", "gguf", "-o", out), ("lora", "merge", x, adapter, "-o", out),
        ("lora", "extract", model, x, "--rank", "2", "-o", out), ("delta", "make", model, x, "-o", out),
        ("delta", "make", x, model, "-o", out), ("delta", "apply", x, d / "published_delta", "-o", out),
        ("delta", "apply", model, x, "-o", out, "--dry-run"), ("plugins", "new", x),
    )  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_every_command_says_what_it_was_given(world, call, tmp_path, name):
    for args in commands(world / name, world, out := tmp_path / "out"):
        if name in READ and args[0] in READERS:
            continue
        if name in ("delta", "published_delta") and (args[:2] == ("delta", "apply") and args[3] == world / name):
            continue  # the one command that wants it
        if name == "published_delta" and args[0] == "convert":
            done = call(*args, "--overwrite")  # its layout may change; what is written is a delta, too
            assert done.code == 0, args
            assert "is a delta" in " ".join(done.err.split())
            shutil.rmtree(out)
            continue
        if name == "several" and args[:2] == ("delta", "apply") and "--dry-run" not in args:
            continue  # refused as the same kind, by the check of the base
        done = call(*args)
        said = " ".join(done.err.split())
        assert done.code == 2, (args, done)
        assert re.search(WORDS[name], said), (args, said)
        assert "hint: " in said, (args, said)
        assert not out.exists(), args


@pytest.mark.parametrize("name", READ)
def test_what_a_codec_reads_is_a_model_to_every_command(world, call, tmp_path, name):
    """Zero points, scales and bits come from the tensors alone: no config.json here speaks of a quantization."""
    for args in commands(world / name, world, tmp_path / "out"):
        if args[0] in READERS and "transformers" not in args:
            done = call(*args)
            assert done.code == 0, (args, done)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("name", [n for n in WORDS if n not in NOT_OPENED])
def test_inspect_names_it(world, call, name):
    done = call("inspect", world / name)
    assert done.code == 0, done.err
    assert re.search(WORDS[name], " ".join(done.out.split())), done.out
    assert call("inspect", world / name, "--json").document["kind"] != "model" or name in [
        *QUANTIZED,
        "gptq_for_llama",
    ]


def test_blocks_of_a_gguf_are_floats_to_read_and_not_to_round_again(world, call, tmp_path):
    gguf, out = world / "gguf_q8_0", tmp_path / "out"
    assert call("convert", gguf, "--to", "hf", "-o", tmp_path / "floats").code == 0
    assert "Q8_0" in call("inspect", gguf).out
    for args in (("quantize", gguf, "--bits", "8"), ("lora", "merge", gguf, world / "adapter"),
                 ("delta", "make", world / "base", gguf)):  # fmt: skip
        done = call(*args, "-o", out)
        said = " ".join(done.err.split())
        assert (done.code, "already quantized (Q8_0" in said, "--to dense" in said) == (2, True, True), said
    again = ("convert", gguf, "--to", "gguf", "--type", "q4_0", "-o", out)
    done = call(*again)
    assert (done.code, "would round" in done.err, "--requantize" in done.err) == (2, True, True)
    done = call(*again, "--requantize")
    assert (done.code, "rounded again" in done.out + done.err) == (0, True)
