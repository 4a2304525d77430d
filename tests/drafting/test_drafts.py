"""Drafted plugins, compared with the built-in ones: drafting sees headers and config only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmkit.architecture import registry
from llmkit.architecture.plugin_file import architectures_in
from llmkit.cli.app import main
from llmkit.decoder.contract import check_architecture, random_checkpoint, random_ids
from llmkit.decoder.load import load_decoder
from llmkit.drafting.module import draft_plugin

BUILT_IN = registry.default_registry().load_all()
CASES = [(p.name, v) for p, a in BUILT_IN.items() for v in (None, *a.variants)]
# What the draft of a family with mathematics of its own must say of it.
SPECIAL = {
    "baichuan13b": "config.json does not say how positions are told",
    "bloom": "config.json does not say how positions are told",
    "chatglm": "position_encoding_2d = True",
    "chatglm2": "original_rope = True",
    "falcon": "check: one norm for attention and MLP",
    "falcon40b": "new_decoder_architecture = True",
    "gemma": "offset=1.0 where files store weight - 1",
    "gemma2": "attn_logit_softcapping = 5.0, final_logit_softcapping = 20.0",
    "gemma3": "sliding_window_pattern = 3",
    "glm": 'check: pairs="interleaved"',
    "glm4": 'check: pairs="interleaved"',
    "gptj": 'check: pairs="interleaved"',
    "mistral": "sliding_window = 7",
    "rwkv": "a block that is no attention decoder of llmkit",
}
# Ordinary families: the guesses are right, so that the draft computes the same logits.
RIGHT = [("llama", None), ("llama", "yarn"), ("llama", "attention-bias"), ("qwen2", None), ("qwen3", None),
         ("gpt2", None), ("gpt_neox", None), ("gpt_neox", "redpajama"), ("opt", None), ("stablelm", None),
         ("falcon40b", None), ("baichuan", None)]  # fmt: skip


def architecture(name):
    return next(a for p, a in BUILT_IN.items() if p.name == name)


def drafted(name, variant, folder: Path):
    known = architecture(name)
    ckpt = random_checkpoint(known, known.tiny_config(variant))
    text, draft, problems = draft_plugin(
        {n: t.spec for n, t in ckpt.tensors.items()}, ckpt.config, name=f"drafted_{name}", label="some model"
    )
    file = folder / f"drafted_{name}.py"
    file.write_text(text)
    return ckpt, text, draft, problems, architectures_in(file)["ARCHITECTURE"]


@pytest.mark.parametrize(("name", "variant"), CASES, ids=lambda v: str(v))
def test_a_draft_fits_the_checkpoint_it_was_made_from(tmp_path, monkeypatch, name, variant):
    known = architecture(name)
    expected = {s.name: s.shape for s in known.bind(known.tiny_config(variant)).slots.values() if not s.is_optional}
    monkeypatch.setattr(registry, "default_registry", lambda: registry.Registry([]))  # nobody knows the family
    ckpt, text, _, problems, draft = drafted(name, variant, tmp_path)
    assert problems == []
    model = draft.bind(ckpt.config)
    found = {s.name: s.shape for s in model.slots.values() if not s.is_optional}
    assert found == expected
    assert model.table.faults(model.slots) == []
    assert draft.matches == tuple(ckpt.config.get("architectures", ()))
    compile(text, "draft", "exec")
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", SPECIAL)
def test_a_draft_says_what_it_does_not_know(tmp_path, name):
    _, text, _, _, _ = drafted(name, None, tmp_path)
    assert SPECIAL[name] in " ".join(text.split())


@pytest.mark.parametrize(("name", "variant"), RIGHT, ids=lambda v: str(v))
def test_drafts_of_ordinary_families_compute_the_same(tmp_path, name, variant):
    ckpt, _, _, _, draft = drafted(name, variant, tmp_path)
    ids = random_ids(architecture(name), ckpt.config)
    expected = load_decoder(ckpt, architecture=architecture(name))(ids)
    assert torch.allclose(load_decoder(ckpt, architecture=draft)(ids), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2", pytest.param("gpt_neox", marks=pytest.mark.slow), "gpt2"])
def test_the_tiny_model_of_a_draft_keeps_the_contract(tmp_path, name):
    *_, draft = drafted(name, None, tmp_path)
    assert [c.problem for c in check_architecture(draft) if not c.is_ok] == []


@pytest.fixture(params=[False])
def model(request, tmp_path):
    """A family that nobody knows: its own words for sizes, a buffer, and perhaps a strange weight in each layer."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(shape, generator=g)

    state = {"net.tok_emb.weight": rand(96, 32), "net.out_norm.weight": rand(32), "net.rope.inv_freq": rand(4)}
    state["lm_head.weight"] = rand(96, 32)
    for i in range(3):
        p = f"net.blocks.{i}."
        state |= {f"{p}attention.{n}.weight": rand(32, 32) for n in ("wq", "wo")}
        state |= {f"{p}attention.{n}.weight": rand(16, 32) for n in ("wk", "wv")}
        state |= {f"{p}ffn.{n}.weight": rand(80, 32) for n in ("w1", "w3")}
        state |= {f"{p}ffn.w2.weight": rand(32, 80)} | ({f"{p}attention.sinks": rand(4)} if request.param else {})
        state |= {f"{p}{n}.weight": rand(32) for n in ("attention_norm", "ffn_norm")}
    folder = tmp_path / "zebra-1b"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config = {"architectures": ["ZebraForCausalLM"], "model_type": "zebra", "zebra_width": 32, "depth": 3,
              "n_heads": 4, "n_kv": 2, "ffn_width": 80, "n_vocab": 96, "stripe_every": 2}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(capsys, *args):
    capsys.readouterr()
    code = main([str(a) for a in args])
    return (code, *capsys.readouterr())


