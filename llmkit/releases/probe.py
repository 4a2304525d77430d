"""Does it decode to what it should? Told from small pieces of each file, before hours of work.

A wrong base or key turns every byte into noise, so the first bytes of a weight file and the directory at its end are
enough to tell; text files are decoded whole. What differs in a few weights only is found when the whole is written.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import InputError, LlmkitError, listing
from llmkit.formats import safetensors
from llmkit.formats.folder import INDEX_NAMES
from llmkit.formats.json_text import MAX_NBYTES, parse_json, parse_object
from llmkit.releases.streams import Coded, SeekableCoded, ZeroPadded, combined
from llmkit.releases.zip_sums import BROKEN_ZIP, Entry, read_directory
from llmkit.tokenization.sentencepiece_model import SentencePieceModel

# ggml, ggmf, ggjt and GGUF: what was released for llama.cpp under the name .bin.
GGML_HEADS = (b"lmgg", b"fmgg", b"tjgg", b"GGUF")
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_SMALL_NBYTES = 2**20


@dataclass(frozen=True)
class Problem:
    """Evidence that a file was decoded wrongly; `hint` says what to do, if that is known."""

    message: str
    hint: str | None = None


def probe(coded: Coded, *, culprit: str) -> tuple[Problem | None, list[Entry]]:
    """Evidence that a file was decoded wrongly (None without any), and the entries of a torch file.

    Args:
        culprit: what is wrong when a file decodes to noise: `the base is not …`.
    """
    if coded.sha256 is not None and (coded.nbytes or 0) <= _SMALL_NBYTES:
        if hashlib.sha256(coded.sample(0, _SMALL_NBYTES)).hexdigest() != coded.sha256:
            message = f"{coded.label} does not decode to what its sha256 says: {culprit}, or the file is damaged"
            return Problem(message), []
        return None, []
    suffix = Path(coded.name).suffix
    if suffix == ".json":
        return _json_problem(coded, culprit), []
    if suffix in _TORCH_SUFFIXES:
        return _torch_problem(coded, culprit)
    if suffix == ".safetensors":
        return _safetensors_problem(coded, culprit), []
    if coded.name == "tokenizer.model":
        try:
            SentencePieceModel.parse(coded.sample(0, MAX_NBYTES), coded.name)
        except LlmkitError:
            return Problem(f"{coded.label} decodes to no SentencePiece model: {culprit}"), []
    return None, []


def _json_problem(coded: Coded, culprit: str) -> Problem | None:
    text = coded.sample(0, MAX_NBYTES)
    if is_json(text):
        return None
    if coded.pad is None:
        message = f"{coded.label} is not valid JSON, and it is taken as it is: it was damaged on its way"
        return Problem(message, "download it again")
    if isinstance(coded.pad, ZeroPadded) and (cause := _line_ends(coded, coded.pad)):
        return cause
    return Problem(f"{coded.label} decodes to no JSON: {culprit}")


def _line_ends(coded: Coded, pad: ZeroPadded) -> Problem | None:
    """Windows line ends in one of the two: said only when undoing them gives JSON."""
    payload = coded.sample_payload(0, MAX_NBYTES)
    base = pad.source.head(MAX_NBYTES)
    payload_lf, base_lf = payload.replace(b"\r\n", b"\n"), base.replace(b"\r\n", b"\n")
    if payload_lf != payload and is_json(_decoded(payload_lf, base)):
        return Problem(
            f"{coded.label} was damaged by git on Windows, which made its line ends CRLF "
            f"({len(payload)} bytes, {len(payload_lf)} before)",
            "git config --global core.autocrlf false, then clone the payload again",
        )
    if base_lf != base and is_json(_decoded(payload, base_lf)):
        return Problem(
            f"{pad.source.path} has Windows line ends (CRLF); the release was made from a file with LF",
            f"sed -i 's/\\r$//' {pad.source.path}",
        )
    if base_lf != base and payload_lf != payload and is_json(_decoded(payload_lf, base_lf)):
        return Problem(
            f"{coded.label} and {pad.source.path} have Windows line ends (CRLF); the release was made with LF",
            "git config --global core.autocrlf false, clone again, and take \\r out of the base's text files",
        )
    return None


def _decoded(payload: bytes, base: bytes) -> bytes:
    return combined(payload, base[: len(payload)].ljust(len(payload), b"\0"))


def is_json(text: bytes) -> bool:
    """Whether the text is JSON, within the limits of `parse_json`."""
    try:
        parse_json(text, "a decoded file")
    except InputError:
        return False
    return True


def _torch_problem(coded: Coded, culprit: str) -> tuple[Problem | None, list[Entry]]:
    head = coded.sample(0, 64)
    if head[:1] == b"\x80" or (coded.sha256 is not None and head[:4] in GGML_HEADS):
        return None, []
    if head[:4] != b"PK\x03\x04":
        return Problem(f"{coded.label} decodes to no torch file (first bytes {head[:8].hex(' ')}): {culprit}"), []
    if coded.is_gzipped:
        return None, []
    try:
        return None, read_directory(io.BufferedReader(SeekableCoded(coded), 2**16))
    except BROKEN_ZIP:
        message = (
            f"{coded.label} begins as a torch file and does not end as one: it is truncated "
            f"({coded.payload.nbytes} bytes), or {culprit}"
        )
        return Problem(message), []


def _safetensors_problem(coded: Coded, culprit: str) -> Problem | None:
    head = coded.sample(0, 9)
    n = int.from_bytes(head[:8], "little")
    header = coded.sample(8, n) if safetensors.looks_like(head) else b""
    try:
        entries = [v for k, v in parse_object(header, coded.label).items() if k != "__metadata__"]
        end = 8 + n + max((int(e["data_offsets"][1]) for e in entries), default=0)
    except (InputError, KeyError, TypeError, ValueError):
        return Problem(f"{coded.label} decodes to no safetensors file: {culprit}")
    if coded.nbytes is not None and end != coded.nbytes:
        return Problem(f"{coded.label} is truncated: it decodes to {coded.nbytes} bytes, its header promises {end}")
    return None


def check_index(files: Iterable[Coded]) -> None:
    """Refuse a release whose index of shards names files that it does not hold.

    Raises:
        InputError: some are missing.
    """
    by_name = {c.name: c for c in files}
    for index in INDEX_NAMES:
        if index not in by_name:
            continue
        try:
            wanted = dict.fromkeys(parse_object(by_name[index].sample(0, MAX_NBYTES), index)["weight_map"].values())
        except (InputError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{by_name[index].label} decodes to an index without a usable weight_map") from error
        missing = [str(name) for name in wanted if name not in by_name]
        if missing:
            raise InputError(
                f"{by_name[index].payload.path.parent}: {len(missing)} of the {len(wanted)} weight files that "
                f"{index} names are missing: {listing(missing)}",
                hint="download the missing files",
            )
