"""Resolves what a user wrote, a path or a hub id, to a folder on disk."""

from __future__ import annotations

import re
from pathlib import Path

from llmkit.errors import InputError, nearest
from llmkit.formats.paths import expanded
from llmkit.formats.unreadable import kind_of_entry

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_path(model: str | Path) -> Path:
    """The folder or file that `model` names.

    A path that exists wins. Otherwise something of the form `owner/name` is looked for in the local hub cache, then
    downloaded (weights, config and tokenizer only; never code).

    Raises:
        InputError: no such path, and no such model on the hub (or no network).
    """
    if model == "":
        raise InputError("the name of a model is empty", hint="give a folder, a file or a hub id; is a variable unset?")
    path = expanded(model)
    if path.is_file() or path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{model} is neither a folder nor a regular file (a pipe, a socket or a device)")
    if path.is_symlink():
        raise InputError(f"{model} is {kind_of_entry(path)}", hint="give the folder or file itself")
    text = str(model)
    if _HUB_ID.fullmatch(text) and not path.parent.exists():
        return _from_hub(text)
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    guess = nearest(path.name, siblings)
    raise InputError(
        f"{model}: no such file or folder",
        hint=f"did you mean {path.parent / guess}?" if guess else "give a model folder, a weight file or a hub id",
    )


def _from_hub(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.md", "LICENSE*"]
    try:
        return Path(snapshot_download(model_id, allow_patterns=wanted))
    except Exception as error:
        raise InputError(
            f"{model_id}: no such folder here, and the hub did not give it ({type(error).__name__})",
            hint="check the spelling and the network, or give a local folder",
        ) from error
