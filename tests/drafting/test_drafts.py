"""Drafted plugins, compared with the built-in ones and with transformers: drafting sees headers and config only."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from rotation import rotated
from safetensors.torch import save_file

from llmkit.architecture import registry
from llmkit.architecture.plugin_file import architectures_in
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.cli.app import main
from llmkit.decoder.contract import check_architecture, random_checkpoint, random_ids
from llmkit.decoder.load import load_decoder
from llmkit.drafting.draft import draft_plugin, plugin_text
from llmkit.tensors.spec import DType, TensorSpec

BUILT_IN = {p.name: a for p, a in registry.default_registry().load_all().items()}
# Families with a computation that headers and config do not tell apart from another's, and what a draft says of it.
SAID = {
    "baichuan13b": "headers do not show positions",
    "glm": "headers do not show positions, the order of rotary pairs",
    "helium": "headers do not show positions, the order of rotary pairs",
    "falcon_mamba": "as mamba computes: headers do not show",
    "ernie4_5": "headers do not show positions, the order of rotary pairs",
    "chatglm": "position_encoding_2d = True",
}
DIFFERENT = ("baichuan13b", "ernie4_5", "falcon_mamba", "glm", "helium")
SAME = ("aquila", "internlm3", "skywork", "xverse")  # Llama's tensors and keys under another name
# Of families that are not every way in themselves (`rotation`), every second.
FAMILIES = [
    name
    for name, way in rotated((n for n in BUILT_IN if n not in (*DIFFERENT, *SAME)), ["drafted", "left out"])
    if way == "drafted"
]
VARIANTS = [("llama", "yarn"), ("llama", "attention-bias"), ("llama", "wide-heads"), ("gpt_neox", "redpajama"),
            ("gpt2", "untied")]  # fmt: skip


def drafted(name, variant, folder: Path):
    """A draft of a family's checkpoint whose config claims a class that nobody knows."""
    known = BUILT_IN[name]
    ckpt = random_checkpoint(known, known.tiny_config(variant))
    config = {**ckpt.config, "architectures": ["ZebraForCausalLM"], "model_type": "zebra"}
    draft = draft_plugin({n: t.spec for n, t in ckpt.tensors.items()}, config, name="zebra", label="some model")
    text = plugin_text(draft, "some model")
    (folder / "zebra.py").write_text(text)
    return ckpt, text, draft, architectures_in(folder / "zebra.py")["ARCHITECTURE"]


@pytest.mark.parametrize(
    ("name", "variant"),
    [*((name, None) for name in FAMILIES), *VARIANTS],
    ids=lambda v: str(v),
)
def test_a_draft_computes_what_the_family_does(tmp_path, name, variant):
    ckpt, text, draft, read = drafted(name, variant, tmp_path)
    assert draft.problems == ()
    assert read == draft.architecture
    assert read.matches == ("ZebraForCausalLM",)
    assert max(map(len, text.splitlines())) <= 120
    ids = random_ids(BUILT_IN[name], ckpt.config)
    expected = load_decoder(ckpt, architecture=BUILT_IN[name])(ids)
    assert torch.allclose(load_decoder(ckpt, architecture=read)(ids), expected, atol=1e-6)


@pytest.mark.parametrize("name", SAID)
def test_a_draft_says_what_it_does_not_know(tmp_path, name):
    _, text, _, _ = drafted(name, None, tmp_path)
    assert SAID[name] in " ".join(text.split())


