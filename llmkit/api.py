"""The two calls that scripts end with: the dry run and the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.pipeline.plan import DEFAULT_MAX_SHARD_NBYTES, Plan, make_plan
from llmkit.pipeline.progress import NO_PROGRESS, Progress


def plan(
    checkpoint: Checkpoint, out: str | Path, *, max_shard_size: int = DEFAULT_MAX_SHARD_NBYTES, force: bool = False
) -> Plan:
    """What `save` would do: files, bytes, peak memory, notes and warnings. No data is read."""
    return make_plan(checkpoint, out, max_shard_size=max_shard_size, force=force)


def save(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    max_shard_size: int = DEFAULT_MAX_SHARD_NBYTES,
    force: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    workers: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Plan and run: write `checkpoint` as a folder of safetensors and return the manifest.

    Raises:
        SpecError, OutputError, InputError: see `llmkit.pipeline.plan.make_plan` and `llmkit.pipeline.runner.run_plan`.
    """
    from llmkit.pipeline.runner import run_plan

    planned = make_plan(checkpoint, out, max_shard_size=max_shard_size, force=force)
    return run_plan(planned, overwrite=overwrite, resume=resume, workers=workers, progress=progress)
