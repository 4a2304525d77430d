"""`evaluate` with its options in one line, as tests read best."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.evaluation import runner
from llmkit.evaluation.engine import EngineOptions
from llmkit.evaluation.planning import Selection
from llmkit.evaluation.record import RunRecord


def evaluate(model: Checkpoint | str | Path, bench: Any, **options: Any) -> RunRecord:
    """Score `model`; options are those of a `Selection`, of `EngineOptions`, and of `runner.evaluate`."""
    selected, computed = (
        {f.name: options.pop(f.name) for f in fields(kind) if f.name in options} for kind in (Selection, EngineOptions)
    )
    return runner.evaluate(model, Selection(bench, **selected), engine=EngineOptions(**computed), **options)