def of_transformers(model_type, **more):
    """A tiny random model of a family that no plugin describes, its stored tensors and its config."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, **more,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or not config.tie_word_embeddings}
    return model, state, {**config.to_dict(), "architectures": [type(model).__name__]}


def hide(monkeypatch, *modules):
    """Drafts are made without the plugins of some modules."""
    plugins = registry.default_registry().plugins
    others = [p for p in plugins if p.target.partition(":")[0].rpartition(".")[2] not in modules]
    monkeypatch.setattr("llmkit.drafting.draft.default_registry", lambda: registry.Registry(others))


def test_a_family_without_a_plugin_computes_what_transformers_does(tmp_path, monkeypatch):
    """Multi-query GPT-2 with matrices that are not transposed, whose own plugin is hidden."""
    hide(monkeypatch, "gpt_bigcode")
    model, state, config = of_transformers("gpt_bigcode", n_inner=128, max_position_embeddings=64)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    ckpt, ids = open_checkpoint(tmp_path), torch.arange(24).reshape(2, 12)
    draft = draft_plugin({n: t.spec for n, t in ckpt.tensors.items()}, ckpt.config, name="m", label="m")
    assert (draft.like.name, draft.problems) == ("gpt2", ())
    assert torch.allclose(load_decoder(ckpt, architecture=draft.architecture)(ids), model(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [("granite", "attention_multiplier"), ("olmo2", "k_norm"), ("nemotron", "headers do not show"),
     ("starcoder2", "not in config.json: as that plugin has it")],
)  # fmt: skip
def test_a_family_of_another_computation_is_not_passed_over(monkeypatch, model_type, said):
    hide(monkeypatch, model_type)
    sizes = {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
    _, state, config = of_transformers(model_type, **sizes)
    specs = {n: TensorSpec(DType.F32, tuple(t.shape)) for n, t in state.items()}
    assert said in plugin_text(draft_plugin(specs, config, name="m", label="m"), "m")


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


def as_llama(ckpt):
    """The same weights under transformers' names."""
    words = {"attention.w": "self_attn.", "ffn.w1": "mlp.gate_proj", "ffn.w3": "mlp.up_proj", "ffn.w2": "mlp.down_proj",
             "net.blocks": "model.layers", "attention_norm": "input_layernorm", "net.tok_emb": "model.embed_tokens",
             "ffn_norm": "post_attention_layernorm", "net.out_norm": "model.norm"}  # fmt: skip
    state = {}
    for name, lazy in ckpt.tensors.items():
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        state[re.sub(r"(self_attn\.[qkvo])", r"\1_proj", name)] = lazy.load()
    config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, rms_norm_eps=1e-6,
                                      num_key_value_heads=2, intermediate_size=80, vocab_size=96)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({n: t for n, t in state.items() if "inv_freq" not in n})
    return model


def run(capsys, *args):
    capsys.readouterr()
    code = main([str(a) for a in args])
    return (code, *capsys.readouterr())


def test_an_unknown_family(capsys, tmp_path, model):
    file = tmp_path / "zebra.py"
    code, out, err = run(capsys, "plugins", "new", model, "-o", file)
    assert code == 0, err
    assert out.startswith(f"wrote {file}, after llama: names and shapes fit zebra-1b; ")
    assert f"hint: llmkit plugins check {file} --model {model}" in err
    text = file.read_text()
    assert "hidden=Key('zebra_width')" in text
    assert "ffn=Key('ffn_width')" in text
    assert "kv_heads=Key('n_kv', None)" in text
    assert "'attn.q': 'attention.wq'" in text
    assert "ignored=('net.rope.inv_freq',)" in text
    assert "stripe_every = 2" in text
    code, out, err = run(capsys, "plugins", "check", file, "--model", model, "--json")
    assert code == 0, out
    names = [c["name"] for c in json.loads(out)["plugins"]["zebra"]]
    assert {"zebra-1b: names and shapes", "tiny: cached = whole"} <= set(names)
    ckpt, ids = open_checkpoint(model), torch.arange(24).reshape(2, 12)
    ours = load_decoder(ckpt, architecture=architectures_in(file)["ARCHITECTURE"])(ids)
    assert torch.allclose(ours, as_llama(ckpt)(ids).logits, atol=1e-4)


@pytest.mark.parametrize("model", [True], indirect=True)
def test_a_weight_that_no_kind_has(capsys, tmp_path, model):
    """It is named, and `plugins check` refuses the draft."""
    file = tmp_path / "zebra.py"
    code, _, err = run(capsys, "plugins", "new", model, "-o", file)
    assert code == 0
    assert "warning: tensors that no name table knows: net.blocks.0.attention.sinks" in err
    assert "- tensors that no name table knows: net.blocks.0.attention.sinks" in file.read_text()
    code, out, err = run(capsys, "plugins", "check", file, "--model", model, "--json")
    checks = {c["name"]: c["problem"] for c in json.loads(out)["plugins"]["zebra"]}
    assert code == 1
    assert "net.blocks.0.attention.sinks" in checks["zebra-1b: names and shapes"]
    assert checks["tiny: cached = whole"] is None


def test_a_draft_on_stdout_and_as_json(capsys, model):
    code, out, _ = run(capsys, "plugins", "new", model, "--name", "Two Words")
    assert code == 0
    assert "name='two_words'" in out
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
    file.write_text(file.read_text().replace("'attention.wo'", "'attention.out'"))
    code, out, err = run(capsys, "plugins", "check", file, "--model", model)
    assert code == 1
    assert "zebra-1b: names and shapes" in out
    assert "missing: net.blocks.0.attention.out.weight" in err