def test_an_unknown_family(capsys, tmp_path, model):
    file = tmp_path / "zebra.py"
    code, out, err = run(capsys, "plugins", "new", model, "-o", file)
    assert code == 0, err
    assert out.startswith(f"wrote {file}: names and shapes fit zebra-1b; ")
    assert f"hint: llmkit plugins check {file} --model {model}" in err
    text = file.read_text()
    assert 'hidden="zebra_width"' in text
    assert 'ffn="ffn_width"' in text
    assert 'kv_heads=Key("n_kv", None)' in text
    assert '"attn.q": "attention.wq"' in text
    assert 'ignored=("net.rope.inv_freq",)' in text
    assert "stripe_every = 2" in text
    code, out, err = run(capsys, "plugins", "check", file, "--model", model, "--json")
    assert code == 0, out
    names = [c["name"] for c in json.loads(out)["plugins"]["zebra"]]
    assert {"zebra-1b: names and shapes", "tiny: cached = whole"} <= set(names)


@pytest.mark.parametrize("model", [True], indirect=True)
def test_a_weight_that_no_kind_has(capsys, tmp_path, model):
    """It is named and shaped, and the decoder refuses the block rather than leave the weight out."""
    file = tmp_path / "zebra.py"
    code, _, err = run(capsys, "plugins", "new", model, "-o", file)
    assert code == 0
    assert "warning: tensors that no kind of llmkit has: attention.sinks" in err
    assert '"attention.sinks": SlotShape(("4",), "parameter")' in file.read_text()
    code, out, err = run(capsys, "plugins", "check", file, "--model", model, "--json")
    checks = {c["name"]: c["problem"] for c in json.loads(out)["plugins"]["zebra"]}
    assert code == 1
    assert checks["zebra-1b: names and shapes"] is None
    assert checks["tiny: names and shapes"] is None
    assert checks["tiny: cached = whole"] == "the torch decoder has no reader for the kind DraftedBlock"


def test_a_draft_on_stdout_and_as_json(capsys, model):
    code, out, _ = run(capsys, "plugins", "new", model, "--name", "Two Words")
    assert code == 0
    assert 'name="two_words"' in out
    code, text, _ = run(capsys, "plugins", "new", model, "--json")
    document = json.loads(text)
    assert document["fits"] is True
    assert document["unused_keys"] == {"stripe_every": 2}
    assert document["text"].count("# check:") == len(document["checks"]) > 0


def test_what_cannot_be_drafted(capsys, tmp_path, model):
    (tmp_path / "there.py").write_text("x")
    code, _, err = run(capsys, "plugins", "new", model, "-o", tmp_path / "there.py")
    assert code == 2
    assert "already exists" in err
    assert (tmp_path / "there.py").read_text() == "x"
    code, _, err = run(capsys, "plugins", "new", model, "-o", tmp_path / "none" / "x.py")
    assert (code, "does not exist" in err) == (2, True)
    code, _, err = run(capsys, "plugins", "new", tmp_path / "nope", "-o", tmp_path / "x.py")
    assert (code, "no such file or folder" in err) == (2, True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    code, _, err = run(capsys, "plugins", "new", model, "-o", tmp_path / "x.py")
    assert code == 2
    assert "is quantized" in err
    (model / "config.json").unlink()
    code, _, err = run(capsys, "plugins", "new", model, "-o", tmp_path / "x.py")
    assert code == 2
    assert "has no config.json" in err
    save_file({"a": torch.ones(2)}, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, "plugins", "new", model, "-o", tmp_path / "x.py")
    assert code == 2
    assert "no tensor has a layer's number in its name" in err
    assert not (tmp_path / "x.py").exists()


def test_plugin_files_that_are_none(capsys, tmp_path, model):
    code, _, err = run(capsys, "plugins", "check", tmp_path / "none.py")
    assert (code, "none.py: no such file" in err) == (2, True)
    (tmp_path / "a.py").write_text("1 / 0\n")
    code, _, err = run(capsys, "plugins", "check", tmp_path / "a.py")
    assert (code, "cannot be imported: ZeroDivisionError" in err) == (2, True)
    (tmp_path / "b.py").write_text("x = 1\n")
    code, _, err = run(capsys, "plugins", "check", tmp_path / "b.py")
    assert (code, "holds no Architecture" in err, "llmkit plugins new MODEL" in err) == (2, True, True)
    code, _, err = run(capsys, "plugins", "check", "--model", model)
    assert (code, "needs the plugin to compare it with" in err) == (2, True)


def test_a_plugin_that_does_not_fit_a_model(capsys, tmp_path, model):
    file = tmp_path / "zebra.py"
    assert run(capsys, "plugins", "new", model, "-o", file)[0] == 0
    file.write_text(file.read_text().replace('"attention.wo"', '"attention.out"'))
    code, out, err = run(capsys, "plugins", "check", file, "--model", model)
    assert code == 1
    assert "zebra-1b: names and shapes" in out
    assert "missing: net.blocks.0.attention.out.weight" in err
