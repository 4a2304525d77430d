"""Each command as a user calls it, against figures that something else computed."""

from __future__ import annotations

import json
import math

import pytest
import torch


def weights(folder):
    from safetensors.torch import load_file

    return load_file(str(folder / "model.safetensors"))


def reference(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def test_version(call):
    import llmkit

    done = call("--version")
    assert (done.code, done.out, done.err) == (0, f"llmkit {llmkit.__version__}\n", "")


def test_inspect(call, tiny):
    done = call("inspect", tiny)
    assert (done.code, done.err) == (0, "")
    n = sum(t.numel() for t in weights(tiny).values())
    for line in (
        f"model         tiny  ({tiny})",
        "architecture  llama  (LlamaForCausalLM)",
        "sizes         hidden 64, layers 2, heads 4 × 16 (kv 2), ffn 96, vocab 130, context 128",
        f"parameters    {n / 1000:.4g} k  ({n:,})",
        f"stored        {4 * n / 1000:.3g} kB in 1 file, 21 tensors, F32",
        "quantization  none",
        "tokenizer     WordLevel (tokenizer.json), 130 tokens, no chat template",
    ):
        assert line in done.out.splitlines()
    document = call("inspect", tiny, "--json", "--tensors").document
    assert document["n_parameters"] == n
    assert document["tensors"]["lm_head.weight"] == {
        "dtype": "F32", "shape": [130, 64], "nbytes": 130 * 64 * 4, "file": "model.safetensors",
    }  # fmt: skip
    assert document["problems"] == document["oddities"] == []
    assert call("inspect", tiny, "-q").out == "llama\n"


def test_quantize_verify_inspect_and_diff(call, tiny, tmp_path):
    out = tmp_path / "int8"
    done = call("quantize", tiny, "--bits", "8", "--symmetric", "--group-size", "channel", "-o", out)
    assert done.code == 0
    assert done.out.startswith(f"wrote {out}: ")
    assert "bits per weight" in done.out
    assert "relative error" in done.out
    assert call("verify", out).code == 0
    assert call("verify", out, "-q").out == "ok\n"
    assert "int8 per channel symmetric, compressed-tensors" in call("inspect", out).out
    strict = call("diff", tiny, out, "--json")
    assert strict.code == 1
    assert strict.document["n_beyond"] == 14
    found = {d["name"]: d for d in strict.document["differences"]}
    before = weights(tiny)["model.layers.0.mlp.up_proj.weight"].double()
    stored = weights(out)
    step = stored["model.layers.0.mlp.up_proj.weight_scale"].double()
    restored = (before / step).round().clamp(-128, 127) * step
    entry = found["model.layers.0.mlp.up_proj.weight"]
    assert entry["max_abs"] == pytest.approx(float((restored - before).abs().max()), rel=1e-4)
    assert entry["relative_l2"] == pytest.approx(float((restored - before).norm() / before.norm()), rel=1e-4)
    assert call("diff", tiny, out, "--tol", "0.01").code == 0
    same = call("diff", tiny, tiny)
    assert (same.code, same.out) == (0, "21 tensors compared, 21 equal, 0 with other values\n")


def test_verify_names_what_differs(call, tiny, tmp_path):
    out = tmp_path / "int8"
    assert call("quantize", tiny, "--bits", "8", "-o", out, "-q").out == f"{out}\n"
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    (out / "notes.txt").write_text("mine")
    done = call("verify", out)
    assert done.code == 1
    assert "in model.safetensors was changed: its data has another hash than in llmkit.json" in done.out
    assert "config.json is " in done.out
    assert "note: notes.txt was added later" in done.out
    assert done.err.endswith(f"{out} is not as it was written: 2 differences\n")
    as_json = call("verify", out, "--json")
    assert (as_json.code, as_json.err) == (1, "")
    assert as_json.document["ok"] is False
    assert len(as_json.document["problems"]) == 2
    (out / "model.safetensors").unlink()
    assert "differs: model.safetensors is missing" in call("verify", out).out


def test_delta_round_trip_and_explain(call, tiny, model, tmp_path):
    delta, back = tmp_path / "delta", tmp_path / "back"
    made = call("delta", "make", tiny, model, "-o", delta)
    assert made.code == 0
    assert "weights come back bit for bit" in made.out
    published = call("delta", "make", tiny, model, "--profile", "vicuna", "-o", tmp_path / "vicuna", "--json")
    counted = published.document["round_trip"]
    assert counted["n"] == sum(w.numel() for w in weights(model).values())
    assert (counted["missing"], counted["n_exact"] <= counted["n"]) == ([], True)
    done = call("delta", "apply", tiny, delta, "-o", back)
    assert done.code == 0
    assert "profile llmkit" in done.err
    expected, found = weights(model), weights(back)
    assert list(expected) == list(found)
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    explained = call("explain", back, "lm_head.weight")
    assert explained.code == 0
    assert explained.out.splitlines()[1].startswith("ulp_add")
    # The delta is llmkit's own, so its tensors are followed to where they came from.
    assert f"read lm_head.weight of {model / 'model.safetensors'}" in explained.out
    wrong = call("delta", "apply", model, delta, "-o", tmp_path / "wrong")
    assert (wrong.code, wrong.out) == (2, "")
    assert "is not the base" in wrong.err
    assert not (tmp_path / "wrong").exists()


def test_a_sum_that_is_stated_and_missed_is_a_no(call, tiny, model, tmp_path):
    """What a script asserts about a release must not pass there as a warning."""
    call("delta", "make", tiny, model, "--profile", "plain", "-o", tmp_path / "delta")
    arguments = (
        "delta",
        "apply",
        tiny,
        tmp_path / "delta",
        "--profile",
        "plain",
        "-o",
        tmp_path / "out",
        "--overwrite",
    )
    missed = call(*arguments, "--expected-sum", "1e6")
    assert missed.code == 1
    assert "\nsum of all weights" in missed.err
    assert "arithmetic in the delta's dtype, no new rows" in missed.err
    assert (tmp_path / "out" / "llmkit.json").is_file()
    total = sum(w.double().sum().item() for w in weights(tmp_path / "out").values())
    assert call(*arguments, "--expected-sum", str(total), "--json").code == 0


def test_dry_run_writes_nothing_and_says_everything(call, tiny, tmp_path):
    out = tmp_path / "out"
    args = ["quantize", tiny, "--bits", "4", "--group-size", "32", "-o", out]
    done = call(*args, "--dry-run")
    assert done.code == 0
    words = [line.split("  ")[0].strip() for line in done.out.splitlines() if not line.startswith(" ")]
    assert words == ["plan", "recipe", "size", "notes", "reads", "writes", "disk", "peak memory", "time"]
    document = call(*args, "--dry-run", "--json").document
    assert not out.exists()
    assert call(*args, "--json").document["nbytes"] == document["write_nbytes"]
    written = sum(p.stat().st_size for p in out.iterdir() if p.name != "llmkit.json")
    assert written == document["write_nbytes"]
    assert document["read_nbytes"] == sum(t.nbytes for t in weights(tiny).values())


def test_json_is_one_document_in_every_command(call, tiny, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 127}" for i in range(300)))
    out = tmp_path / "out"
    for args in (
        ["inspect", tiny],
        ["quantize", tiny, "--bits", "8", "-o", out, "--dry-run"],
        ["quantize", tiny, "--bits", "8", "-o", out],
        ["verify", out],
        ["explain", out, "lm_head.weight"],
        ["diff", tiny, model],
        ["generate", tiny, "w1 w2", "--max-tokens", "3"],
        ["perplexity", tiny, "--text", text],
        ["plugins", "list"],
        ["plugins", "show", "llama"],
        ["doctor"],
    ):
        done = call(*args, "--json")
        assert done.code == (1 if args[0] == "diff" else 0), (args, done)
        assert isinstance(done.document, dict)
        assert "error" not in done.document
        assert done.err == "", args


def test_generate_is_the_greedy_text_of_transformers(call, tiny):
    ids = torch.tensor([[4, 5, 6]])
    with torch.inference_mode():
        expected = reference(tiny).generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    done = call("generate", tiny, "w1 w2 w3", "--max-tokens", "8", "--json")
    assert done.document["tokens"] == [t for t in expected if t != 2]
    assert done.document["n_prompt_tokens"] == 3
    assert 0 < done.document["first_token_s"] <= done.document["elapsed_s"]
    streamed = call("generate", tiny, "w1 w2 w3", "--max-tokens", "8")
    assert streamed.out == done.document["text"] + "\n"
    assert call("generate", tiny, "w1 w2 w3", "--max-tokens", "8", "-q").out == done.document["text"] + "\n"


def test_the_rate_is_that_of_tokens_after_the_first():
    from llmkit.cli import generate as generate_command

    assert generate_command._speed(41, 3.0, 1.0) == "41 tokens in 3.0 s, the first after 1.0 s, then 20.0/s"
    assert generate_command._speed(1, 1.0, 1.0) == "1 token in 1.0 s"
    assert generate_command._speed(0, 1.0, None) == "0 tokens in 1.0 s"


def test_sampling_follows_its_seed(call, tiny):
    args = ["generate", tiny, "w1", "--temperature", "1.5", "--max-tokens", "12", "--json"]
    tokens = [call(*args, "--seed", seed).document["tokens"] for seed in (1, 1, 2)]
    assert tokens[0] == tokens[1] != tokens[2]
    only = call(*args, "--top-k", "1").document["tokens"]
    assert only == call("generate", tiny, "w1", "--max-tokens", "12", "--json").document["tokens"]
    wrong = call(*args, "--top-p", "2")
    assert wrong.code == 2
    assert "top-p" in wrong.document["error"]["message"]


def test_filters_are_those_of_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from llmkit.decoder.sampling import Sampling, filter_logits

    generator = torch.Generator().manual_seed(0)
    for top_k, top_p, temperature in ((5, None, 0.7), (None, 0.8, 1.3), (20, 0.5, 1.0), (None, 0.01, 1.0)):
        logits = torch.randn(1, 60, generator=generator) * 3
        expected = TemperatureLogitsWarper(temperature)(None, logits)
        expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        expected = TopPLogitsWarper(top_p)(None, expected) if top_p else expected
        assert torch.equal(filter_logits(logits[0], Sampling(temperature, top_k, top_p)), expected[0])


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 16), (50, 7), (128, 128)])
def test_perplexity_is_that_of_the_transformers_docs(call, tiny, tmp_path, context, stride):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 127}" for i in range(150)))
    model = reference(tiny)
    ids = torch.tensor([[i * i % 127 + 3 for i in range(150)]])
    total, n_scored, previous = 0.0, 0, 0
    for begin in range(0, 150, stride):  # the loop of transformers' documentation, weighted by scored tokens
        end = min(begin + context, 150)
        targets = ids[:, begin:end].clone()
        targets[:, : -(end - previous)] = -100
        with torch.inference_mode():
            logits = model(ids[:, begin:end]).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], targets[0, 1:], ignore_index=-100, reduction="sum")
        total += float(loss)
        n_scored += int((targets[0, 1:] != -100).sum())
        previous = end
        if end == 150:
            break
    args = ["perplexity", tiny, "--text", text, "--context", context, "--stride", stride]
    document = call(*args, "--json").document
    assert document["n_scored"] == n_scored
    assert document["perplexity"] == pytest.approx(math.exp(total / n_scored), rel=1e-5)
    assert float(call(*args, "-q").out) == pytest.approx(document["perplexity"], rel=1e-5)


