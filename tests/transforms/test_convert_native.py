"""One model as two architectures: the logits of the original are those of transformers' class on what is written."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from goldens import GOLDEN

from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.errors import RequirementError, SpecError
from llmkit.transforms.convert import convert

PLUGINS = {p.name: p for p in default_registry().plugins}
CASES = [
    (name, other, variant)
    for name in ("baichuan", "chatglm2")
    for other in default_registry().load(PLUGINS[name]).equivalents
    for variant in (None, *default_registry().load(PLUGINS[name]).variants)
    if variant != "linear biases"
] + [("qwen", "qwen2", "plain")]


def tiny(name, variant=None):
    architecture = default_registry().load(PLUGINS[name])
    return random_checkpoint(architecture, architecture.tiny_config(variant))


@pytest.mark.parametrize(("name", "other", "variant"), CASES, ids=str)
def test_the_other_class_gives_the_same_logits(tmp_path, name, other, variant):
    import llmkit.api

    ckpt = tiny(name, variant)
    llmkit.api.save(convert(ckpt, to="hf", architecture=other), tmp_path / "out")
    ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(3))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.inference_mode():
        wanted = theirs(ids).logits
    found = load_decoder(ckpt)(ids)
    assert float((found - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))
    again = load_decoder(open_checkpoint(tmp_path / "out"))(ids)
    assert float((again - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("folder", "other", "changes"),
    [
        ("baichuan-7b", "llama", {}),
        ("baichuan2-7b", "llama", {"z_loss_weight": 0}),
        ("chatglm2-6b", "glm", {}),
        ("chatglm3-6b", "glm", {}),
        ("aquila-7b", "llama", {}),
        ("internlm-20b", "llama", {}),
        ("internlm2-7b", "llama", {}),
        ("minicpm-2b", "granite", {}),
        ("skywork-13b", "llama", {}),
        ("xverse-13b", "llama", {}),
        ("yi-6b", "llama", {}),
    ],
)
def test_recorded_logits_survive(tmp_path, folder, other, changes):
    import numpy as np

    import llmkit.api

    ckpt = open_checkpoint(GOLDEN / folder)
    ckpt = ckpt.derive(config={**ckpt.config, **changes})
    llmkit.api.save(convert(ckpt, to="hf", architecture=other), tmp_path / "out")
    recorded = np.load(GOLDEN / folder / "expected.npz")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.inference_mode():
        found = theirs(torch.from_numpy(recorded["input_ids"])).logits
    wanted = torch.from_numpy(recorded["logits"])
    assert float((found - wanted).abs().max()) <= 2e-5 * max(1.0, float(wanted.abs().max()))


def test_what_is_not_the_same_is_refused(tmp_path):
    with pytest.raises(RequirementError, match="baichuan13b architecture, which cannot be stored as 'llama'") as caught:
        convert(tiny("baichuan13b"), architecture="llama")
    assert "no other architecture" in caught.value.hint
    with pytest.raises(RequirementError, match="cannot be stored as 'lama'") as caught:
        convert(tiny("baichuan"), architecture="lama")
    assert "llama" in caught.value.hint
    tied = tiny("baichuan", "baichuan2-7b").config | {"tie_word_embeddings": True}
    with pytest.raises(SpecError, match="its head, which is the embedding, are divided by their norms"):
        convert(random_checkpoint(default_registry().load(PLUGINS["baichuan"]), tied), architecture="llama")
    with pytest.raises(SpecError, match=r"cannot be stored as glm: attention\.out_bias is True, here False"):
        convert(tiny("chatglm2", "linear biases"), architecture="glm")


def test_on_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from llmkit.cli.app import app

    out = tmp_path / "out"
    model = str(GOLDEN / "baichuan-7b")
    done = CliRunner().invoke(app, ["convert", model, "--to", "hf", "--as", "llama", "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["recipe"] == [{"transform": "convert", "to": "hf", "as": "llama"}]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
