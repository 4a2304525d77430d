"""The common part of commands that write a model: plan, then print the plan or run it, then report."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import typer

from llmkit.cli.interrupts import Interrupted, interruptible
from llmkit.cli.options import WriteOptions
from llmkit.cli.output import Output, duration
from llmkit.errors import counted, listing
from llmkit.tensors.spec import DType, format_bytes, parse_bytes

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.pipeline.plan import Plan
    from llmkit.pipeline.runner import WriteObserver
    from llmkit.pipeline.target import Target


Addition: TypeAlias = tuple[dict[str, Any], Callable[[], None]]
"""What a command adds when its output is written: entries of the document, and their rendering for people."""


def write(
    out: Output,
    checkpoint: Checkpoint,
    writing: WriteOptions,
    *,
    details: Mapping[str, str] | None = None,
    observe: WriteObserver | None = None,
    finish: Callable[[Mapping[str, Any]], Addition] | None = None,
    findings: Callable[[], Mapping[str, Any]] | None = None,
    hash_links: bool = True,
    hint: str | None = None,
) -> None:
    """Plan the writing of `checkpoint`; print the plan with `--dry-run`, otherwise carry it out and sum up.

    Args:
        details: lines that the command adds to the plan.
        observe: sees what is written.
        finish: called with the manifest when the model is written.
        findings: what the manifest says was counted on the way.
        hash_links: read files that are shared with the source, for `verify`.
        hint: what to do next, `{out}` being what is written; None: look at it.
    """
    from llmkit.formats.container import SafetensorsFiles
    from llmkit.formats.torch_zip import TorchFiles
    from llmkit.pipeline.plan import make_plan
    from llmkit.pipeline.target import partial_path

    if not isinstance(checkpoint.container, SafetensorsFiles | TorchFiles):
        out.refuse_options({"max_shard_size"}, "this layout, whose files its format gives")
    plan = make_plan(
        checkpoint, writing.output, max_shard_size=parse_bytes(writing.max_shard_size), force=writing.force
    )
    target = plan.target(overwrite=writing.overwrite, force=writing.force, inputs=writing.inputs)
    if writing.dry_run:
        target.check_place()
        document = _plan_document(plan, writing, hash_links) | {"details": dict(details or {})}
        answer_plan(out, document, lambda: _render_plan(out, document), target, plan.need_nbytes)
        return
    if not os.path.lexists(partial_path(plan.out)):  # else what is left is looked at first
        target.check(plan.need_nbytes)
    for note in plan.notes:
        out.note(note)
    for warning in plan.warnings:
        out.warning(warning)
    started = time.monotonic()
    manifest = _carried_out(out, plan, writing, observe, findings, hash_links)
    elapsed = time.monotonic() - started
    document = _written(plan, manifest, elapsed, resumed_nbytes(out, manifest))
    not_finite = document["not_finite"]
    if not_finite and "overflow" not in manifest["run"]:
        out.warning(_not_finite(not_finite, plan))
    with interruptible(lambda: interrupted_check(plan.out)):
        more, render_more = finish(manifest) if finish is not None else ({}, lambda: None)

    def render() -> None:
        out.line(_sentence(plan, document, elapsed))
        render_more()
        out.hint((hint or ("llmkit inspect {out}" if plan.is_file else "llmkit verify {out}")).format(out=plan.out))

    out.answer(document | more, render, brief=str(plan.out))


def _carried_out(
    out: Output,
    plan: Plan,
    writing: WriteOptions,
    observe: WriteObserver | None,
    findings: Callable[[], Mapping[str, Any]] | None,
    hash_links: bool,
) -> dict[str, Any]:
    """The manifest of what is written now by the plan.

    Raises:
        Interrupted: Ctrl-C; it says where what is done is kept.
    """
    from llmkit.pipeline.runner import run_plan
    from llmkit.pipeline.target import partial_path

    with interruptible(lambda: interrupted_run(partial_path(plan.out), is_resumable=not writing.no_resume)):
        return run_plan(
            plan,
            overwrite=writing.overwrite,
            force=writing.force,
            inputs=writing.inputs,
            resume=not writing.no_resume,
            workers=writing.workers,
            progress=out.progress(),
            observe=observe,
            findings=findings,
            hash_links=hash_links,
        )


def _written(plan: Plan, manifest: Mapping[str, Any], elapsed: float, resumed: int) -> dict[str, Any]:
    """The document of what was written."""
    shared = {name: entry for name, entry in manifest["files"].items() if "sharing" in entry}
    return {
        "out": str(plan.out),
        "tensors": len(manifest["tensors"]),
        "nbytes": plan.write_nbytes,
        "shared": {name: {k: entry[k] for k in ("sharing", "linked", "nbytes")} for name, entry in shared.items()},
        "files": {name: entry["nbytes"] for name, entry in manifest["files"].items()},
        "elapsed_s": round(elapsed, 3),
        "resumed_nbytes": resumed,
        "not_finite": manifest["run"].get("not_finite", {}),
        "recipe": manifest["recipe"],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
    }


def _sentence(plan: Plan, d: Mapping[str, Any], elapsed: float) -> str:
    """The same in a line."""
    rate = ""
    text = f"wrote {plan.out}: {format_bytes(plan.write_nbytes)}"
    if plan.files:
        text += f" in {counted(len(plan.files), 'weight file')}, {counted(d['tensors'], 'tensor')}"
        rate = f" ({format_bytes((plan.write_nbytes - d['resumed_nbytes']) / elapsed)}/s)" if elapsed > 0 else ""
    return text + _shared(d["shared"]) + f", {duration(elapsed)}{rate}"


def require_place(writing: WriteOptions) -> None:
    """Refuse, before a text is read, a place where the plan would refuse to write; what a run left there is kept.

    Raises:
        OutputError: the output exists, or its parent is missing.
    """
    from llmkit.pipeline.target import Target, partial_path

    place = Path(writing.output)
    if not (writing.overwrite or os.path.lexists(partial_path(place))):
        Target(place, inputs=tuple(writing.inputs)).check_place()


def answer_plan(
    out: Output, document: Mapping[str, Any], render: Callable[[], None], target: Target, need_nbytes: int
) -> None:
    """The answer of `--dry-run`. Where the disk is too small it is that and the error, in one document, exit code 2."""
    shortage = target.shortage(need_nbytes)
    if shortage is None:
        out.answer(document, render, brief=str(target.out))
        return
    error = (shortage.kind, shortage.message, shortage.hint)
    out.answer({**document, "error": dict(zip(("kind", "message", "hint"), error, strict=True))}, render)
    if not out.is_json:
        out.error(*error)
    raise typer.Exit(shortage.exit_code)


def interrupted_run(kept: Path, *, is_resumable: bool) -> Interrupted:
    """Ctrl-C while the output is made: where what is done is kept."""
    hint = "without --no-resume the same command goes on where it stopped; with it, it starts anew"
    return Interrupted(is_resumable=is_resumable, kept=f"{kept} keeps what is done", hint=hint)


def resumed_nbytes(out: Output, manifest: Mapping[str, Any]) -> int:
    """The bytes that an interrupted run had written; a note says so."""
    run = manifest["run"]
    nbytes = int(run.get("nbytes_resumed", 0))
    if run.get("steps_resumed"):
        out.note(f"went on from an interrupted run: {format_bytes(nbytes)} were written already")
    return nbytes


def interrupted_check(folder: Path) -> Interrupted:
    """Ctrl-C when the output is whole and what comes after it is not done."""
    return Interrupted(
        is_resumable=False,
        kept=f"{folder} is written, but not checked",
        hint=f"llmkit verify {folder} looks at its bytes; with --overwrite it is written and checked again",
    )


def _not_finite(counts: Mapping[str, int], plan: Plan) -> str:
    """Values that are no numbers in what was computed: the inputs had them, or the dtype holds no larger ones."""
    most = sorted(counts.items(), key=lambda entry: -entry[1])
    values = "1 value is" if sum(counts.values()) == 1 else f"{sum(counts.values())} values are"
    text = f"{values} NaN or infinite in what was written: {listing((f'{name} ({n})' for name, n in most), 3)}"
    if any(plan.checkpoint.tensors[name].dtype is DType.F16 for name in counts):
        text += "; float16 holds none beyond 65504, bfloat16 does"
    return text


def _shared(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """How much of an output is the source's own files, in words."""
    words = {"hard link": "linked {} of the source", "reflink": "shared {} of the source (reflinks)"}
    words |= {"copy": "copied {} from another disk"}
    nbytes: dict[str, int] = {}
    for entry in entries.values():
        nbytes[entry["sharing"]] = nbytes.get(entry["sharing"], 0) + entry["nbytes"]
    return "".join(f", {words[how].format(format_bytes(n))}" for how, n in nbytes.items())