def test_perplexity_refuses_what_is_no_text(call, tiny, tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\xfe\x00")
    assert "is in UTF-16, expected UTF-8" in call("perplexity", tiny, "--text", tmp_path / "a").err
    (tmp_path / "a").write_bytes(b"\xfe\x80")
    assert "is not UTF-8 text" in call("perplexity", tiny, "--text", tmp_path / "a").err
    (tmp_path / "b").write_text("w1")
    assert "too few to predict one" in call("perplexity", tiny, "--text", tmp_path / "b").err
    assert "cannot read" in call("perplexity", tiny, "--text", tmp_path / "c").err


def test_plugins(call):
    names = call("plugins", "list", "-q").out.splitlines()
    assert {"llama", "qwen2", "gemma3"} <= set(names)
    assert names == sorted(names)
    listed = {p["name"]: p for p in call("plugins", "list", "--json").document["plugins"]}
    assert "Vicuna" in listed["llama"]["releases"]
    assert all(p["releases"] and p["matches"] and p["error"] is None for p in listed.values())
    shown = call("plugins", "show", "llama")
    assert shown.code == 0
    assert "model.layers.{i}.self_attn.q_proj.weight" in shown.out
    wrong = call("plugins", "show", "lama")
    assert (wrong.code, wrong.err) == (2, "error: no plugin is named 'lama'\nhint: did you mean llama?\n")


def test_one_plugin_keeps_its_contract(call):
    done = call("plugins", "check", "glm4", "--json")
    assert done.code == 0
    checks = done.document["plugins"]["glm4"]
    assert any(c["name"] == "tiny: transformers' logits" and c["difference"] <= 1e-5 for c in checks)
    assert "tiny: transformers' logits" in call("plugins", "check", "glm4").out


def test_all_plugins_are_checked_in_one_line_each(call, monkeypatch):
    from llmkit.decoder import contract

    def checked(architecture):
        is_odd = architecture.name == "opt"
        return [contract.Check("tiny: names and shapes", None, "odd" if is_odd else None), contract.Check("b", 2e-7)]

    monkeypatch.setattr(contract, "check_architecture", checked)
    monkeypatch.setattr("llmkit.onnx.contract.check_graphs", lambda architecture: [contract.Check("graph", 1e-7)])
    done = call("plugins", "check", "--all")
    assert done.code == 1
    assert "opt tiny: names and shapes: odd" in done.err
    lines = [line.split() for line in done.out.splitlines()[2:]]
    assert {"llama": "ok", "opt": "1"}.items() <= {line[0]: line[3] for line in lines}.items()
    assert call("plugins", "check").out == done.out


def test_a_plugin_that_does_not_load_breaks_the_check_and_not_the_others(call, monkeypatch):
    from llmkit.architecture import registry
    from llmkit.decoder import contract

    strange = registry.Plugin("zebra", "llmkit_zebra:ARCHITECTURE", "zebra 1.0")
    known = registry.Registry([*registry.default_registry().plugins, strange])
    monkeypatch.setattr(registry, "default_registry", lambda: known)
    monkeypatch.setattr(contract, "check_architecture", lambda a: [contract.Check("b", 2e-7)])
    monkeypatch.setattr("llmkit.onnx.contract.check_graphs", lambda architecture: [])
    done = call("plugins", "check", "--all", "--json")
    assert done.code == 1
    assert done.document["plugins"]["zebra"][0]["problem"].startswith("plugin zebra (zebra 1.0) cannot be loaded")
    assert done.document["plugins"]["llama"][0]["ok"]


def test_a_name_and_all_contradict_each_other(call):
    done = call("plugins", "check", "llama", "--all")
    assert done.code == 2
    assert done.err == "error: both a plugin (llama) and --all were given\nhint: llmkit plugins check --all\n"


def test_a_broken_contract_is_found(call, monkeypatch):
    import dataclasses

    from llmkit.architecture.registry import default_registry
    from llmkit.decoder import contract

    registry = default_registry()
    right = next(registry.load(p) for p in registry.plugins if p.name == "llama")
    block = dataclasses.replace(right.block, norm=dataclasses.replace(right.block.norm, eps=0.5))
    wrong = dataclasses.replace(right, block=block, variants={})
    checks = {c.name: c for c in contract.check_architecture(wrong)}
    assert checks["tiny: names and shapes"].is_ok
    assert "logits differ by" in checks["tiny: transformers' logits"].problem


def test_doctor(call):
    done = call("doctor")
    assert done.code == 0, done
    assert "saved, quantized, read back and verified" in done.out
    assert "torch" in done.out


def test_eval_on_local_files(call, tiny, tmp_path):
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        for subject in ("sociology", "marketing"):
            rows = [f"w{i} w{i + 1},w1,w2,w3,w4,{'ABCD'[i % 4]}" for i in range(6)]
            (tmp_path / split / f"{subject}_{split}.csv").write_text("\n".join(rows) + "\n")
    args = ["eval", tiny, "--bench", "mmlu", "--data", tmp_path, "--shots", "1"]
    done = call(*args, "-o", tmp_path / "run.json")
    assert done.code == 0, done
    assert "social sciences" in done.out
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["benches"]["mmlu"]["micro"]["n"] == 12
    failed = call(*args, "--fail-under", "1", "--json")
    assert (failed.code, failed.err) == (1, "") or "warning" in failed.err
    assert failed.document["scores"]["mmlu"] == record["scores"]["mmlu"]
    assert call(*args, "-q").out == f"mmlu {record['scores']['mmlu']:.4f}\n"
    assert call(*args, "-o", tmp_path / "none" / "run.json").code == 2
