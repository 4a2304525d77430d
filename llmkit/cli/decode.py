"""`llmkit delta xor|decrypt`: releases whose files are coded with the bytes of another model."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.command import command
from llmkit.cli.interrupts import interruptible
from llmkit.cli.options import FolderOptions
from llmkit.cli.output import Output, duration
from llmkit.cli.writing import answer_plan, described_step, interrupted_run, resumed_nbytes
from llmkit.errors import InputError, RequirementError, counted, listing
from llmkit.tensors.spec import format_bytes

if TYPE_CHECKING:
    from llmkit.releases.decoding import Decoding
    from llmkit.releases.hash_list import Expected

HashesOption = Annotated[
    Path | None,
    typer.Option("--hashes", metavar="FILE", help="Compare what it is decoded with first: md5sum or sha256sum lines."),
]
ExpectOption = Annotated[
    Path | None,
    typer.Option("--expect", metavar="FILE", help="Compare the decoded files too: md5sum or sha256sum lines."),
]


@command(
    "llmkit delta xor llama-7b-hf pygmalion-7b/xor_encoded_files -o pygmalion-7b-hf",
    "llmkit delta xor llama-30b-hf oasst-sft-6-llama-30b-xor --hashes base.md5 -o oasst-30b",
)
def xor(
    out: Output,
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that the release was made from, as a folder.")],
    payload: Annotated[Path, typer.Argument(metavar="PAYLOAD", help="The folder of coded files.")],
    folder: FolderOptions,
    hashes: HashesOption = None,
    expect: ExpectOption = None,
) -> None:
    """Decode an XOR release (Pygmalion, Metharme, OpenAssistant) with the base it was made from.

    The base must have the very bytes of the one that was used: the conversion, and the versions of transformers and
    torch, that the model card names. Samples of each file tell most wrong bases at once, the check sums inside the
    torch files tell damage, statistics an unrelated base. A tuned or rounded copy of the base is told by hashes alone:
    --hashes and --expect.
    """
    from llmkit.checkpoint.hub import resolve_path
    from llmkit.releases.xored import plan_xor

    _decode(out, plan_xor(resolve_path(base), payload), folder, hashes, expect)


@command(
    "llmkit delta decrypt LLaMA/7B/consolidated.00.pth BELLE-LLaMA-7B-2M-enc -o belle-7b",
    "llmkit delta decrypt 7B/consolidated.00.pth *.enc -o point-alpaca --dry-run",
)
def decrypt(
    out: Output,
    key: Annotated[Path, typer.Argument(metavar="KEY", help="The key file: LLaMA-7B's consolidated.00.pth.")],
    encrypted: Annotated[
        list[Path], typer.Argument(metavar="ENC...", help="NAME.<sha256>.enc files, or folders that hold them.")
    ],
    folder: FolderOptions,
    hashes: HashesOption = None,
    expect: ExpectOption = None,
) -> None:
    """Decrypt a release (BELLE, point-alpaca, TechGPT, lawyer-llama: `.enc` files) with its key file.

    The key is consolidated.00.pth of LLaMA-7B, for releases made from LLaMA-13B too. Samples of each file tell a wrong
    key at once, and each decrypted file must have the SHA-256 that its header and its name say.
    """
    from llmkit.releases.encrypted import plan_decrypt

    _decode(out, plan_decrypt(key, encrypted), folder, hashes, expect)


def refuse_coded(path: str, why: str, base: str, release: str) -> None:
    """Point at the command that decodes a coded release, where `path` is one and no command takes it as it is.

    Raises:
        RequirementError: it is one.
    """
    from llmkit.releases.kind import XORED, command_for, has_clear_config, release_kind

    kind = release_kind(Path(path))
    if kind is not None and not (kind == XORED and has_clear_config(Path(path))):
        what = "an XOR release" if kind == XORED else "an encrypted release"
        raise RequirementError(f"{path} is {what}{why}", hint=command_for(kind, base, release))


def _decode(out: Output, decoding: Decoding, folder: FolderOptions, hashes: Path | None, expect: Path | None) -> None:
    from llmkit.pipeline.target import Target, partial_path
    from llmkit.releases.decoding import check_pads, check_samples
    from llmkit.releases.hash_list import read_hash_list
    from llmkit.releases.run import run_decoding

    inputs = (*map(Path, decoding.inputs), *folder.inputs)
    target = Target(folder.output, folder.overwrite, folder.force, inputs)
    if folder.dry_run:
        target.check_place()
    elif not os.path.lexists(partial_path(folder.output)):  # else what is left is looked at first
        target.check(decoding.need_nbytes)
    stated = read_hash_list(hashes) if hashes is not None else {}
    expected = _expected(out, decoding, expect)
    if folder.dry_run:
        check_samples(decoding, out.progress())
        document = _plan_document(decoding, folder, hashes, expected)
        answer_plan(out, document, lambda: _render_plan(out, document), target, decoding.need_nbytes)
        return
    for note in decoding.notes:
        out.note(note)
    warnings = [] if hashes is not None or expect is not None else list(decoding.doubts())
    for warning in warnings:
        out.warning(warning)
    started = time.monotonic()
    kept = partial_path(folder.output)
    with interruptible(lambda: interrupted_run(kept, is_resumable=not folder.no_resume)):
        if hashes is not None:
            left = check_pads(decoding, stated, hashes, workers=folder.workers, progress=out.progress())
            n = sum(c.pad is not None for c in decoding.files)
            out.note(f"{hashes} confirms {'the key' if decoding.is_keyed else f'{n - len(left)} of {n} base files'}")
        manifest = run_decoding(
            decoding,
            target,
            expect=expected,
            is_confirmed=hashes is not None,
            resume=not folder.no_resume,
            workers=folder.workers,
            progress=out.progress(),
        )
    resumed_nbytes(out, manifest)
    for warning in manifest["warnings"]:
        warnings.append(warning)
        out.warning(warning)
    elapsed = time.monotonic() - started
    _sum_up(out, decoding, folder.output, manifest, elapsed, warnings=warnings, n_expected=len(expected))


def _expected(out: Output, decoding: Decoding, path: Path | None) -> dict[str, Expected]:
    if path is None:
        return {}
    from llmkit.releases.hash_list import read_hash_list

    stated, names = read_hash_list(path), {c.name for c in decoding.files}
    expected = {name: value for name, value in stated.items() if name in names}
    if not expected:
        raise InputError(f"{path} names none of the {len(names)} files that are decoded: {listing(sorted(names), 3)}")
    if len(expected) < len(stated):
        out.note(f"{path} also names {listing(n for n in stated if n not in names)}, which this release does not hold")
    return expected


def _sum_up(
    out: Output,
    decoding: Decoding,
    folder: Path,
    manifest: Mapping[str, Any],
    elapsed: float,
    *,
    warnings: Sequence[str],
    n_expected: int,
) -> None:
    nbytes = sum(f["nbytes"] for f in manifest["files"].values())
    checks = {
        "sha256": sum(c.sha256 is not None for c in decoding.files),
        "expected": n_expected,
        "files": len(decoding.files),
    }
    document = {
        "out": str(folder),
        "nbytes": nbytes,
        "files": manifest["files"],
        "elapsed_s": round(elapsed, 3),
        "recipe": manifest["recipe"],
        "notes": list(decoding.notes),
        "warnings": list(warnings),
        "confirmed": checks,
    }

    def render() -> None:
        rate = format_bytes(nbytes / elapsed) if elapsed > 0 else "?"
        out.line(
            f"wrote {folder}: {format_bytes(nbytes)} in {counted(len(decoding.files), 'file')}, "
            f"{duration(elapsed)} ({rate}/s)"
        )
        if checks["sha256"]:
            out.line(f"{checks['sha256']} of {checks['files']} files have the SHA-256 that the release says")
        if n_expected:
            out.line(f"{n_expected} of {checks['files']} files have the expected hash")
        out.hint(f"llmkit inspect {folder}")

    out.answer(document, render, brief=str(folder))


def _plan_document(
    decoding: Decoding, folder: FolderOptions, hashes: Path | None, expected: Mapping[str, Expected]
) -> dict[str, Any]:
    return {
        "dry_run": True,
        "out": str(folder.output),
        "recipe": [dict(decoding.step)],
        "files": {
            c.name: {
                "payload": c.label,
                "with": str(c.pad.source.path) if c.pad else None,
                "nbytes": c.nbytes,
                "is_gzipped": c.is_gzipped,
                "sha256": c.sha256,
            }
            for c in decoding.files
        },
        "read_nbytes": decoding.read_nbytes,
        "write_nbytes": decoding.write_nbytes,
        "disk_free_nbytes": shutil.disk_usage(folder.output.parent).free,
        "hashes": str(hashes) if hashes else None,
        "expected": sorted(expected),
        "notes": list(decoding.notes),
    }


def _render_plan(out: Output, d: Mapping[str, Any]) -> None:
    out.record(
        {
            "plan": f"{d['out']} (dry run: nothing is written)",
            "recipe": described_step(d["recipe"][0]),
            "notes": "\n".join(d["notes"]) or None,
            "samples": f"pieces of all {len(d['files'])} files decode to what they should be",
            "hashes": f"{d['hashes']} is compared when it is written" if d["hashes"] else None,
            "reads": format_bytes(d["read_nbytes"]),
            "writes": f"{format_bytes(d['write_nbytes'])} in {len(d['files'])} files",
            "disk": f"{format_bytes(d['write_nbytes'])} needed, {format_bytes(d['disk_free_nbytes'])} free",
        }
    )
    out.line()
    out.table(
        ["file", "size", "with"],
        [
            (name, "packed" if f["is_gzipped"] else format_bytes(f["nbytes"]), f["with"] or "(copied)")
            for name, f in d["files"].items()
        ],
        right=["size"],
    )
