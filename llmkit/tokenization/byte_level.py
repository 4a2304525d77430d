"""GPT-2's spelling of bytes as printable characters, which byte-level tokenizers use in their vocabularies."""

from __future__ import annotations

from functools import cache


@cache
def _characters() -> tuple[str, ...]:
    """Byte -> character: printable Latin-1 stands for itself, the others follow from U+0100 (Radford et al., 2019)."""
    kept = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [b for b in range(256) if b not in kept]
    return tuple(chr(b) if b in kept else chr(256 + others.index(b)) for b in range(256))


@cache
def _bytes() -> dict[str, int]:
    return {c: b for b, c in enumerate(_characters())}


def from_bytes(data: bytes) -> str:
    """The spelling of some bytes."""
    table = _characters()
    return "".join(table[b] for b in data)


def text_of(data: bytes | None) -> str | None:
    """The text of some bytes; None where there are none, or they are no whole characters of UTF-8."""
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError:
        return None


def to_bytes(token: str) -> bytes | None:
    """The bytes that a vocabulary entry spells; None when it is no such spelling (an added token)."""
    table = _bytes()
    try:
        return bytes(table[c] for c in token)
    except KeyError:
        return None
