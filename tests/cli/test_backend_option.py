"""`--backend` on the command line, with a family that no plugin describes."""

from __future__ import annotations

import shutil

import pytest

HINT = "hint: --backend transformers computes it with the installed transformers' class\n"


@pytest.fixture(scope="module")
def strange(tmp_path_factory, tiny):
    """A Persimmon model, which no plugin describes, with the tokenizer of the tiny model."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("strange") / "persimmon"
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(
        "persimmon", vocab_size=130, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_generate(call, strange):
    import torch
    import transformers

    args = ["generate", strange, "w5 w6 w7", "--max-tokens", "6"]
    refused = call(*args)
    assert refused.code == 2
    assert "no plugin describes its architecture: PersimmonForCausalLM" in refused.err
    assert refused.err.endswith(HINT)
    assert refused.out == ""
    done = call(*args, "--backend", "transformers", "--json")
    assert done.code == 0, done
    theirs = transformers.AutoModelForCausalLM.from_pretrained(strange).eval()
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(strange)("w5 w6 w7")["input_ids"]])
    made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    wanted = made[0, ids.shape[1] :].tolist()
    assert done.document["tokens"] == [t for t in wanted if t != 2]


def test_perplexity(call, strange, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text(" ".join(f"w{i % 90}" for i in range(100)))
    args = ["perplexity", strange, "--text", text, "--context", "50"]
    assert call(*args).err.endswith(HINT)
    done = call(*args, "--backend", "transformers", "--json")
    assert (done.code, done.document["n_tokens"]) == (0, 100)


def test_eval(call, strange, tmp_path):
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        rows = [f"w{i} w{i + 1},w1,w2,w3,w4,{'ABCD'[i % 4]}" for i in range(6)]
        (tmp_path / split / f"sociology_{split}.csv").write_text("\n".join(rows) + "\n")
    args = ["eval", strange, "--bench", "mmlu", "--data", tmp_path, "--shots", "1", "-o", tmp_path / "run.json"]
    refused = call(*args)
    assert (refused.code, refused.err.endswith(HINT)) == (2, True)
    assert not (tmp_path / "run.json").exists()
    done = call(*args, "--backend", "transformers", "--json")
    assert done.code == 0, done
    assert done.document["model"]["backend"] == "transformers"
    assert done.document["benches"]["mmlu"]["micro"]["n"] == 6


def test_a_backend_that_is_none(call, tiny):
    done = call("generate", tiny, "w5", "--backend", "vllm")
    assert done.code == 2
    assert (
        done.err == "error: --backend vllm is for llmkit eval alone\nhint: --backend auto, llmkit, transformers, onnx\n"
    )