def _plan_document(plan: Plan, writing: WriteOptions, hash_links: bool) -> dict[str, Any]:
    from llmkit.cli.estimate import measured_rates
    from llmkit.pipeline.pool import default_workers

    workers = writing.workers or default_workers()
    read_rate, write_rate = measured_rates([*plan.inputs, *plan.links.values()], plan.out.parent)
    dtypes: Counter[DType] = Counter()
    for spec, n in plan.checkpoint.spec_counts.items():
        dtypes[spec.dtype] += n * spec.nbytes
    read_nbytes = plan.read_nbytes + (plan.linked_nbytes if hash_links else plan.copied_nbytes)
    write_nbytes = plan.write_nbytes + plan.copied_nbytes
    return {
        "dry_run": True,
        **plan.summary(),
        "read_nbytes": read_nbytes,
        "dtypes": {dtype.name: nbytes for dtype, nbytes in dtypes.items()},
        "workers": workers,
        "peak_nbytes": plan.peak_nbytes(workers),
        "disk_free_nbytes": shutil.disk_usage(plan.out.parent).free,
        "read_nbytes_per_s": round(read_rate),
        "write_nbytes_per_s": round(write_rate),
        "estimated_s": round(read_nbytes / read_rate + write_nbytes / write_rate, 1),
    }


