"""The tokenizer files of a checkpoint for programs that run no remote code."""

from __future__ import annotations

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.tokenizer import published_kind, tokenizer_settings
from llmkit.tokenization.to_fast import can_be_fast, fast_files


def tokenizer_without_code(ckpt: Checkpoint) -> tuple[dict[str, FileContent], list[str]]:
    """The files, with a tokenizer.json where the tokenizer is code that transformers would have to run."""
    kind = published_kind(ckpt)
    if kind is None or "tokenizer.json" in ckpt.files:
        return dict(ckpt.files), []
    if not can_be_fast(kind):
        return dict(ckpt.files), []
    new = fast_files(kind, ckpt.files, tokenizer_settings(ckpt.files, ckpt.label), ckpt.config, ckpt.label)
    return {**ckpt.files, **new}, [f"tokenizer.json is made from {kind.file}: transformers needs no code for it"]
