"""XOR releases (Pygmalion, Metharme, OpenAssistant): each file is the exclusive or with the base's file of that name.

The base's file is taken with zeros behind its end, or cut, to the length of the coded one. `added_tokens.json` is
copied, unless it was coded with one that the base has of its own. Files may be gzipped. The base must have the exact
bytes of the one the release was made from: the same conversion by the same versions, its zip containers included.
Nothing in the release says whether it has: another base of the same layout gives another model, whole in all its parts.
Statistics tell an unrelated base (`kinship.py`); one that was tuned or rounded is told only by the hashes that the
model card lists.

Source: xor_codec.py as Open-Assistant and Pygmalion published it, in our own words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.manifest import MANIFEST_NAME
from llmkit.errors import InputError, LlmkitError, RequirementError, listing
from llmkit.formats.folder import is_weight_file
from llmkit.formats.json_text import MAX_NBYTES
from llmkit.formats.unreadable import refuse_pointer
from llmkit.releases.decoding import Decoding
from llmkit.releases.kind import ENCRYPTED, GZIP, XORED, command_for, release_kind
from llmkit.releases.kinship import FEW, HALF, measure_kinship
from llmkit.releases.probe import is_json
from llmkit.releases.streams import Coded, ZeroPadded
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import format_bytes
from llmkit.transforms.delta.base_check import BF16_ROUNDED, bf16_share

_VERBATIM = ("added_tokens.json",)
_CONVERT = "convert the base with the versions that the model card names, and compare its hashes with --hashes FILE"


def plan_xor(base: Path, payload: Path) -> Decoding:
    """Pair the files of `payload` with those of `base`. Reads a few bytes of each.

    Raises:
        InputError: no folder, no files, a git-lfs pointer, or files that the base lacks.
        RequirementError: the two are swapped, or the payload is none.
    """
    for path, what in ((base, "the base"), (payload, "the payload")):
        if not path.is_dir():
            is_there = "is no folder" if path.exists() else "does not exist"
            raise InputError(
                f"{path} {is_there}; {what} of an XOR release is a folder of files that are paired by name",
                hint="llmkit delta xor BASE PAYLOAD -o OUT, with two folders",
            )
    _check_roles(base, payload)
    names = sorted(p.name for p in payload.iterdir() if p.is_file() and not p.name.startswith("."))
    names = [n for n in names if n != MANIFEST_NAME]
    if not any(is_weight_file(n) for n in names):
        inner = sorted(p for p in payload.iterdir() if p.is_dir() and release_kind(p) == XORED)
        if inner or not names:
            raise InputError(
                f"{payload} holds no XOR payload of weights",
                hint=f"give its folder {inner[0]}" if inner else "give the folder with the coded weight files",
            )
    files, missing, notes = [], [], []
    for name in names:
        source = SourceFile(payload / name)
        head = source.head(32)
        refuse_pointer(source.path, head)
        if name in _VERBATIM and not ((base / name).is_file() and not is_json(source.head(MAX_NBYTES))):
            files.append(Coded(name, source))
        elif (base / name).is_file():
            pad = ZeroPadded(SourceFile(base / name))
            files.append(Coded(name, source, pad=pad, is_gzipped=head[:3] == GZIP))
            notes += _length_note(files[-1], pad)
        elif _is_document(source):
            files.append(Coded(name, source))
            notes.append(f"{name} is copied: it is plain text, and the base has none")
        else:
            missing.append(name)
    if missing:
        raise InputError(
            f"{base} lacks {len(missing)} of the {len(names)} files that the payload needs: {listing(missing)}",
            hint=_missing_hint(base, missing),
        )
    return Decoding(
        step={"transform": "delta.xor", "base": base.resolve().name, "payload": payload.resolve().name},
        files=tuple(files),
        culprit=f"{base} is not the base that it was made from",
        hint=_CONVERT,
        notes=tuple(notes),
        doubts=lambda: _doubts(base),
        judge=lambda folder: _kin(base, folder),
    )


def _doubts(base: Path) -> Iterator[str]:
    with contextlib.suppress(LlmkitError):  # a base that cannot be opened is no reason to refuse a codec of bytes
        share = bf16_share(open_checkpoint(base))
        if share is not None and share > BF16_ROUNDED:
            yield (
                f"{base} was rounded to bfloat16 and stored as float16 ({share:.1%} of its weights have three zero low "
                "bits, usually 13 %): XOR releases were made from unrounded bases, the low bits will be wrong"
            )
    yield (
        f"nothing in an XOR release tells a tuned or rounded copy of the base from {base}: compare hashes of the base "
        "(--hashes FILE) or of the result (--expect FILE) that the model card lists"
    )


def _kin(base: Path, decoded: Path) -> list[str]:
    try:
        kinship = measure_kinship(open_checkpoint(decoded), open_checkpoint(base))
    except LlmkitError:  # files for another program
        return []
    figure = (
        f"of {kinship.n_crossing} sampled weights whose exponent is not the base's, {kinship.close:.0%} are close to "
        "it (42 % or more for the right base, 10 to 18 % for an unrelated one)"
    )
    if kinship.is_telling and kinship.close < FEW:
        raise InputError(f"{base} is not the base that the release was made from: {figure}", hint=_CONVERT)
    if kinship.is_telling and kinship.close < HALF:
        return [f"{base} is probably not the base that the release was made from: {figure}"]
    return []


def _check_roles(base: Path, payload: Path) -> None:
    kinds = release_kind(base), release_kind(payload)
    if kinds[1] == ENCRYPTED:
        raise RequirementError(
            f"{payload} is an encrypted release, not an XOR payload",
            hint=command_for(ENCRYPTED, str(base), str(payload)),
        )
    if kinds[0] == XORED and kinds[1] is None:
        raise RequirementError(
            f"{base} is an XOR payload and {payload} a plain model: the base comes first",
            hint=command_for(XORED, str(payload), str(base)),
        )
    if kinds[0] is not None:
        raise RequirementError(f"{base} is a coded release itself; the base is a plain model folder")
    if kinds[1] is None and any(p.is_file() and is_weight_file(p.name) for p in payload.iterdir()):
        raise RequirementError(
            f"{payload} is no XOR payload: its weight files can be read as they are",
            hint=f"llmkit delta apply {base} {payload} -o OUT, if it is a delta",
        )


def _length_note(coded: Coded, pad: ZeroPadded) -> list[str]:
    have, need = pad.source.nbytes, coded.nbytes
    if need is None or have == need or not is_weight_file(coded.name):
        return []
    how = f"cut by {format_bytes(have - need)}" if have > need else f"continued by {format_bytes(need - have)} of zeros"
    return [f"{coded.name}: the base's file is {how}, to the length of the payload's"]


def _is_document(source: SourceFile) -> bool:
    if source.path.suffix.lower() != ".md" and source.path.stem.upper() not in ("LICENSE", "NOTICE"):
        return False
    data = source.head(2**20)
    try:
        return b"\0" not in data and bool(data.decode("utf-8")) and source.nbytes <= 2**20
    except UnicodeDecodeError:
        return False


def _missing_hint(base: Path, missing: list[str]) -> str:
    weights = sorted(p.name for p in base.iterdir() if p.is_file() and is_weight_file(p.name))
    if weights and any(is_weight_file(n) for n in missing):
        return (
            f"the base has {listing(weights, 3)}: convert it again with the transformers version that the model card "
            "names, into the same files"
        )
    return "copy them from the conversion that the model card describes"
