"""A layout of another distribution: one module that registers itself, opened and written like those of llmkit."""

from __future__ import annotations

import json

import pytest
import torch
from layout_world import config, same, state_of, write_hf

import llmkit
from llmkit.cli.app import main
from llmkit.errors import InputError
from llmkit.layouts.opening import layouts
from llmkit.transforms.convert import convert, targets
from tests.registered import install

BOX = '''
"""A file `weights.box`: the length of a JSON header (name -> shape, and the config), the header, float32 tensors."""

import json

from llmkit.architecture.names import Names
from llmkit.formats.stream import StreamFile
from llmkit.layouts.layout import Layout, OpenedLayout, Spelling, WrittenLayout, to_hf, weights_for
from llmkit.tensors.lazy import Read
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType, TensorSpec

SLOTS = {"attn_norm": "n1", "attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.o": "o", "mlp_norm": "n2",
         "mlp.gate": "g", "mlp.up": "u", "mlp.down": "d"}
SPELLING = Spelling(Names("in", "norm", "out", "b{i}.", SLOTS), "interleaved")


def find(candidate):
    if "weights.box" not in candidate.names:
        return None
    source = SourceFile(candidate.folder / "weights.box")
    length = int.from_bytes(source.read(0, 8), "little")
    header = json.loads(source.read(8, length))
    position, tensors = 8 + length, {}
    for name, shape in header["tensors"].items():
        spec = TensorSpec(DType.F32, tuple(shape))
        tensors[name] = Read(name, spec, source, position).output()
        position += spec.nbytes
    return OpenedLayout("box", to_hf("weights.box", tensors, header["config"], SPELLING), header["config"])


def write(tensors, config, note=""):
    model, weights = weights_for("box", tensors, config, config, SPELLING)
    table = model.spelled(SPELLING.names).table
    stored = {table.name(slot): lazy.cast(DType.F32) for slot, lazy in weights.items()}
    shapes = {name: list(lazy.shape) for name, lazy in stored.items()}
    header = json.dumps({"tensors": shapes, "config": dict(config), "note": note}).encode()
    return WrittenLayout(stored, StreamFile("weights.box", [len(header).to_bytes(8, "little") + header, *stored]))


LAYOUT = Layout("box", find, write, "weights.box", ("note",), (SPELLING,), has_own_format=True)
'''


def test_a_layout_of_one_module_is_written_and_opened(tmp_path, monkeypatch, capsys):
    cfg = config()
    state = state_of(cfg)
    source = write_hf(tmp_path / "hf", cfg, state)
    with pytest.raises(InputError, match="--to 'box' is no layout that llmkit writes"):
        convert(llmkit.open_checkpoint(source), to="box")
    install(tmp_path / "lib", monkeypatch, "llmkit.layouts", "box", "third_box:LAYOUT", BOX)
    assert targets()["box"].options == ("note",)
    llmkit.save(convert(llmkit.open_checkpoint(source), to="box", note="hello"), tmp_path / "box")
    raw = (tmp_path / "box" / "weights.box").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["note"] == "hello"
    assert header["tensors"]["b0.q.weight"] == [32, 32]
    opened = llmkit.open_checkpoint(tmp_path / "box")
    assert opened.layout == "box"
    same(opened, state)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "box"), "--to", "bin", "-o", str(tmp_path / "bin")]) == 0
    assert torch.equal(llmkit.open_checkpoint(tmp_path / "bin")["lm_head.weight"].load(), state["lm_head.weight"])


def test_a_layout_that_cannot_be_loaded(tmp_path, monkeypatch, capsys):
    """Every model opens without it, and `doctor` names it."""
    before = layouts()
    install(tmp_path / "lib", monkeypatch, "llmkit.layouts", "torn", "third_torn:LAYOUT", "1 / 0\n")
    assert layouts() == before
    cfg = config()
    assert llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state_of(cfg))).layout == "hf"
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert any("torn" in json.dumps(f) and "ZeroDivisionError" in json.dumps(f) for f in found["findings"])
