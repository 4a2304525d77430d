"""Lists of hashes as `md5sum`, `sha256sum`, BSD's `md5` and rhash print them, and files compared with one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import InputError, RequirementError
from llmkit.formats.text_file import read_text
from llmkit.pipeline.hashing import hash_files
from llmkit.pipeline.progress import NO_PROGRESS, Progress

_BY_LENGTH = {32: "md5", 40: "sha1", 64: "sha256"}
_GNU = re.compile(r"\\?([0-9A-Fa-f]{32,64})\s+\*?(\S.*?)\s*")
_BSD = re.compile(r"(?:MD5|SHA1|SHA256)\s*\((.+)\)\s*=\s*([0-9A-Fa-f]{32,64})\s*", re.IGNORECASE)
_MAX_NBYTES = 10_000_000


@dataclass(frozen=True)
class Expected:
    """The hash that a list states for a file."""

    algorithm: str
    digest: str


def read_hash_list(path: Path) -> dict[str, Expected]:
    """File name (without folders) -> stated hash. Empty lines and lines that begin with # or ; are skipped.

    Raises:
        InputError: unreadable, a line of another form, or two hashes of one kind for one name.
    """
    lines = read_text(path, max_nbytes=_MAX_NBYTES).splitlines()
    hashes: dict[str, Expected] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text[0] in "#;":
            continue
        gnu, bsd = _GNU.fullmatch(text), _BSD.fullmatch(text)
        digest, name = (gnu[1], gnu[2]) if gnu else (bsd[2], bsd[1]) if bsd else ("", "")
        algorithm = _BY_LENGTH.get(len(digest))
        if algorithm is None:
            raise InputError(
                f"{path}:{number}: expected `HASH  FILE` as md5sum or sha256sum print it, found {text[:60]!r}"
            )
        name = re.split(r"[/\\]", name)[-1]
        stated = Expected(algorithm, digest.lower())
        if hashes.get(name, stated) != stated:
            raise InputError(
                f"{path}:{number}: states a second hash for {name}",
                hint="put the hashes of the base and of the result into two files: --hashes and --expect",
            )
        hashes[name] = stated
    if not hashes:
        raise InputError(f"{path} holds no hashes")
    return hashes


def compare_files(
    files: Mapping[str, Path],
    stated: Mapping[str, Expected],
    *,
    where: Path,
    what: str,
    hint: str,
    workers: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> list[str]:
    """Hash the files that a list names, and compare.

    Args:
        files: name in the list -> file.
        where: the list, for messages.
        what: what the files are, for messages: `the file that the release was made from`.

    Returns:
        Names of files that the list does not state.

    Raises:
        RequirementError: one has another hash.
        InputError: the list names none of them.
    """
    listed = {name: path for name, path in files.items() if name in stated}
    if not listed:
        raise InputError(f"{where} names none of the {len(files)} files to compare, such as {next(iter(files))}")
    different = []
    for algorithm in dict.fromkeys(stated[n].algorithm for n in listed):
        paths = {n: p for n, p in listed.items() if stated[n].algorithm == algorithm}
        digests = hash_files(paths.values(), algorithm, workers=workers, progress=progress)
        different += [(n, digests[p]) for n, p in paths.items() if digests[p] != stated[n].digest]
    if different:
        name, digest = different[0]
        rest = f" ({len(different)} of {len(listed)} files differ)" if len(listed) > 1 else ""
        raise RequirementError(
            f"{listed[name]} is not {what}: its {stated[name].algorithm} is {digest}, {where} says "
            f"{stated[name].digest}{rest}",
            hint=hint,
        )
    return [n for n in files if n not in stated]
