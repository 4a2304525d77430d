"""`llmkit lora …`: from the command line to the folder, and what is printed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.cli.app import main
from llmkit.pipeline.journal import Journal

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 40, "rms_norm_eps": 1e-6}  # fmt: skip


@pytest.fixture
def world(tmp_path):
    torch.manual_seed(0)
    state = {"model.embed_tokens.weight": torch.randn(40, 32), "lm_head.weight": torch.randn(40, 32)}
    for i in range(2):
        p = f"model.layers.{i}."
        state |= {f"{p}self_attn.{n}_proj.weight": torch.randn(32 if n in "qo" else 16, 32) for n in "qkvo"}
        state |= {f"{p}mlp.{n}_proj.weight": torch.randn(48, 32) for n in ("gate", "up")}
        state[f"{p}mlp.down_proj.weight"] = torch.randn(32, 48)
        state |= {f"{p}{n}_layernorm.weight": torch.ones(32) for n in ("input", "post_attention")}
    state["model.norm.weight"] = torch.ones(32)
    base = tmp_path / "base"
    base.mkdir()
    save_file(state, base / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(config))
    for k, name in enumerate(("one", "two")):
        folder = tmp_path / name
        folder.mkdir()
        stem = "base_model.model.model.layers.0.self_attn.q_proj."
        a, b = torch.randn(2 + k, 32), torch.randn(32, 2 + k)
        save_file({f"{stem}lora_A.weight": a, f"{stem}lora_B.weight": b}, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2 + k, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def q(folder):
    return load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]


def test_merge_prints_how_much_changed(world, capsys):
    assert main(["lora", "merge", str(world / "base"), str(world / "one"), "-o", str(world / "out")]) == 0
    said = capsys.readouterr()
    assert "1 module changed; change " in said.out
    assert "model.layers.0.self_attn.q_proj.weight" in said.out
    assert "one (lora, rank 2): 1 module updated" in said.err
    a, b = load_file(world / "one" / "adapter_model.safetensors").values()
    assert torch.allclose(q(world / "out"), q(world / "base") + 2 * b @ a, atol=1e-5)


def test_a_merge_says_which_values_its_dtype_does_not_hold(world, capsys):
    adapter = world / "one/adapter_model.safetensors"
    save_file({k: v * 200 for k, v in load_file(adapter).items()}, adapter)
    line = ["lora", "merge", str(world / "base"), str(world / "one"), "--dtype", "float16", "-o", str(world / "out")]
    assert main(line) == 0
    n = int(q(world / "out").isinf().sum())
    assert n > 1
    assert f"warning: {n} values are NaN or infinite in what was written: model.layers.0" in capsys.readouterr().err


def test_merge_as_json_with_weights(world, capsys):
    args = ["lora", "merge", *(str(world / n) for n in ("base", "one", "two")), "--weight", "0.5", "--weight", "-1"]
    assert main([*args, "-o", str(world / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["modules"] == 2
    assert set(document["all"]) == {f"{n}: model.layers.0.self_attn.q_proj.weight" for n in ("one", "two")}
    assert [s["transform"] for s in document["recipe"]] == ["lora.merge", "lora.merge"]
    assert [s["weight"] for s in document["recipe"]] == [0.5, -1.0]


def test_dry_run_writes_nothing(world, capsys):
    assert main(["lora", "merge", str(world / "base"), str(world / "one"), "-o", str(world / "out"), "--dry-run"]) == 0
    assert "lora.merge adapter=one" in capsys.readouterr().out
    assert not (world / "out").exists()


def test_combine_and_extract_write_adapters(world, capsys):
    args = ["lora", "combine", str(world / "one"), str(world / "two"), "-o", str(world / "both"), "-q"]
    assert main(args) == 0
    config = json.loads((world / "both" / "adapter_config.json").read_text())
    assert config["r"] == 5
    assert main(["lora", "merge", str(world / "base"), str(world / "both"), "-o", str(world / "sum"), "-q"]) == 0
    args = [
        "lora",
        "extract",
        str(world / "base"),
        str(world / "sum"),
        "--energy",
        "0.999999",
        "-o",
        str(world / "lora"),
    ]
    assert main(args) == 0
    assert "relative error 0.00" in capsys.readouterr().out
    assert main(["lora", "merge", str(world / "base"), str(world / "lora"), "-o", str(world / "again"), "-q"]) == 0
    assert torch.allclose(q(world / "again"), q(world / "sum"), atol=0.05)


def test_alpha_is_not_taken_where_the_config_has_it(world, capsys):
    assert main(["lora", "merge", str(world / "base"), str(world / "one"), "--alpha", "8", "-o", str(world / "o")]) == 2
    assert (
        "error: --alpha is for a LoRA file without a config, and one has adapter_config.json" in capsys.readouterr().err
    )
    assert not (world / "o").exists()


def test_what_a_refused_combination_says_of_force_holds(world, capsys):
    config = world / "one" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    args = ["lora", "combine", str(world / "one"), str(world / "two"), "-o", str(world / "o")]
    assert main(args) == 2
    assert "--force merges what is there" in capsys.readouterr().err
    assert main([*args, "--force"]) == 0
    assert "forced: one: its file has no lora_magnitude_vector" in capsys.readouterr().err


def test_ctrl_c_while_torch_is_imported_says_what_is_kept(world, capsys, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("llmkit.tensors.loading.import_torch", stop)
    args = ["lora", "extract", str(world / "base"), str(world / "base"), "--rank", "2", "-o", str(world / "o")]
    assert main(args) == 130
    said = capsys.readouterr().err
    assert f"error: interrupted; {world / 'o'}.survey keeps what is done" in said
    assert "it goes on where it stopped" in said


def test_errors_leave_no_output(world, capsys):
    config = world / "one" / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": "pissa"}))
    assert main(["lora", "merge", str(world / "base"), str(world / "one"), "-o", str(world / "out")]) == 2
    said = capsys.readouterr().err
    assert "error: one was initialised with pissa, which changes the base" in said
    assert "hint: save it converted" in said
    assert not (world / "out").exists()


def test_a_method_is_looked_at_before_the_adapters(world, capsys):
    assert main(["lora", "combine", str(world / "none"), "--method", "svdd", "-o", str(world / "out")]) == 2
    assert "did you mean --method svd?" in capsys.readouterr().err


def differing(world):
    """A model beside the base in which two layers and a norm differ."""
    state = load_file(world / "base" / "model.safetensors")
    for name in state:
        if "q_proj" in name or name == "model.norm.weight":
            state[name] = state[name] + 0.1 * torch.randn_like(state[name])
    (world / "tuned").mkdir()
    save_file(state, world / "tuned" / "model.safetensors")
    (world / "tuned" / "config.json").write_bytes((world / "base" / "config.json").read_bytes())
    return ["lora", "extract", str(world / "base"), str(world / "tuned"), "--energy", "0.9", "-o", str(world / "out")]


def test_an_interrupted_extraction_keeps_what_it_compared(world, capsys, monkeypatch):
    args, append, seen = differing(world), Journal.append, []

    def stopped(self, line):
        if len(seen) == 7:
            raise KeyboardInterrupt
        seen.extend([line["block"]] if "block" in line else [])
        return append(self, line)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", stopped)
        assert main(args) == 130
    said = capsys.readouterr().err
    assert f"{world / 'out.survey'} keeps what is done" in said
    assert "it goes on where it stopped: llmkit lora extract" in said
    assert "nothing is kept" not in said
    assert (world / "out.survey").is_file()
    assert main(args) == 0
    assert "7 of 21 tensors were compared by the interrupted run" in capsys.readouterr().err
    assert not (world / "out.survey").exists()
    assert main([*args[:-1], str(world / "again"), "-q"]) == 0
    found, again = (load_file(world / n / "adapter_model.safetensors") for n in ("out", "again"))
    assert all(torch.equal(found[name], again[name]) for name in again)


def test_a_survey_harms_nothing_and_reads_nothing_in_vain(world, capsys, monkeypatch):
    args = differing(world)
    (world / "out.survey").write_text("mine")
    assert main(args) == 2
    assert "is no journal of llmkit's" in capsys.readouterr().err
    assert (world / "out.survey").read_text() == "mine"
    (world / "out.survey").unlink()
    (world / "out").mkdir()
    (world / "out" / "mine.txt").write_text("mine")
    monkeypatch.setattr(Journal, "append", lambda *_: pytest.fail("something was compared"))
    assert main(args) == 2
    assert "already exists" in capsys.readouterr().err
    assert not (world / "out.survey").exists()
    assert main([*args[:-1], str(world / "out.safetensors")]) == 2
    assert "is named like a file" in capsys.readouterr().err
    assert not (world / "out.safetensors.survey").exists()


def test_svd_says_what_it_lost(world, capsys):
    args = ["lora", "combine", str(world / "one"), str(world / "two"), "--method", "svd", "--rank", "1"]
    assert main([*args, "-o", str(world / "out")]) == 0
    assert "1 module combined; relative error 0." in capsys.readouterr().out
