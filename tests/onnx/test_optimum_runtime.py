"""Exported folders in Optimum's ORTModelForCausalLM, held to the torch decoder: alone, and in a left-padded batch."""

from __future__ import annotations

import pytest
import torch
from runtimes import (
    FAMILIES,
    N_TOKENS,
    PROMPTS,
    UNUSUAL,
    expected,
    exported,
    exported_gguf,
    exported_mini,
    left_padded,
    one_thread,
    written_by_llmkit,
)

pytestmark = pytest.mark.optimum
optimum = pytest.importorskip("optimum.onnxruntime", reason="needs Optimum (extra optimum, which pins transformers)")
OPTIONS = {"max_new_tokens": N_TOKENS, "min_new_tokens": N_TOKENS, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=[*FAMILIES, *UNUSUAL])
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


@pytest.mark.parametrize(
    "options",
    [("--kv-cache-dtype", "int8"), ("--bits", "4", "--accuracy-level", "0"), ("--bits", "8", "--accuracy-level", "0")],
)
def test_integers(options, tmp_path):
    folder = exported_mini(tmp_path, *options)
    _check(folder, written_by_llmkit(folder))


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_in_int8(bits, tmp_path):
    """Alone: a sum that another batch shape orders otherwise tips the rounding of an activation, and so the text."""
    folder = exported_mini(tmp_path, "--bits", str(bits))
    _check(folder, written_by_llmkit(folder), in_batch=False)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_kept_blocks_of_a_gguf_file(kind, tmp_path):
    folder = exported_gguf(tmp_path, kind, "--accuracy-level", "0")
    _check(folder, written_by_llmkit(folder))


def _check(folder, wanted, *, in_batch=True):
    model = optimum.ORTModelForCausalLM.from_pretrained(folder, session_options=one_thread())
    assert [written(model, [p])[0] for p in PROMPTS] == wanted
    if in_batch:
        assert written(model, *left_padded(PROMPTS, 0)) == wanted


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
    assert [d["case"] for d in document["parity"]] == ["prefill", "cached steps", "left-padded row", "row beside it"]
    assert all(d["largest"] < 1e-5 for d in document["parity"])
    assert main(["verify", str(out)]) == 0

    from llmkit.decoder.generate import generate

    found = generate(load_onnx(out), PROMPTS, max_new_tokens=N_TOKENS)
    assert found == [written(model, [p])[0] for p in PROMPTS]
    capsys.readouterr()
    assert main(["export", str(tmp_path / "source"), "--to", "onnx", "--via", "optimum", "-o", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
