"""A release that is to be decoded: what is known before, the checks that come first, and the checks at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, LlmkitError
from llmkit.formats.folder import INDEX_NAMES, is_weight_file, read_file, read_folder
from llmkit.formats.unreadable import read_head
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.releases.hash_list import Expected, compare_files
from llmkit.releases.probe import GGML_HEADS, check_index, probe
from llmkit.releases.streams import Coded
from llmkit.releases.zip_sums import Entry
from llmkit.tensors.source import SourceFile


@dataclass(frozen=True)
class Decoding:
    """The files of a release, each with what decodes it.

    Attributes:
        step: the entry of the recipe.
        culprit: what is wrong when a file decodes to noise.
        hint: what to do then.
        explain: finds out more about what is wrong, by reading the whole key.
        notes: what was decided and the user should see.
        judge: looks at the decoded folder; raises where it is certainly wrong, gives warnings.
        doubts: what stays open where no hashes are given, and what speaks against the base without being certain.
    """

    step: Mapping[str, Any]
    files: tuple[Coded, ...]
    culprit: str
    hint: str
    explain: Callable[[Progress], str] | None = None
    notes: tuple[str, ...] = ()
    doubts: Callable[[], Iterable[str]] = tuple
    judge: Callable[[Path], Iterable[str]] = lambda _folder: ()

    @property
    def is_keyed(self) -> bool:
        """One file decodes all."""
        return self.explain is not None

    @property
    def write_nbytes(self) -> int:
        """Bytes to write; of a compressed file the size of the base's, its best estimate."""
        return sum(
            c.nbytes if c.nbytes is not None else c.pad.source.nbytes if c.pad else c.payload.nbytes for c in self.files
        )

    @property
    def read_nbytes(self) -> int:
        """Bytes to read: as much of the payload and of what it is combined with."""
        return sum(c.payload.nbytes for c in self.files) + sum(
            min(c.pad.source.nbytes, c.nbytes or c.pad.source.nbytes) for c in self.files if c.pad
        )

    @property
    def need_nbytes(self) -> int:
        """Bytes that the disk must have free."""
        return self.write_nbytes + 2**20

    @property
    def sources(self) -> list[SourceFile]:
        """Every file that is read."""
        return [s for c in self.files for s in (c.payload, c.pad.source if c.pad else None) if s is not None]

    @property
    def inputs(self) -> dict[str, int]:
        """Path -> bytes of every file that is read."""
        return {str(s.path): s.nbytes for s in self.sources}

    @cached_property
    def digest(self) -> str:
        """Identifies the run: files, sizes and times of the inputs, and how they are combined."""
        body = [
            [c.name, c.payload.fingerprint(), c.start, c.is_gzipped, c.sha256]
            + ([type(c.pad).__name__, c.pad.source.fingerprint()] if c.pad else [])
            for c in self.files
        ]
        return hashlib.sha256(json.dumps([dict(self.step), body], sort_keys=True).encode()).hexdigest()

    def failure(self, message: str, progress: Progress = NO_PROGRESS, hint: str | None = None) -> InputError:
        """The error that says so, with the best hint there is."""
        return InputError(message, hint=hint or (self.hint if self.explain is None else self.explain(progress)))


def check_pads(
    decoding: Decoding,
    stated: Mapping[str, Expected],
    where: Path,
    *,
    workers: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> list[str]:
    """Compare base or key with a list of hashes; the names that the list leaves out come back.

    Raises:
        RequirementError: a file has another hash.
        InputError: the list names none of them.
    """
    files = {c.pad.source.path.name: c.pad.source.path for c in decoding.files if c.pad is not None}
    return compare_files(
        files,
        stated,
        where=where,
        what="the file that the release was made with",
        hint=decoding.hint,
        workers=workers,
        progress=progress,
    )


def check_samples(decoding: Decoding, progress: Progress = NO_PROGRESS) -> dict[str, list[Entry]]:
    """Decode a few pieces of each file and see whether they make sense.

    Returns:
        The entries of the torch files, for their check sums.

    Raises:
        InputError: they do not, or weight files that the index names are missing.
    """
    problems, sums = [], {}
    for coded in decoding.files:
        problem, sums[coded.name] = probe(coded, culprit=decoding.culprit)
        if problem is not None:
            problems.append(problem)
    if problems:
        rest = f" (and {len(problems) - 1} more of {len(decoding.files)} files)" if len(problems) > 1 else ""
        raise decoding.failure(problems[0].message + rest, progress, problems[0].hint)
    check_index(decoding.files)
    return sums


def check_whole(decoding: Decoding, folder: Path) -> None:
    """Open what was decoded: headers, and an index that agrees with them.

    Raises:
        InputError: they do not fit together.
    """
    names = [c.name for c in decoding.files]
    try:
        if any(n in INDEX_NAMES for n in names):
            read_folder(folder)
            return
        for name in names:
            if is_weight_file(name) and read_head(folder / name, 4) not in GGML_HEADS:
                read_file(folder / name)
    except LlmkitError as error:
        raise decoding.failure(
            f"what was decoded is no model: {error.message.replace(str(folder) + '/', '')}"
        ) from error
