"""A codec and a method of a third party: one module each, and an entry point; the commands take them."""

from __future__ import annotations

import sys

import pytest
import torch

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.errors import InputError, PluginError
from llmkit.quantization.codec import folder_codec
from llmkit.quantization.method import method_named

METHOD = """
import torch

from llmkit.quantization.method import Method, QuantizedRows
from llmkit.quantization.packing import pack


class Signs(Method):
    name, words = "signs", "reduced to their signs"

    def quantize(self, weight, grid, scale_dtype, statistics=None):
        rows = weight.float()
        scales = rows.abs().mean(1, keepdim=True).to(scale_dtype)
        codes = torch.where(rows < 0, grid.middle - 1, grid.middle + 1).to(torch.uint8)
        restored = (codes.float() - grid.middle) * scales.float()
        error, norm = float((restored - rows).square().sum()), float(rows.square().sum())
        return QuantizedRows(pack(codes, grid.bits), scales, None, error, norm)


METHOD = Signs()
"""
CODEC = """
from llmkit.quantization.codec import FolderCodec
from llmkit.quantization.matrix import Grid, QuantizedMatrix


class Nibbles(FolderCodec):
    name, bits, group_sizes, holds_zeros = "nibbles", (4,), (), False

    def write(self, matrix):
        return {"nibbles": matrix.codes, "steps": matrix.scales}

    def read(self, parts, settings, shape):
        codes, steps = parts["nibbles"], parts["steps"]
        return QuantizedMatrix(Grid(4), (codes.shape[0], 2 * codes.shape[1]), codes, steps)

    def recognise(self, specs, config):
        names = [name for name in specs if name.endswith(".nibbles")]
        return ("int4 per channel symmetric", names) if names else None

    def matrices(self, stored):
        modules = [name.removesuffix(".nibbles") for name in stored.tensors if name.endswith(".nibbles")]
        ends = ("nibbles", "steps")
        found = {f"{m}.weight": self.read(stored.parts(m, ends), stored.entry, None) for m in modules}
        return found, {f"{m}.{end}" for m in modules for end in ends}

    def describe(self, matrices, ignore, *, are_all, experts=()):
        return {"quant_method": self.name, "modules": sorted(matrices)}


CODEC = Nibbles()
"""


def installed(folder, monkeypatch, **entries):
    """A distribution with entry points, as pip leaves it."""
    info = folder / "third-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third\nVersion: 1.0\n")
    groups = {"methods": "METHOD", "codecs": "CODEC"}
    text = "".join(f"[llmkit.{g}]\n{entries[g]} = third_{g}:{target}\n" for g, target in groups.items() if g in entries)
    (info / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(folder)
    for group in groups:  # of another test
        monkeypatch.delitem(sys.modules, f"third_{group}", raising=False)


def test_the_commands_take_a_method_and_a_codec_of_one_module_each(call, tiny, tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "third_methods.py").write_text(METHOD)
    (tmp_path / "lib" / "third_codecs.py").write_text(CODEC)
    installed(tmp_path / "lib", monkeypatch, methods="signs", codecs="nibbles")
    asked = ["--bits", "4", "--group-size", "channel", "--method", "signs", "--format", "nibbles"]
    done = call("quantize", tiny, *asked, "-o", tmp_path / "q", "--json")
    assert done.code == 0, done.err
    assert "14 linear layers to int4 per channel symmetric, reduced to their signs" in done.document["notes"]
    assert (done.document["recipe"][-1]["method"], done.document["recipe"][-1]["format"]) == ("signs", "nibbles")
    before, after = open_checkpoint(tiny), open_checkpoint(tmp_path / "q")
    assert describe(after) == "int4 per channel symmetric, nibbles"
    floats = dequantized(after)
    assert floats.tensors.keys() == before.tensors.keys()
    for name, restored in floats.tensors.items():
        weight = before.tensors[name].load()
        if "_proj" in name:
            wanted = torch.where(weight < 0, -1.0, 1.0) * weight.abs().mean(1, keepdim=True)
            assert torch.equal(restored.load(), wanted), name
    # What reads a model asks the codec, too.
    assert call("generate", tmp_path / "q", "--help").code == 0
    assert "nibbles" in call("inspect", tmp_path / "q").out
    assert call("convert", tmp_path / "q", "--to", "hf", "--dtype", "float32", "-o", tmp_path / "f").code == 0
    # The methods of others serve the graph, too.
    done = call("export", tiny, "--to", "onnx", *asked[:6], "--symmetric", "--dry-run", "-o", tmp_path / "o")
    assert done.code == 0, done.err
    assert "reduced to their signs" in done.err + done.out


def test_names_that_nothing_registers():
    with pytest.raises(InputError, match=r"--method 'rnt' is unknown; expected .*rtn") as caught:
        method_named("rnt")
    assert caught.value.hint == "did you mean --method rtn?"
    with pytest.raises(InputError, match=r"--format 'marlin' is unknown; expected .*compressed-tensors"):
        folder_codec("marlin")


def test_two_of_one_name_and_one_that_is_broken(call, tiny, tmp_path, monkeypatch):
    installed(tmp_path, monkeypatch, methods="rtn", codecs="broken")
    with pytest.raises(PluginError, match=r"--method rtn is registered by .* and third 1\.0"):
        method_named("rtn")
    with pytest.raises(PluginError, match=r"plugin broken \(third 1\.0\) cannot be loaded"):
        folder_codec("broken")
    assert "plugin broken (third 1.0) cannot be loaded: ModuleNotFoundError" in call("doctor").out
    assert describe(open_checkpoint(tiny)) is None  # opening goes on without it
