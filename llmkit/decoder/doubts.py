"""Warnings that a model may not compute what its authors meant, given before its text or its scores."""

from __future__ import annotations

from llmkit.architecture.registry import find
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.text_part import text_part
from llmkit.tokenization.agreement import compare_vocabulary


def doubts_of(ckpt: Checkpoint, backend: str = "auto") -> list[str]:
    """Tokens without rows, and keys of the config that nothing reads (transformers reads its own).

    Raises:
        SpecError: the config cannot be bound.
    """
    odd = compare_vocabulary(ckpt).warning
    doubts = [odd] if odd else []
    ckpt = text_part(ckpt)
    architecture = find(ckpt.config) if backend != "transformers" else None
    return [*doubts, *architecture.bind(ckpt.config).unread.warnings] if architecture is not None else doubts
