"""What every command that writes a model does: plan, then print the plan or run it, then sum up."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llmkit.cli.command import Interrupted
from llmkit.cli.options import Writing
from llmkit.cli.output import Output, duration

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.pipeline.plan import Plan
    from llmkit.pipeline.runner import WriteObserver

    # What a command adds when the model is written: entries of the document, and their rendering.
    Finish = Callable[[Mapping[str, Any]], tuple[dict[str, Any], Callable[[], None]]]

__all__ = ["write"]


def write(
    out: Output,
    checkpoint: Checkpoint,
    writing: Writing,
    *,
    details: Mapping[str, str] | None = None,
    observe: WriteObserver | None = None,
    finish: Finish | None = None,
    findings: Callable[[], Mapping[str, Any]] | None = None,
    hash_links: bool = True,
) -> None:
    """Plan the writing of `checkpoint`; print the plan with `--dry-run`, otherwise carry it out and sum up.

    Args:
        details: lines that the command adds to the plan.
        observe: sees what is written.
        finish: called with the manifest when the model is written.
        findings: what the manifest says was counted on the way.
        hash_links: read files that are shared with the source, for `verify`.
    """
    from llmkit.pipeline.plan import make_plan
    from llmkit.tensors.spec import format_bytes, parse_bytes

    plan = make_plan(
        checkpoint, writing.output, max_shard_size=parse_bytes(writing.max_shard_size), force=writing.force
    )
    plan.check_output(overwrite=writing.overwrite)
    if writing.dry_run:
        document = _plan_document(plan, writing) | {"details": dict(details or {})}
        out.answer(document, lambda: _render_plan(out, document), brief=str(plan.out))
        return
    for note in plan.notes:
        out.note(note)
    for warning in plan.warnings:
        out.warning(warning)
    from llmkit.pipeline.runner import run_plan

    started = time.monotonic()
    try:
        manifest = run_plan(
            plan,
            overwrite=writing.overwrite,
            resume=not writing.no_resume,
            workers=writing.workers,
            progress=out.progress(),
            observe=observe,
            findings=findings,
            hash_links=hash_links,
        )
    except KeyboardInterrupt:
        raise Interrupted(is_resumable=not writing.no_resume) from None
    elapsed = time.monotonic() - started
    more, render_more = finish(manifest) if finish is not None else ({}, lambda: None)
    document = {
        "out": str(plan.out),
        "tensors": len(manifest["tensors"]),
        "nbytes": plan.write_nbytes,
        "files": {name: entry["nbytes"] for name, entry in manifest["files"].items()},
        "elapsed_s": round(elapsed, 3),
        "recipe": manifest["recipe"],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        **more,
    }

    def render() -> None:
        rate = format_bytes(plan.write_nbytes / elapsed) if elapsed > 0 else "?"
        out.line(
            f"wrote {plan.out}: {format_bytes(plan.write_nbytes)} in {_n(len(plan.files), 'weight file')}, "
            f"{_n(len(manifest['tensors']), 'tensor')}, {duration(elapsed)} ({rate}/s)"
        )
        render_more()
        out.hint(f"llmkit verify {plan.out}")

    out.answer(document, render, brief=str(plan.out))


def _plan_document(plan: Plan, writing: Writing) -> dict[str, Any]:
    from llmkit.cli.estimate import measured_rates
    from llmkit.pipeline.runner import default_workers

    workers = writing.workers or default_workers()
    read_rate, write_rate = measured_rates(list(plan.inputs), plan.out.parent)
    dtypes: dict[str, int] = {}
    for lazy in plan.checkpoint.tensors.values():
        dtypes[lazy.dtype.name] = dtypes.get(lazy.dtype.name, 0) + lazy.spec.nbytes
    return {
        "dry_run": True,
        **plan.summary(),
        "dtypes": dtypes,
        "workers": workers,
        "peak_nbytes": plan.peak_nbytes(workers),
        "disk_free_nbytes": shutil.disk_usage(plan.out.parent).free,
        "read_nbytes_per_s": round(read_rate),
        "write_nbytes_per_s": round(write_rate),
        "estimated_s": round(plan.read_nbytes / read_rate + plan.write_nbytes / write_rate, 1),
    }


def _render_plan(out: Output, d: Mapping[str, Any]) -> None:
    from llmkit.tensors.spec import format_bytes

    weights = d["weight_files"]
    dtypes = ", ".join(f"{k} {format_bytes(v)}" for k, v in d["dtypes"].items())
    out.record(
        {
            "plan": f"{d['out']} (dry run: nothing is written)",
            "recipe": "\n".join(_step(s) for s in d["recipe"]) or "copy",
            **d["details"],
            "notes": "\n".join(d["notes"]) or None,
            "reads": format_bytes(d["read_nbytes"]),
            "writes": f"{format_bytes(d['write_nbytes'])}: {_n(len(weights), 'weight file')}, "
            f"{_n(len(d['files']) - len(weights), 'small file')}, {_n(d['tensors'], 'tensor')} ({dtypes})",
            "disk": f"{format_bytes(d['write_nbytes'])} needed, {format_bytes(d['disk_free_nbytes'])} free",
            "peak memory": f"{format_bytes(d['peak_nbytes'])} of tensors at a time ({_n(d['workers'], 'worker')}), "
            "besides Python and torch",
            "time": f"{duration(d['estimated_s'])} or more: reading at {format_bytes(d['read_nbytes_per_s'])}/s and "
            f"writing at {format_bytes(d['write_nbytes_per_s'])}/s, as measured now; computing comes on top",
        }
    )
    for warning in d["warnings"]:
        out.warning(warning)


def _step(step: Mapping[str, Any]) -> str:
    shown = {k: v for k, v in step.items() if k != "transform" and isinstance(v, str | int | float | bool)}
    return " ".join([str(step.get("transform", "?")), *(f"{k}={v}" for k, v in shown.items())])


def _n(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
