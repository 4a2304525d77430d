"""Vocabularies of byte strings, matched greedily: the longest token that fits, from left to right.

The file has a line for each token: its id, a Python literal of its text or bytes, and its length in bytes.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import cached_property

from llmkit.errors import InputError
from llmkit.tokenization.byte_level import text_of
from llmkit.tokenization.checked import is_id


class ByteTrie:
    """Encodes and decodes with such a vocabulary.

    Args:
        tokens: id -> bytes; every single byte must be among them.
    """

    def __init__(self, tokens: Mapping[int, bytes]) -> None:
        self.tokens = dict(tokens)
        self.ids = {data: i for i, data in self.tokens.items()}

    @classmethod
    def parse(cls, data: bytes, where: str) -> ByteTrie:
        """Read a vocabulary file; `where` names it in errors.

        Raises:
            InputError: a line is malformed, or a byte has no token.
        """
        tokens: dict[int, bytes] = {}
        for number, line in enumerate(data.splitlines(), 1):
            if not line.strip():
                continue
            try:
                first, rest = line.decode().split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                value = ast.literal_eval(literal.strip())
                token = value.encode() if isinstance(value, str) else value
                if not isinstance(token, bytes) or len(token) != int(length) or not is_id(int(first)):
                    raise ValueError(length)
                tokens[int(first)] = token
            except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
                raise InputError(
                    f"{where}, line {number}: expected an id, a literal and its length in bytes, found {line[:40]!r}"
                ) from error
        trie = cls(tokens)
        missing = [b for b in range(256) if bytes([b]) not in trie.ids]
        if missing:
            raise InputError(f"{where}: no token for the byte {missing[0]:#04x} (is the file truncated?)")
        return trie

    @property
    def n_tokens(self) -> int:
        """Largest id + 1."""
        return max(self.tokens) + 1

    @cached_property
    def _lengths(self) -> Mapping[bytes, Sequence[int]]:
        """First two bytes -> the lengths of tokens that begin with them, longest first."""
        lengths_of: dict[bytes, set[int]] = {}
        for token in self.ids:
            if len(token) > 1:
                lengths_of.setdefault(token[:2], set()).add(len(token))
        return {start: sorted(lengths, reverse=True) for start, lengths in lengths_of.items()}

    def encode(self, text: str) -> list[int]:
        """The ids of a text (of its UTF-8 bytes)."""
        data = text.encode("utf-8", "surrogatepass")
        ids, lengths, out = self.ids, self._lengths, []
        i = 0
        while i < len(data):
            for n in lengths.get(data[i : i + 2], ()):
                token = ids.get(data[i : i + n])
                if token is not None and i + n <= len(data):
                    break
            else:
                n, token = 1, ids[data[i : i + 1]]
            out.append(token)
            i += n
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; ids without a token are left out, bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.tokens.get(i, b"") for i in ids).decode("utf-8", "replace")

    def piece(self, i: int) -> str:
        """A token as people can read it: its text, or the literal of its bytes."""
        token = self.tokens.get(i, b"")
        text = text_of(token)
        return repr(token) if text is None else text

    def find(self, piece: str) -> int | None:
        """The id of a token by its text."""
        return self.ids.get(piece.encode("utf-8", "surrogatepass"))
