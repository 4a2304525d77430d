"""Convert: other containers and dtypes; expected values by torch, loading by transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmkit
from llmkit.errors import InputError
from llmkit.formats.torch_zip import TorchFiles
from llmkit.inspection.check import check_output
from llmkit.quantization.codecs.nbits import CODEC as NBITS
from llmkit.tensors.lazy import Apply
from llmkit.transforms.convert import Overflow, convert

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def source(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k not in ("architectures",)}))
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "float32"}))
    (folder / "generation_config.json").write_text('{"max_length": 7}')
    (folder / "NOTICE").write_bytes(b"kept")
    return folder, {k: v.clone() for k, v in model.state_dict().items()}


def loaded(folder):
    found = {}
    for path in sorted(folder.glob("pytorch_model*.bin")):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        found |= torch.load(path, weights_only=True)
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("size", [10**9, 6000])
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_bin_loads_in_transformers_and_comes_back_bit_for_bit(source, tmp_path, size, dtype):
    from transformers import AutoModelForCausalLM

    folder, state = source
    want = {k: v.to(getattr(torch, dtype)) if dtype else v for k, v in state.items()}
    manifest = llmkit.save(
        convert(llmkit.open_checkpoint(folder), to="bin", dtype=dtype), tmp_path / "bin", max_shard_size=size
    )
    found = loaded(tmp_path / "bin")
    assert found.keys() == want.keys()
    assert all(torch.equal(found[k], want[k]) and found[k].dtype == want[k].dtype for k in want)
    assert manifest["recipe"][-1] == {"transform": "convert", "to": "bin"} | ({"dtype": dtype} if dtype else {})
    assert check_output(tmp_path / "bin").is_ok
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bin")
    assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())
    assert str(model.dtype) == f"torch.{dtype or 'float32'}"
    back = convert(llmkit.open_checkpoint(tmp_path / "bin"), to="hf", dtype="float32")
    llmkit.save(back, tmp_path / "back", max_shard_size=size)
    again = loaded(tmp_path / "back")
    assert all(torch.equal(again[k], want[k].float()) for k in want)
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "float32"
    for name in ("generation_config.json", "NOTICE"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("stored", "to", "values", "n"),
    [
        (torch.float32, "float16", [65504.0, 65519.9, 65520.0, -1e6, float("inf"), float("nan"), 1.0], 2),
        (torch.bfloat16, "float16", [65280.0, 65536.0, -65536.0, float("-inf")], 2),
        (torch.float32, "bfloat16", [3.3e38, 3.3970e38, -3.4028e38], 2),
        (torch.float64, "float32", [1e39, 1e38], 1),
        (torch.float16, "float32", [65504.0], None),
        (torch.bfloat16, "float32", [3.3e38], None),
    ],
)  # fmt: skip
def test_overflow_is_counted_as_torch_casts(tmp_path, stored, to, values, n):
    x = torch.tensor(values, dtype=stored).repeat(3, 1)
    folder = tmp_path / "in"
    folder.mkdir()
    save_file({"w": x, "ok": torch.ones(2, 2, dtype=stored), "i": torch.arange(3)}, folder / "model.safetensors")
    meter = Overflow()
    ckpt = convert(llmkit.open_checkpoint(folder), dtype=to, overflow=meter)
    llmkit.save(ckpt, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    target = getattr(torch, to)
    assert torch.equal(found["w"].nan_to_num(7), x.to(target).nan_to_num(7))
    assert found["i"].dtype == torch.int64
    counted = int((x.to(target).isinf() & x.isfinite()).sum())
    assert counted == 3 * (n or 0)
    assert meter.by_tensor() == ({"w": counted} if counted else {})
    expected = {"overflow": {"total": counted, "tensors": {"w": counted}, "uncounted": []}} if n is not None else {}
    assert meter.as_dict() == expected


def test_a_quantized_checkpoint_goes_as_it_is_or_is_dequantized(source, tmp_path):
    from llmkit.checkpoint.quantized import dequantized
    from llmkit.transforms.quantize import quantize

    folder, _ = source
    llmkit.save(quantize(llmkit.open_checkpoint(folder), bits=8), tmp_path / "int8")
    int8 = llmkit.open_checkpoint(tmp_path / "int8")
    llmkit.save(convert(int8, to="bin"), tmp_path / "bin")
    assert {k: v.dtype for k, v in loaded(tmp_path / "bin").items()} == {
        k: v.dtype for k, v in loaded(tmp_path / "int8").items()
    }
    llmkit.save(convert(int8, to="bin", dtype="float16"), tmp_path / "half")
    found = loaded(tmp_path / "half")
    floats = dequantized(int8).tensors
    assert found.keys() == floats.keys()
    assert all(torch.equal(found[k], floats[k].load().half()) for k in floats)
    assert "quantization_config" not in json.loads((tmp_path / "half/config.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"to": "hff"}, "--to 'hff' is no layout that llmkit writes", "did you mean --to hf?"),
        ({"to": "onnx"}, "--to 'onnx' is no layout that llmkit writes", NBITS.written_by),
        ({"dtype": "int8"}, "--dtype int8: weights are stored as float32, float16, bfloat16", "--dtype float16"),
        (
            {"to": "bin", "wheels": 3},
            "--to bin has no option --wheels; it goes with no layout",
            "leave it out",
        ),
    ],
)
def test_what_cannot_be_converted_to(source, arguments, message, hint):
    with pytest.raises(InputError) as caught:
        convert(llmkit.open_checkpoint(source[0]), **arguments)
    assert caught.value.message.startswith(message)
    assert caught.value.hint == hint


def test_an_interrupted_run_resumes_with_the_same_bytes(tmp_path):
    """The CRCs of tensors that an earlier run wrote come from its journal."""
    folder = tmp_path / "in"
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    save_file({f"t{i}": torch.randn(40, 16, generator=g) for i in range(8)}, folder / "model.safetensors")

    def ckpt(is_broken):
        from dataclasses import replace

        opened = llmkit.open_checkpoint(folder)

        def fn(x):
            if is_broken:
                raise KeyboardInterrupt
            return x + 1

        tensors = {k: Apply("plus", [t], t.spec, lambda x: x + 1).output() for k, t in opened.tensors.items()}
        tensors["t5"] = Apply("plus", [opened.tensors["t5"]], tensors["t5"].spec, fn).output()
        return replace(opened.derive(tensors=tensors), container=TorchFiles())

    with pytest.raises(KeyboardInterrupt):
        llmkit.save(ckpt(True), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    llmkit.save(ckpt(False), tmp_path / "out", workers=1)
    assert json.loads((tmp_path / "out/llmkit.json").read_text())["run"]["steps_resumed"] in (5, 6, 7)
    llmkit.save(ckpt(False), tmp_path / "fresh", workers=1)
    assert (tmp_path / "out/pytorch_model.bin").read_bytes() == (tmp_path / "fresh/pytorch_model.bin").read_bytes()
    assert loaded(tmp_path / "out").keys() == {f"t{i}" for i in range(8)}


def test_a_fresh_process_copies_ahead_and_checks_the_crcs(source, tmp_path):
    folder, state = source
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", "convert", folder, "--to", "bin", "-o", tmp_path / "out", "-q"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = loaded(tmp_path / "out")
    assert all(torch.equal(found[k], state[k]) for k in state)


def test_verify_finds_a_changed_directory_and_a_changed_tensor(source, tmp_path):
    out = tmp_path / "bin"
    llmkit.save(convert(llmkit.open_checkpoint(source[0]), to="bin"), out)
    path = out / "pytorch_model.bin"
    whole = path.read_bytes()
    entry = json.loads((out / "llmkit.json").read_text())["tensors"]["model.norm.weight"]
    for position, problem in (
        (len(whole) - 30, "pytorch_model.bin: its header was changed"),
        (entry["offset"] + 5, "model.norm.weight in pytorch_model.bin was changed: its data has another hash"),
    ):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        problems = check_output(out).problems
        assert any(p.startswith(problem) for p in problems), problems


def test_a_folder_of_an_early_llmkit_verifies_too(source, tmp_path):
    """Its manifest does not say where the tensors lie; its files are safetensors."""
    out = tmp_path / "out"
    llmkit.save(convert(llmkit.open_checkpoint(source[0]), to="hf"), out, max_shard_size=6000)
    manifest = json.loads((out / "llmkit.json").read_text())
    for entry in manifest["tensors"].values():
        del entry["offset"]
    manifest["run"] = {"elapsed_s": 1.0}
    (out / "llmkit.json").write_text(json.dumps(manifest))
    assert check_output(out).is_ok
    path = sorted(out.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "its data has another hash" in check_output(out).problems[0]
