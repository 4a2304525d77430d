"""Warnings, before generation or scoring, that a model may not compute what its authors meant."""

from __future__ import annotations

from llmkit.architecture.registry import find
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.text_part import float_text_part
from llmkit.tokenization.agreement import compare_vocabulary


def model_warnings(ckpt: Checkpoint, backend: str = "auto") -> list[str]:
    """Tokens without rows, and keys of the config that nothing reads (transformers reads its own).

    Raises:
        RequirementError: a quantization that is not read.
        SpecError: the config cannot be bound.
    """
    odd = compare_vocabulary(ckpt).warning
    warnings = [odd] if odd else []
    if backend == "transformers":
        return warnings
    config = float_text_part(ckpt).config  # without what says how the weights are stored
    architecture = find(config)
    return [*warnings, *architecture.bind(config).unread.warnings] if architecture is not None else warnings
