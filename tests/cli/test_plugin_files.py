"""A drafted plugin is used by the commands that its draft shows."""

from __future__ import annotations

import json

import pytest

from llmkit.architecture.registry import default_registry


@pytest.fixture
def okapi(model):
    """A model of a family that nothing describes: Llama's tensors under another name."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "architectures": ["OkapiForCausalLM"], "model_type": "okapi"})
    )
    return model


@pytest.fixture
def draft(call, okapi, tmp_path):
    made = call("plugins", "new", okapi, "--name", "okapi", "-o", tmp_path / "mine.py")
    assert made.code == 0, made.err
    return made, tmp_path / "mine.py"


def test_a_draft_shows_how_it_is_used_and_installed(draft, okapi):
    made, file = draft
    assert f"llmkit inspect {okapi} --plugin {file}" in made.err
    assert f"export LLMKIT_PLUGINS={file}" in made.err
    assert '[project.entry-points."llmkit.architectures"]\n  okapi = "mine:ARCHITECTURE"' in made.err


def test_every_command_takes_a_plugin_file(call, draft, okapi, tmp_path, monkeypatch):
    _, file = draft
    assert call("inspect", okapi, "--json").document["architecture"] is None
    assert call("generate", okapi, "w1 w2", "--max-tokens", "2").code == 2
    assert call("inspect", okapi, "--plugin", file, "--json").document["architecture"] == "okapi"
    done = call("generate", okapi, "w1 w2", "--max-tokens", "2", "--plugin", file, "--json")
    assert (done.code, len(done.document["tokens"])) == (0, 2)
    assert call("inspect", okapi, "--json").document["architecture"] is None  # for one run only
    monkeypatch.setenv("LLMKIT_PLUGINS", f"{file}:")
    assert call("inspect", okapi, "--json").document["architecture"] == "okapi"
    listed = call("plugins", "list", "--json").document["plugins"]
    assert (listed[0]["name"], listed[0]["origin"]) == ("okapi", str(file))


def test_a_file_goes_before_an_installed_plugin(call, tiny, tmp_path):
    file = tmp_path / "other.py"
    assert call("plugins", "new", tiny, "--name", "other", "-o", file).code == 0
    assert call("inspect", tiny, "--plugin", file, "--json").document["architecture"] == "other"
    assert default_registry().clashes() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("x = 1", "holds no Architecture"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("raise SystemExit(5)", "cannot be imported"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_plugin_is_refused(call, tiny, tmp_path, text, message):
    file = tmp_path / "bad.py"
    if text is not None:
        file.write_text(text)
    done = call("inspect", tiny, "--plugin", file)
    assert done.code == 2
    assert message in done.err
    assert str(file) in done.err
