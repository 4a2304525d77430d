"""What has a file's name and is none (a link to nowhere, a pipe, a folder) is named, and does not pass for absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmkit.checkpoint.checkpoint import open_checkpoint, open_tokenizer_folder
from llmkit.cli.app import main
from llmkit.errors import InputError
from llmkit.formats.adapter_opening import read_adapter
from llmkit.tokenization.bundle import tokenizer_contents
from llmkit.transforms.vocab.sources import read_source

KINDS = {
    "is a symbolic link to nowhere, which is not there": lambda path: path.symlink_to("nowhere"),
    "is a symbolic link that leads nowhere": lambda path: path.symlink_to(path.name),
    "is no regular file": os.mkfifo,
    "is a folder, no file": Path.mkdir,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "m" / "model.safetensors")
    return tmp_path / "m"


@pytest.mark.parametrize("says", KINDS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_name_that_is_read_and_is_no_file(folder, name, says):
    (folder / name).unlink(missing_ok=True)
    KINDS[says](folder / name)
    opening = [open_checkpoint]
    if name not in ("config.json", "generation_config.json"):
        opening.append(tokenizer_contents)
    for opens in opening:
        with pytest.raises(InputError, match=f"{name} {says}"):
            opens(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match=f"{name} {says}"):
        open_tokenizer_folder(folder)


@pytest.mark.parametrize("says", [says for says in KINDS if "folder" not in says])
def test_weights_that_are_no_file(folder, says):
    (folder / "model.safetensors").unlink()
    KINDS[says](folder / "model.safetensors")
    with pytest.raises(InputError, match=f"model.safetensors {says}"):
        open_checkpoint(folder)
    KINDS[says](folder / "shard.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}')
    with pytest.raises(InputError, match=f"1 of 1 shards are missing.* {says}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("says", [says for says in KINDS if "link" in says])
def test_a_model_that_is_a_link_to_nothing(tmp_path, says):
    KINDS[says](tmp_path / "m")
    with pytest.raises(InputError, match=f"m {says}"):
        open_checkpoint(tmp_path / "m")


def test_an_adapters_config_that_is_no_file(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    (tmp_path / "adapter_config.json").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"adapter_config.json is a symbolic link to nowhere"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("head", "says", "hint"),
    [
        (bytes(4096), "zeros where its header should be", "damaged: fetch it again"),
        (bytes(8) + b'{"a": {}}', "begins with", "damaged: fetch it again"),
        (b"\xff" * 64, "begins with", "damaged: fetch it again"),
        ("Ein schöner Text".encode() * 4, "text, not weights", "damaged: fetch it again"),
        (b"GGUF\3\0\0\0", "a GGUF file of another name", "rename it: model.gguf"),
    ],
)
def test_weights_that_are_something_else(folder, capsys, head, says, hint):
    (folder / "model.safetensors").write_bytes(head)
    assert main(["inspect", str(folder)]) == 2
    said = capsys.readouterr().err
    assert f"model.safetensors {'' if says == 'begins with' else 'is '}{says}" in said
    assert hint in said


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"eos_token_id": 2}x', "\x00", '{"a": 1}' * 2])
def test_a_damaged_generation_config_is_told(folder, text):
    (folder / "generation_config.json").write_text(text)
    (warning,) = (w for w in open_checkpoint(folder).warnings if "generation_config" in w)
    assert "it is passed over, as transformers does" in warning
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert not [w for w in open_checkpoint(folder).warnings if "generation_config" in w]


@pytest.mark.parametrize("says", KINDS)
def test_what_stands_where_a_plugin_or_tokens_are_looked_for(folder, tmp_path, capsys, says):
    KINDS[says](tmp_path / "x.py")
    assert main(["inspect", str(folder), "--plugin", str(tmp_path / "x.py")]) == 2
    assert f"--plugin {tmp_path / 'x.py'} {says}" in capsys.readouterr().err
    if "link" in says:
        with pytest.raises(InputError, match=f"x.py {says}"):
            read_source(tmp_path / "x.py")
