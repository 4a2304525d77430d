"""A checkpoint's tokenizer, from the files it carries."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError

__all__ = ["end_tokens", "load_tokenizer"]


def load_tokenizer(ckpt: Checkpoint) -> Any:
    """The transformers tokenizer of a checkpoint; code that a folder carries is never run.

    Raises:
        InputError: no tokenizer files, or files that transformers cannot read.
    """
    files = ckpt.tokenizer_files
    if not files:
        raise InputError(
            f"{ckpt.label}: no tokenizer files",
            hint="copy tokenizer.json (or tokenizer.model) and tokenizer_config.json into the model's folder",
        )
    if ckpt.origin is not None and ckpt.origin.is_dir():
        return _from_folder(ckpt.origin, ckpt.label)
    with TemporaryDirectory(prefix="llmkit-tokenizer-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content.read())
        (Path(folder) / "config.json").write_text(json.dumps(dict(ckpt.config)), encoding="utf-8")
        return _from_folder(Path(folder), ckpt.label)


def _from_folder(folder: Path, label: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        first = (str(error).strip() or "no reason given").splitlines()[0]
        raise InputError(
            f"{label}: transformers cannot read its tokenizer ({type(error).__name__}: {first})"
        ) from error


def end_tokens(ckpt: Checkpoint) -> list[int]:
    """The ids that end a generated text, as generation_config.json (else config.json) names them."""
    file = ckpt.files.get("generation_config.json")
    try:
        generation = json.loads(file.read()) if file is not None else {}
    except ValueError:
        generation = {}
    named = (generation if isinstance(generation, dict) else {}).get("eos_token_id", ckpt.config.get("eos_token_id"))
    return [int(i) for i in (named if isinstance(named, list) else [named]) if isinstance(i, int)]
