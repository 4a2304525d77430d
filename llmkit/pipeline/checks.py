"""Structural checks of a checkpoint against its architecture: the mistakes that a plan can find without data."""

from __future__ import annotations

from llmkit.architecture import registry
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.quantized import dequantized
from llmkit.errors import SpecError, listing


def check_structure(checkpoint: Checkpoint, *, force: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compare names and shapes with what the config says.

    Returns:
        Notes and warnings for the plan.

    Raises:
        SpecError: tensors are missing or have another shape than the config says (a warning with `force`).
    """
    if not checkpoint.config:
        return (), ()
    if checkpoint.architecture is None:
        names = listing(registry.claims(checkpoint.config)) or "its architecture"
        return (f"no plugin describes {names}: names and shapes are not checked",), ()
    floats = checkpoint if checkpoint.float_specs else dequantized(checkpoint)
    specs = checkpoint.float_specs or floats.specs
    report = floats.require_model().check(specs)
    notes: tuple[str, ...] = (
        f"{checkpoint.architecture.name} architecture: {len(specs)} tensors checked against the config",
    )
    if report.problems and not force:
        raise SpecError(
            f"{checkpoint.label}: the tensors do not fit the config: {listing(report.problems, 3)}",
            hint="correct config.json, or use the weights it was written for (`llmkit inspect MODEL --tensors`)",
        )
    from llmkit.tokenization.agreement import (
        compare_vocabulary,  # an export has nothing to check, nor reads a vocabulary
    )

    agreement = compare_vocabulary(checkpoint)
    notes += report.notes + ((agreement.note,) if agreement.note else ())
    return notes, tuple(report.problems) + ((agreement.warning,) if agreement.warning else ())
