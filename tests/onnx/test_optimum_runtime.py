"""Exported folders in Optimum's ORTModelForCausalLM, held to the torch decoder: alone, and in a left-padded batch."""

from __future__ import annotations

import pytest
import torch
from runtimes import IN_OPTIMUM, N_TOKENS, PROMPTS, expected, exported, exported_int8, written_by_llmkit

pytestmark = pytest.mark.optimum
optimum = pytest.importorskip("optimum.onnxruntime", reason="needs Optimum (extra optimum, which pins transformers)")
OPTIONS = {"max_new_tokens": N_TOKENS, "min_new_tokens": N_TOKENS, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=IN_OPTIMUM)
def folder(request, tmp_path_factory):
    return exported(request.param, tmp_path_factory.mktemp("optimum"))


def written(model, rows, mask=None):
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **OPTIONS)
    return found[:, ids.shape[1] :].tolist()


def test_greedy_text(folder):
    _check(folder, expected(folder))


def test_a_cache_in_int8(tmp_path):
    folder = exported_int8(tmp_path)
    _check(folder, written_by_llmkit(folder))


def _check(folder, wanted):
    model = optimum.ORTModelForCausalLM.from_pretrained(folder)
    assert [written(model, [p])[0] for p in PROMPTS] == wanted
    longest = max(len(p) for p in PROMPTS)
    rows = [[0] * (longest - len(p)) + p for p in PROMPTS]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS]
    assert written(model, rows, mask) == wanted


def test_export_of_a_model_that_no_plugin_describes(tmp_path, capsys):
    import json

    import transformers

    from llmkit.cli.app import main
    from llmkit.onnx.opening import load_onnx

    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(
        "gpt_bigcode", vocab_size=130, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "source"), "--to", "onnx", "--via", "optimum", "--json", "-o", str(out)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [d["case"] for d in document["parity"]] == ["prefill", "cached steps", "left-padded batch"]
    assert all(d["largest"] < 1e-5 for d in document["parity"])
    assert main(["verify", str(out)]) == 0

    from llmkit.decoder.generate import generate

    found = generate(load_onnx(out), PROMPTS, max_new_tokens=N_TOKENS)
    assert found == [written(model, [p])[0] for p in PROMPTS]
    capsys.readouterr()
    assert main(["export", str(tmp_path / "source"), "--to", "onnx", "--via", "optimum", "-o", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
