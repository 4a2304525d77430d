"""Every method in every layout, at all bits: a folder that computes what its codes say, or one line before any work."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from word_model import write_model

import llmkit
from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.file_content import FileContent
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.quantization.codec import FolderCodec, folder_readers

METHODS = ["rtn", "mse", "hqq", "gptq", "gptq-fast", "awq", "awq-gptq", "signround", "gptq-signround"]
FORMATS = [reader.name for reader in folder_readers() if isinstance(reader, FolderCodec)]
TABLE = list(itertools.product(METHODS, FORMATS, (2, 3, 4, 8), ("--symmetric", "--asymmetric")))
STEP = 31  # of the table, each family takes other rows: a prime, so that all methods, layouts and bits meet
FAMILIES = {"plain": ("llama", None), "tied": ("llama", "tied"), "fused": ("phi3", None), "Conv1D": ("gpt2", None)}
WIDTHS = {"hidden": 64, "ffn": 96, "vocab": 130}
IDS = torch.tensor([[5, 9, 33, 21, 8, 100, 40, 3]])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model of each family, rows of 64 and 96 weights, all with one tokenizer; and a text."""
    d = tmp_path_factory.mktemp("every")
    files = write_model(d / "words")
    plugins = {plugin.name: plugin for plugin in default_registry().plugins}
    for name, (family, variant) in FAMILIES.items():
        architecture = default_registry().load(plugins[family])
        config = architecture.tiny_config(variant)
        keys = architecture.bind(config).dims.keys
        config |= {keys[role]: n for role, n in WIDTHS.items() if role in keys} | {"dtype": "float32"}
        tokenizer = {file.name: FileContent(data=file.read_bytes()) for file in files.glob("tokenizer*")}
        llmkit.save(random_checkpoint(architecture, config).derive(files=tokenizer), d / name)
    (d / "text.txt").write_text("t1 t2 t3 t4 t5 t6 t7 t8 " * 40)
    return d


def quantized(call, world, model, method, layout, bits, symmetry, out):
    text = ["--calibration", "none"] if method in ("rtn", "hqq") else [
        "--calibration", world / "text.txt", "--samples", 2, "--length", 8
    ]  # fmt: skip
    learning = ["--iterations", 1] if "signround" in method else []
    return call("quantize", model, "--bits", bits, "--method", method, "--format", layout, symmetry, *text, *learning,
                "-o", out)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_combination_writes_what_it_says_or_refuses_at_once(world, call, tmp_path, family):
    wrong, written = {}, 0
    for row in TABLE[list(FAMILIES).index(family) :: STEP]:
        out = tmp_path / "-".join(map(str, row))
        done = quantized(call, world, world / family, *row, out)
        if done.code == 0:
            written += 1
            assert call("convert", out, "--to", "dense", "-o", f"{out}-dense").code == 0, row
            found, wanted = (load_decoder(llmkit.open_checkpoint(x))(IDS) for x in (out, f"{out}-dense"))
            if not float((found - wanted).abs().max()) < 1e-3:
                wrong[row] = "other logits"
        else:
            lines = [line for line in done.err.splitlines() if not line.startswith(("warning", "note"))]
            starts = [line.partition(":")[0] for line in lines]
            is_clean = not out.exists() and not out.with_name(f"{out.name}.partial").exists()
            if done.code != 2 or starts != ["error", "hint"] or not is_clean:
                wrong[row] = done.code, is_clean, done.err[-300:]
    assert not wrong
    assert written >= 3


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "signround"])
def test_a_group_above_zero_has_a_zero_point_that_the_first_gptq_holds(world, call, tmp_path, method):
    """Its range begins at 0, whose code would be 0, stored minus 1."""
    model = tmp_path / "m"
    made = write_model(model)
    tensors = load_file(made / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].abs() + 0.01
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    done = quantized(call, world, model, method, "gptq", 4, "--asymmetric", tmp_path / "q")
    assert done.code == 0, done.err
    assert call("convert", tmp_path / "q", "--to", "dense", "-o", tmp_path / "dense").code == 0
    error = load_file(tmp_path / "dense" / "model.safetensors")[name] - tensors[name]
    assert error.norm() < 0.15 * tensors[name].norm()


@pytest.mark.parametrize("more", [["--act-order"], []])
@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
def test_a_plan_computes_nothing(world, call, tmp_path, monkeypatch, layout, more):
    """Not even the order of columns that is stored beside the codes."""
    monkeypatch.setattr("llmkit.calibration.quantizer.CalibratedQuantizer.parts", None)
    done = call("quantize", world / "plain", "--bits", 4, "--format", layout, "--method", "gptq", *more,
                "--calibration", world / "text.txt", "--length", 8, "--dry-run", "-o", tmp_path / "q")  # fmt: skip
    assert done.code == 0, done.err


def test_a_matrix_below_what_its_scales_hold_is_not_rounded_to_zero(call, tmp_path):
    model = write_model(tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] * 1e-9}, model / "model.safetensors", {"format": "pt"})
    done = call("quantize", model, "--bits", 4, "--calibration", "none", "--format", "awq", "-o", tmp_path / "q")
    assert done.code == 2
    assert f"{name}: the weights reach" in done.err
    assert "with scales in float16 all would be 0" in done.err
    assert not (tmp_path / "q.partial").exists()