def _render_plan(out: Output, d: Mapping[str, Any]) -> None:
    weights = d["weight_files"]
    dtypes = ", ".join(f"{k} {format_bytes(v)}" for k, v in d["dtypes"].items())
    out.record(
        {
            "plan": f"{d['out']} (dry run: nothing is written)",
            "recipe": "\n".join(described_step(s) for s in d["recipe"]) or "copy",
            **d["details"],
            "notes": "\n".join(d["notes"]) or None,
            "reads": format_bytes(d["read_nbytes"]),
            "writes": f"{format_bytes(d['write_nbytes'])}: "
            + (f"{counted(len(weights), 'weight file')}, " if weights else "")
            + counted(len(d["files"]) - len(weights), "small file")
            + (f", {counted(d['tensors'], 'tensor')} ({dtypes})" if weights else ""),
            "shares": _planned_links(d),
            "disk": f"{format_bytes(d['write_nbytes'] + d['copied_nbytes'])} needed, "
            f"{format_bytes(d['disk_free_nbytes'])} free",
            "peak memory": f"{format_bytes(d['peak_nbytes'])} of tensors at a time "
            f"({counted(d['workers'], 'worker')}), besides Python and torch"
            if weights
            else None,
            "time": f"{duration(d['estimated_s'])} or more: reading at {format_bytes(d['read_nbytes_per_s'])}/s and "
            f"writing at {format_bytes(d['write_nbytes_per_s'])}/s, as measured now; computing comes on top",
        }
    )
    for warning in d["warnings"]:
        out.warning(warning)


def _planned_links(d: Mapping[str, Any]) -> str | None:
    if not d["links"]:
        return None
    text = f"{format_bytes(d['linked_nbytes'])}: {', '.join(d['links'])}"
    copied = d["copied_nbytes"]
    return text + (f" ({format_bytes(copied)} are copied: the source is on another disk)" if copied else "")


def described_step(step: Mapping[str, Any]) -> str:
    """A step of a recipe in one line: its name, then its parameters that are no lists or tables."""
    shown = {k: v for k, v in step.items() if k != "transform" and isinstance(v, str | int | float | bool)}
    return " ".join([str(step.get("transform", "?")), *(f"{k}={v}" for k, v in shown.items())])
