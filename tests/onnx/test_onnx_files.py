"""Where weights lie that an export writes: one file, or several of a size that is asked for."""

from __future__ import annotations

import onnx
import pytest
import torch
from safetensors.torch import load_file

from llmkit.api import save
from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder.contract import random_checkpoint
from llmkit.errors import RequirementError
from llmkit.onnx.export import export
from llmkit.onnx.precision import Precision
from llmkit.transforms.convert import convert
from llmkit.transforms.quantize import quantize

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
PAGE = 4096


@pytest.fixture
def ckpt(tmp_path):
    architecture = default_registry().load(next(p for p in default_registry().plugins if p.name == "llama"))
    save(random_checkpoint(architecture, architecture.tiny_config()), tmp_path / "model")
    return open_checkpoint(tmp_path / "model")


def places(folder):
    """By tensor: file, offset and length, as onnx reads them."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}
    return {name: (e["location"], int(e["offset"]), int(e["length"])) for name, e in entries.items()}


@pytest.mark.parametrize("most", [5_000_000_000, 30_000, 1])
def test_files_of_a_size(ckpt, tmp_path, most):
    from llmkit.onnx.opening import load_onnx

    whole, out = tmp_path / "whole", tmp_path / "out"
    save(export(ckpt, weights="copy"), whole)
    save(export(ckpt, weights="copy"), out, max_shard_size=most)
    held = places(out)
    files = sorted({file for file, _, _ in held.values()})
    n = len(files)
    assert n == {5_000_000_000: 1, 1: len(held)}.get(most, n)
    named = ["model.onnx.data"] if n == 1 else [f"model.onnx-{i + 1:05d}-of-{n:05d}.data" for i in range(n)]
    assert files == named == sorted(p.name for p in out.glob("*.data"))
    for file in files:
        ends = [offset + length for name, offset, length in held.values() if name == file]
        assert (out / file).stat().st_size == max(ends)
        assert max(ends) <= most or len(ends) == 1
    assert all(offset % PAGE == 0 for _, offset, _ in held.values())
    if most == 30_000:
        assert 1 < n < len(held)
    ids = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_onnx(out)(ids), load_onnx(whole)(ids))
    read = open_checkpoint(out).tensors
    assert all(torch.equal(read[name].load(), lazy.load()) for name, lazy in ckpt.tensors.items())


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_head_that_is_stored_though_the_config_ties_it(tmp_path, is_copy):
    """As in transformers 5: a copy is tied, another matrix is the head."""
    architecture = default_registry().load(next(p for p in default_registry().plugins if p.name == "llama"))
    ckpt = random_checkpoint(architecture, architecture.tiny_config())
    tensors = dict(ckpt.tensors)
    if is_copy:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tied = ckpt.derive(tensors=tensors, config={**ckpt.config, "tie_word_embeddings": True})
    save(tied, tmp_path / "tied", force=True)
    plan = export(open_checkpoint(tmp_path / "tied"))
    told = "is stored, too: a copy of the embedding" if is_copy else "tie_word_embeddings becomes false"
    assert any(told in note for note in plan.notes)
    assert ("lm_head.weight" in plan.container.linked) is not is_copy


def test_a_graph_in_floats_is_an_input_like_any_other_and_one_of_integers_is_none(ckpt, tmp_path):
    save(export(ckpt, weights="copy"), tmp_path / "floats")
    save(export(ckpt, weights="copy", precision=Precision(8, 16)), tmp_path / "integers")
    for name, source in (("of a graph", open_checkpoint(tmp_path / "floats")), ("of a model", ckpt)):
        save(quantize(source, bits=8), tmp_path / name)
    found, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("of a graph", "of a model"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    for to in ("hf", "gguf"):
        with pytest.raises(RequirementError, match=r"already quantized .an ONNX graph's integers.; convert wants"):
            convert(open_checkpoint(tmp_path / "integers"), to=to)
