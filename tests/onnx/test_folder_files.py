"""The small files of an exported folder: what Optimum's transformers reads of them, and what llmkit does."""

from __future__ import annotations

import json

import pytest
import transformers
from runtimes import UNUSUAL, expected, exported

from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.decoder.contract import random_checkpoint
from llmkit.onnx.container import OnnxFiles
from llmkit.onnx.export import export
from llmkit.onnx.opening import load_onnx

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")


@pytest.mark.parametrize("name", ["chatglm2", "baichuan", "baichuan13b"])
def test_a_config_that_transformers_knows(name, tmp_path):
    from runtimes import N_TOKENS, PROMPTS

    from llmkit.decoder.generate import generate

    folder = exported(name, tmp_path)
    known = transformers.AutoConfig.from_pretrained(folder)  # raises for an unknown model_type
    original = json.loads((folder / "config.original.json").read_text())
    assert original == json.loads((tmp_path / name / "config.json").read_text())
    ckpt = open_checkpoint(folder)
    assert ckpt.config == original
    decoder = load_onnx(folder)
    dims = decoder.model.dims
    assert decoder.model.family == name
    found = (known.num_hidden_layers, known.hidden_size, known.num_attention_heads, known.num_key_value_heads)
    assert found == (dims.layers, dims.hidden, dims.heads, dims.kv_heads)
    assert known.vocab_size == dims.vocab
    assert known.max_position_embeddings == dims.context
    assert generate(decoder, PROMPTS, max_new_tokens=N_TOKENS) == expected(folder)


@pytest.mark.parametrize("name", ["gemma2", "glm4", "qwen3", *(n for n in UNUSUAL if "falcon" not in n)])
def test_a_config_whose_sizes_optimum_asks_for(name, tmp_path):
    folder = exported(name, tmp_path)
    original = json.loads((folder / "config.original.json").read_text())
    assert original == json.loads((tmp_path / name / "config.json").read_text())
    assert open_checkpoint(folder).config == original
    known, dims = transformers.AutoConfig.from_pretrained(folder), load_onnx(folder).model.dims
    assert known.model_type == "gemma"
    assert known.architectures == original.get("architectures")
    assert "sizes" in known._purpose
    assert (known.num_key_value_heads, known.head_dim) == (dims.kv_heads, dims.head_dim)
    found = (known.num_hidden_layers, known.hidden_size, known.num_attention_heads, known.intermediate_size)
    assert found == (dims.layers, dims.hidden, dims.heads, dims.ffn)
    assert (known.vocab_size, known.max_position_embeddings) == (dims.vocab, dims.context)
    assert (known.bos_token_id, known.eos_token_id, known.pad_token_id) == (1, 2, 0)
    assert known.tie_word_embeddings == original.get("tie_word_embeddings", known.tie_word_embeddings)


@pytest.mark.parametrize("name", ["falcon of 2023", "falcon-40b of 2023"])
def test_a_config_older_than_the_class_of_transformers(name, tmp_path):
    folder = exported(name, tmp_path)
    known = transformers.AutoConfig.from_pretrained(folder)
    assert (known.model_type, known.num_attention_heads) == ("falcon", 4)
    assert open_checkpoint(folder).config["model_type"].startswith("RefinedWeb")


@pytest.mark.parametrize("name", ["llama", "falcon", "gemma", "gemma3", "glm", "stablelm"])
def test_families_of_transformers_keep_their_config(name, tmp_path):
    folder = exported(name, tmp_path)
    assert not (folder / "config.original.json").exists()
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / name / "config.json").read_text())


@pytest.mark.parametrize(
    ("stated", "written"),
    [("TokenizersBackend", "PreTrainedTokenizerFast"), ("LlamaTokenizerFast", "LlamaTokenizerFast"), (None, None)],
)
def test_the_class_of_a_tokenizer_is_one_that_both_transformers_know(stated, written):
    from llmkit.onnx.folder_files import runtime_files

    registry = default_registry()
    architecture = registry.load(next(p for p in registry.plugins if p.name == "llama"))
    settings = {"bos_token": "<s>"} | ({"tokenizer_class": stated} if stated else {})
    ckpt = random_checkpoint(architecture, architecture.tiny_config())
    ckpt = ckpt.derive(files={"tokenizer_config.json": FileContent(data=json.dumps(settings).encode())})
    files, notes = runtime_files(ckpt)
    found = json.loads(files["tokenizer_config.json"].read())
    assert found.get("tokenizer_class") == written
    assert found["bos_token"] == "<s>"
    assert notes == []


@pytest.mark.parametrize("weights", ["link", "copy"])
def test_a_linked_export_shares_the_vocabulary_too(weights, tmp_path):
    from llmkit.cli.app import main

    source = exported("llama", tmp_path).with_name("llama")
    (source / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, "filler": " " * 200_000})
    )
    (source / "tokenizer_config.json").write_text("{}")
    out = tmp_path / "out"
    args = ["export", str(source), "--to", "onnx", "--weights", weights, "--no-check", "-q", "-o", str(out)]
    assert main(args) == 0
    assert (out / "tokenizer.json").samefile(source / "tokenizer.json") == (weights == "link")
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (out / "tokenizer_config.json").samefile(source / "tokenizer_config.json")
    alone = sum(f.stat().st_size for f in out.iterdir() if f.stat().st_nlink == 1)
    assert (alone < 60_000) == (weights == "link")
    assert main(["verify", str(out)]) == 0
    assert open_checkpoint(out).files["tokenizer.json"].read()


@pytest.mark.parametrize(
    ("name", "unfed"),
    [
        ("chatglm", "prefix_length, mask_position"),
        ("rwkv", "past_state.0.last_channel, past_state.0.last_time and 8 more"),
    ],
)
def test_no_config_for_a_runtime_that_cannot_feed_the_graph(name, unfed):
    """ONNX Runtime GenAI feeds ids, a mask, positions, keys and values (checked with 0.18): it would load and fail."""
    registry = default_registry()
    architecture = registry.load(next(p for p in registry.plugins if p.name == name))
    made = export(random_checkpoint(architecture, architecture.tiny_config()))
    assert "genai_config.json" not in made.files
    note = f"for llmkit only: no other runtime feeds {unfed} to the graph; no genai_config.json"
    assert note in made.notes


def test_a_config_for_genai_names_the_inputs_of_the_graph():
    registry = default_registry()
    architecture = registry.load(next(p for p in registry.plugins if p.name == "bloom"))
    made = export(random_checkpoint(architecture, architecture.tiny_config()))
    decoder = json.loads(made.files["genai_config.json"].read())["model"]["decoder"]
    names = [name % layer if "%d" in name else name for name in decoder["inputs"].values()
             for layer in range(decoder["num_hidden_layers"] if "%d" in name else 1)]  # fmt: skip
    assert isinstance(made.container, OnnxFiles)
    assert sorted(names) == sorted(value.name for value in made.container.model.graph.input)
