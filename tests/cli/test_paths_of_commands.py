"""Where a command goes several ways: each option is honoured by a way, or refused there, by name."""

from __future__ import annotations

import inspect

import pytest
from typer.main import get_command

from llmkit.cli.app import app
from llmkit.cli.command import is_read
from llmkit.cli.export_via import HONOURED

VALUES = {
    "attention": "gqa", "weights": "copy", "dtype": "float32", "provider": "cpu", "bits": "8", "group_size": "auto",
    "keep": "*", "only": "*", "embedding_bits": "8", "accuracy_level": "4", "kv_cache_dtype": "int8",
    "calibration": "f",
    "workers": "1", "max_shard_size": "5GB", "method": "rtn",
}  # fmt: skip
FLAGS = {"symmetric", "qdq"}
READ = {
    "delta apply": {"base", "delta"},
    "delta make": {"base", "tuned"},
    "delta xor": {"payload", "base", "expect", "hashes"},
    "delta decrypt": {"encrypted", "key", "expect", "hashes"},
    "lora merge": {"base", "adapters"},
    "lora combine": {"adapters"},
    "lora extract": {"base", "tuned"},
    "vocab extend": {"model", "source", "corpus"},
    "vocab trim": {"model", "corpus"},
    "convert": {"model", "recipe", "statistics"},
    "quantize": {"model", "recipe", "calibration", "statistics", "evaluate"},
    "quantize observe": {"model", "calibration"},
    "export": {"model", "calibration"},
    "plugins new": {"model"},
}  # a folder that holds one of them is never replaced, nor one of them itself


def commands(group, names=()):
    """Every command by its words; a command that others begin with is one, too."""
    for name, command in group.commands.items():
        words = (*names, name)
        if hasattr(command, "commands"):
            yield from commands(command, words)
        yield " ".join(words), command


def test_every_command_knows_its_inputs():
    found = {}
    for name, command in commands(get_command(app)):
        if "overwrite" in {p.name for p in command.params}:
            parameters = inspect.signature(command.callback).parameters.values()
            found[name] = {p.name for p in parameters if is_read(p)} - {"plugin"}
    assert found == READ


def test_the_table_of_optimum_names_every_option_of_export():
    found = {p.name for p in get_command(app).commands["export"].params}
    assert found == HONOURED | VALUES.keys() | FLAGS


@pytest.mark.parametrize("name", [*VALUES, *sorted(FLAGS)])
def test_optimum_refuses_what_it_does_not_honour_even_at_its_default(call, tiny, tmp_path, name):
    option = "--" + name.replace("_", "-")
    given = [option] if name in FLAGS else [option, VALUES[name]]
    done = call("export", tiny, "--via", "optimum", "-o", tmp_path / "out", *given)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {option} is not for --via optimum, ")
    assert f"hint: leave {option} out" in done.err
    assert not (tmp_path / "out").exists()


def test_all_options_that_are_refused_are_in_the_hint(call, tiny, tmp_path):
    given = ["--group-size", "32", "--method", "gptq-fast", "--no-act-order"]
    done = call("quantize", tiny, "--bits", "4", "--format", "gguf", *given, "-o", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert "error: --no-act-order, --group-size, --method are not for --format gguf" in done.err
    assert "hint: leave --no-act-order, --group-size, --method out" in done.err


def test_optimum_honours_no_check(call, tiny, tmp_path, monkeypatch):
    from llmkit.onnx import via

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(via, "export_by_optimum", lambda *_a, **_k: {"files": {}, "recipe": []})
    monkeypatch.setattr(via, "compare_with_transformers", lambda *_a: pytest.fail("it was compared"))
    done = call("export", tiny, "--via", "optimum", "--no-check", "-o", tmp_path / "out", "--json")
    assert (done.code, done.document["parity"]) == (0, None)


@pytest.mark.parametrize("layout", ["meta", "litgpt", "llama2c", "gguf"])
def test_layouts_of_given_files_take_no_shard_size(call, tiny, tmp_path, layout):
    done = call("convert", tiny, "--to", layout, "--max-shard-size", "1MB", "-o", tmp_path / "out")
    assert done.code == 2
    assert "--max-shard-size is not for this layout" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--top-k", "--top-p"])
def test_greedy_text_takes_no_filters_of_sampling(call, tiny, option):
    done = call("generate", tiny, "w1", option, "1")
    assert done.code == 2
    assert f"{option} is not for greedy text" in done.err
    assert call("generate", tiny, "w1", option, "1", "--temperature", "1", "--max-tokens", "1").code == 0
