"""tiktoken files: one token a line, base64 of its bytes and its rank; merges are implied by the ranks."""

from __future__ import annotations

import base64
import binascii

from llmkit.errors import InputError
from llmkit.tokenization.checked import is_id


def looks_like_ranks(data: bytes) -> bool:
    """Whether the first line is base64 and a number (Llama 3 calls such a file tokenizer.model)."""
    first = data[:4096].split(b"\n", 1)[0].split()
    if len(first) != 2 or not first[1].isdigit():
        return False
    try:
        base64.b64decode(first[0], validate=True)
    except binascii.Error:
        return False
    return True


def parse_ranks(data: bytes, where: str) -> dict[bytes, int]:
    """Token -> rank, in the order of the file.

    Raises:
        InputError: a line is not base64 and a number.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            if not is_id(int(rank)):
                raise ValueError(rank)
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"{where}, line {number}: expected base64 and a rank, found {line[:40]!r}") from error
    return ranks


def serialize_ranks(ranks: dict[bytes, int]) -> bytes:
    """The file of some ranks."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
