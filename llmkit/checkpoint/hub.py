"""Resolves what a user wrote, a path or a hub id, to a folder on disk."""

from __future__ import annotations

import re
from pathlib import Path

from llmkit.errors import InputError, nearest
from llmkit.formats.paths import expanded
from llmkit.formats.unreadable import kind_of_entry

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_ADDRESS = re.compile(
    r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)?([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)"
    r"(?:[@:][\w./-]+|/tree/[\w./-]+)?(?:(?:/(?:blob|resolve)/[\w.-]+)?/([\w./-]+[.]\w+))?/?"
)  # of a page, a revision, a file
_HINT = "give a model folder, a weight file or a hub id"
_CHECK = "check the spelling and the network, or give a local folder"
# By the names of huggingface_hub's classes, the most special first in each one's order of bases.
_NO_CACHE = "the cache cannot be used", "HF_HOME names a folder that can be written to"
_CAUSES = {
    "GatedRepoError": ("it is for those who asked", "ask for access on https://huggingface.co/ID, then: hf auth login"),
    "RepositoryNotFoundError": ("none has this name, or it is private", "check the spelling, or: hf auth login"),
    "OfflineModeIsEnabled": ("it is not in the cache, and HF_HUB_OFFLINE is set", _CHECK),
    "LocalEntryNotFoundError": ("it is not in the cache, and the network is off or does not answer", _CHECK),
    "PermissionError": _NO_CACHE, "NotADirectoryError": _NO_CACHE, "FileExistsError": _NO_CACHE,
}  # fmt: skip


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
    hint = f"did you mean {path.parent / guess}?" if guess else _hub_id_in(text) or _HINT
    raise InputError(f"{model}: no such file or folder", hint=hint)


def _hub_id_in(text: str) -> str | None:
    """The hub id that another spelling of it means, as a hint: a page's address, a revision, a file of a model."""
    if text.startswith("file://"):
        return f"give the path: {text.removeprefix('file://')}"
    found = _ADDRESS.fullmatch(text)
    if found is None or Path(found[1]).exists() or text == f"{found[1]}/{found[2]}":
        return None
    owner, name, file = found.groups()
    if file:
        return f"hf download {owner}/{name} {file} --local-dir DIR fetches one file of a model; then give DIR/{file}"
    return f"a model of the hub is given as {owner}/{name}, in its newest state"


def _from_hub(model_id: str) -> Path:
    wanted = ["*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.md", "LICENSE*"]
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model_id, allow_patterns=wanted))
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        why, hint = next((_CAUSES[kind] for kind in kinds if kind in _CAUSES), (str(error).partition("\n")[0], _CHECK))
        raise InputError(
            f"{model_id}: no such folder here, and the hub did not give it: {why or kinds[0]}",
            hint=hint.replace("ID", model_id),
        ) from error
