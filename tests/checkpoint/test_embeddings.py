"""Whether embedding and head are one matrix follows from the files, in every command, as in transformers 5."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import llmkit
from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.embeddings import find_embeddings, with_true_tying
from llmkit.decoder.contract import random_checkpoint
from llmkit.errors import InputError, RequirementError
from llmkit.tensors.equality import are_equal
from llmkit.transforms import delta
from llmkit.transforms.convert import convert

FAMILIES = ("llama", "gpt2", "bloom", "gpt_neox", "gemma2")
# What config.json says, and what is stored: the head as another matrix, as a copy, alone, or not at all.
STATES = {
    "tied": (True, "none"), "copy": (True, "copy"), "untied": (False, "other"), "wrongly tied": (True, "other"),
    "default": (None, "other"), "default, copy": (None, "copy"), "head only": (True, "alone"),
}  # fmt: skip
IS_OLD = int(transformers.__version__.split(".")[0]) < 5
ARCHITECTURES = {p.name: default_registry().load(p) for p in default_registry().plugins if p.name in FAMILIES}


def written(folder, family, state):
    """A folder in that state, written without llmkit's opening."""
    says, stored = STATES[state]
    architecture = ARCHITECTURES[family]
    config = architecture.tiny_config() | {"tie_word_embeddings": False, "dtype": "float32"}
    tensors = {n: t.load() for n, t in random_checkpoint(architecture, config).tensors.items()}
    model = architecture.bind(config)
    embed, head = model.name_of("embed.weight"), model.name_of("head.weight")
    if stored == "none":
        del tensors[head]
    elif stored in ("copy", "alone"):
        tensors[head] = tensors[embed].clone()
    if stored == "alone":
        del tensors[embed]
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config["tie_word_embeddings"] = says
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def by_transformers(folder, ids):
    """What transformers computes; of 4.57, which ties by the config alone, right only where that is true."""
    with torch.no_grad():
        auto = transformers.AutoModelForCausalLM
        return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()(ids).logits


def decoder_logits(source, ids):
    ckpt = source if isinstance(source, llmkit.Checkpoint) else open_checkpoint(source)
    with torch.no_grad():
        return llmkit.load_decoder(ckpt)(ids)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_command_uses_the_head_that_transformers_uses(tmp_path, family, state):
    says, stored = STATES[state]
    folder = written(tmp_path / "m", family, state)
    if (family, state) == ("llama", "default, copy"):
        pytest.skip("untied by default, and equal")
    ids = torch.arange(12).view(1, 12)
    plain = written(tmp_path / "plain", family, "untied" if stored == "other" else "tied")
    expected = by_transformers(plain, ids)
    ckpt = open_checkpoint(folder)
    is_tied = stored != "other" and find_embeddings(ckpt).is_tied
    assert is_tied is (stored != "other" and (says is not None or family != "gpt_neox"))
    assert any("becomes false" in n for n in ckpt.notes) is (
        stored == "other" and (says or (says is None and family in ("gpt2", "bloom", "gemma2"))) is True
    )

    def is_right(found):
        return (found - expected).abs().max() < 1e-3

    assert IS_OLD or is_right(by_transformers(folder, ids))
    assert is_right(decoder_logits(ckpt, ids))
    llmkit.save(convert(ckpt), tmp_path / "hf")
    assert is_right(by_transformers(tmp_path / "hf", ids))
    stated = json.loads((tmp_path / "hf/config.json").read_text()).get("tie_word_embeddings")
    assert stated is (False if stored == "other" and stated is not None else says)
    if family != "gemma2":  # whose tiny model has a scale that GGUF has no key for
        llmkit.save(convert(ckpt, to="gguf", type="f32"), tmp_path / "gguf")
        assert is_right(decoder_logits(tmp_path / "gguf", ids))
    elif stored == "other":
        with pytest.raises(RequirementError, match="head is not tied"):
            convert(ckpt, to="gguf", type="f32")
    other = open_checkpoint(plain)
    llmkit.save(delta.make(other, ckpt), tmp_path / "delta")
    assert is_right(decoder_logits(delta.apply(other, open_checkpoint(tmp_path / "delta")), ids))


@pytest.mark.parametrize(("before", "after"), [("tied", "wrongly tied"), ("tied", "untied"), ("untied", "tied")])
def test_a_delta_between_a_tied_and_an_untied_model(tmp_path, before, after):
    base, tuned = (written(tmp_path / n, "llama", s) for n, s in (("base", before), ("tuned", after)))
    ids = torch.arange(12).view(1, 12)
    llmkit.save(delta.make(open_checkpoint(base), open_checkpoint(tuned)), tmp_path / "delta")
    llmkit.save(delta.apply(open_checkpoint(base), open_checkpoint(tmp_path / "delta")), tmp_path / "out")
    plain = written(tmp_path / "plain", "llama", "tied" if after == "tied" else "untied")
    assert (by_transformers(tmp_path / "out", ids) - by_transformers(plain, ids)).abs().max() < 1e-3


def test_large_matrices_are_compared_where_they_are_read(tmp_path):
    """Opening reads some of both; a difference elsewhere is found by whoever reads the embedding."""
    folder = written(tmp_path / "m", "llama", "copy")
    stated = open_checkpoint(folder).config

    def opened():
        return with_true_tying(replace(open_checkpoint(folder), config=stated), limit=2**12)

    assert find_embeddings(opened()).is_tied
    llmkit.load_decoder(opened())
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}  # old versions map the file
    seen = {}
    for row in range(len(tensors["lm_head.weight"])):
        changed = tensors["lm_head.weight"].clone()
        changed[row] += 1
        save_file(tensors | {"lm_head.weight": changed}, folder / "model.safetensors", metadata={"format": "pt"})
        ckpt = opened()
        seen[row] = ckpt.config["tie_word_embeddings"]
        if seen[row]:
            with pytest.raises(InputError, match="differs in some rows") as caught:
                llmkit.load_decoder(ckpt)
            assert "tie_word_embeddings" in caught.value.hint
    assert set(seen.values()) == {True, False}
    assert seen[0] is seen[max(seen)] is False


def test_a_head_packed_by_a_quantization_is_no_embedding(tmp_path):
    folder = written(tmp_path / "m", "llama", "tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight_packed"] = torch.zeros(4, 4, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(folder).config["tie_word_embeddings"] is False


def test_copies_in_one_storage_are_equal_unread(tmp_path):
    folder = written(tmp_path / "m", "llama", "tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    ckpt = open_checkpoint(folder)
    reads = [ckpt.tensors[n].reads()[0] for n in ("lm_head.weight", "model.embed_tokens.weight")]
    for read in reads:
        read.source.close()
        read.source.read = None  # any reading fails
    assert are_equal(*(ckpt.tensors[n] for n in ("lm_head.weight", "model.embed_tokens.weight")))
