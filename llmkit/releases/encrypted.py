"""Encrypted releases (BELLE, point-alpaca, TechGPT, lawyer-llama): `NAME.<sha256>.enc`, keyed with a file of LLaMA-7B.

An encrypted file is the SHA-256 of the plain one (32 bytes, also in its name) and then the data, combined with the
key as `llmkit.releases.streams.BlockwiseKey` says.

Source: LianjiaTech/BELLE models/decrypt.py and pointnetwork/point-alpaca encrypt.py, in our own words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llmkit.checkpoint.manifest import MANIFEST_NAME
from llmkit.errors import InputError, RequirementError, listing
from llmkit.formats.folder import is_weight_file
from llmkit.formats.unreadable import refuse_pointer
from llmkit.pipeline.hashing import hash_files
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.releases.decoding import Decoding
from llmkit.releases.kind import ENCRYPTED, XORED, command_for, release_kind
from llmkit.releases.published import KEY_FILE, KNOWN, PublishedFile, identify
from llmkit.releases.streams import BlockwiseKey, Coded
from llmkit.tensors.source import SourceFile

HEADER_NBYTES = 32
_NAME = re.compile(r"(.+?)(?:\.([0-9a-fA-F]{64}))?\.enc")


def plan_decrypt(key: Path, encrypted: Sequence[Path], *, table: Sequence[PublishedFile] = KNOWN) -> Decoding:
    """Read the headers of encrypted files; a folder stands for the `.enc` files in it.

    Args:
        table: published files, of which the first is the key of these releases; a wrong key is looked up there.

    Raises:
        InputError: a missing, truncated or renamed file, two for one output, or no key file.
        RequirementError: key and release are swapped, or the release is none.
    """
    paths, notes = _listed(key, encrypted)
    source = _key(key, paths)
    files: dict[str, Coded] = {}
    for path in paths:
        coded, more = _coded(path, BlockwiseKey(source))
        if coded.name in files:
            raise InputError(f"{files[coded.name].label} and {path} are both {coded.name}: leave one out")
        files[coded.name] = coded
        notes += more

    def explain(progress: Progress = NO_PROGRESS) -> str:
        sha256 = hash_files([source.path], "sha256", progress=progress)[source.path]
        return _explained(source.path, sha256, table)

    return Decoding(
        step={"transform": "delta.decrypt", "key": source.path.name, "files": len(files)},
        files=tuple(files.values()),
        culprit=f"{key} is not the key that it was encrypted with",
        hint=f"the key of these releases is {KEY_FILE.file} of {KEY_FILE.release} (sha256 {KEY_FILE.sha256})",
        explain=explain,
        notes=tuple(notes),
    )


def _listed(key: Path, encrypted: Sequence[Path]) -> tuple[list[Path], list[str]]:
    paths: list[Path] = []
    notes = []
    for path in encrypted:
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            if not any(p.suffix == ".enc" for p in files):
                if release_kind(path) == XORED:
                    raise RequirementError(
                        f"{path} is an XOR payload, not an encrypted release",
                        hint=command_for(XORED, "BASE", str(path)),
                    )
                is_model = any(is_weight_file(p.name) for p in files)
                raise InputError(
                    f"{path} holds no .enc files" + (", but weights that are not encrypted" if is_model else ""),
                    hint=f"llmkit delta apply BASE {path} -o OUT, if it is a delta"
                    if is_model
                    else "give the encrypted files, or the folder that holds them",
                )
            others = [p.name for p in files if p.suffix != ".enc"]
            if others:
                notes.append(f"{len(others)} other files of {path} are left alone: {listing(others, 3)}")
            paths += [p for p in files if p.suffix == ".enc"]
        elif not path.exists():
            raise InputError(
                f"{path}: no such file or folder", hint="give NAME.<sha256>.enc files, or the folder that holds them"
            )
        elif path.suffix != ".enc":
            swapped = key.suffix == ".enc" or (key.is_dir() and release_kind(key) == ENCRYPTED)
            raise RequirementError(
                f"{path} is no encrypted file (its name ends in {path.suffix or 'nothing'}, not .enc)"
                + (f", {key} is: the key comes first" if swapped else ""),
                hint=command_for(ENCRYPTED, str(path), str(key)) if swapped else "give NAME.<sha256>.enc files",
            )
        else:
            paths.append(path)
    return list(dict.fromkeys(paths)), notes


def _key(key: Path, encrypted: Sequence[Path]) -> SourceFile:
    if key.is_dir():
        shards = sorted(p for p in key.glob("*.pth") if p.is_file())
        raise InputError(
            f"{key} is a folder; the key is one file",
            hint=f"give {shards[0]}" if len(shards) == 1 else f"give {KEY_FILE.file} of {KEY_FILE.release}",
        )
    if not key.exists():
        raise InputError(f"{key}: no such file", hint=f"give {KEY_FILE.file} of {KEY_FILE.release}")
    if key.suffix == ".enc" or key in encrypted:
        raise RequirementError(f"{key} is an encrypted file, not the key: the key comes first")
    source = SourceFile(key)
    if not source.nbytes:
        raise InputError(f"{key} is empty; it cannot be a key")
    refuse_pointer(key, source.head(32))
    return source


def _coded(path: Path, pad: BlockwiseKey) -> tuple[Coded, list[str]]:
    named = _NAME.fullmatch(path.name)
    if named is None or named[1] in (".", "..", MANIFEST_NAME):
        raise InputError(f"{path}: its name is not of the form NAME.<sha256>.enc")
    payload = SourceFile(path)
    head = payload.head(HEADER_NBYTES)
    refuse_pointer(path, head)
    if len(head) < HEADER_NBYTES:
        raise InputError(
            f"{path} is truncated: {payload.nbytes} bytes, its header alone has {HEADER_NBYTES}",
            hint="download it again",
        )
    if named[2] is not None and named[2].lower() != head.hex():
        raise InputError(
            f"{path} is damaged or renamed: its header says sha256 {head.hex()[:16]}…, its name {named[2][:16]}…",
            hint="download it again",
        )
    notes = [] if named[2] else [f"{path.name} has no sha256 in its name: only that of its header is compared"]
    return Coded(named[1], payload, HEADER_NBYTES, pad, head.hex()), notes


def _explained(key: Path, sha256: str, table: Sequence[PublishedFile]) -> str:
    """What the key is, once it has failed."""
    release, right = identify(sha256, table), table[0]
    if release is right:
        return f"{key} is the right key ({right.file} of {right.release}): download the encrypted file again"
    wanted = f"{right.file} of {right.release} (sha256 {right.sha256})"
    if release is not None and not release.is_partial:
        return f"{key} is {release.file} of {release.release}; the key of these releases is {wanted}"
    return f"{key} has sha256 {sha256}; the key of these releases is {wanted}"
