"""A vocabulary of byte strings as GGUF has it: each token a text in which what is no plain character is escaped.

Sources: ggml-org/llama.cpp, conversion/base.py (`_set_vocab_rwkv_world`), src/llama-vocab.cpp
(`llama_unescape_rwkv_token`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmkit.errors import InputError
from llmkit.tokenization.byte_level import text_of
from llmkit.tokenization.byte_trie import ByteTrie
from llmkit.tokenization.sentencepiece_model import PieceKind

_ESCAPE = re.compile(rb"\\(?:x([0-9a-f]{2})|(.))", re.DOTALL)
_LETTERS = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def escaped(token: bytes) -> str:
    r"""The text of a token, as Python writes bytes: printable ASCII as it is, `\t`, `\n`, `\r`, `\\`, `\xe4`."""
    return repr(token)[2:-1]


def unescaped(text: str) -> bytes:
    """The bytes of such a text, as llama.cpp reads them: other characters are their UTF-8."""

    def plain(match: re.Match[bytes]) -> bytes:
        return bytes([int(match[1], 16)]) if match[1] else _LETTERS.get(match[2], match[2])

    return _ESCAPE.sub(plain, text.encode("utf-8", "surrogatepass"))


def trie_of(tokens: Sequence[str], types: Sequence[int]) -> ByteTrie:
    """The vocabulary of a file, without what stands for no text.

    Raises:
        InputError: a byte has no token.
    """
    trie = ByteTrie({i: unescaped(t) for i, t in enumerate(tokens) if types[i] == PieceKind.NORMAL})
    missing = next((b for b in range(256) if bytes([b]) not in trie.ids), None)
    if missing is not None:
        raise InputError(f"tokenizer.ggml.tokens has no token for the byte {missing:#04x}")
    return trie


def vocabulary_file(tokens: Mapping[int, bytes]) -> bytes:
    """The file that `ByteTrie.parse` reads: text as a literal of text, what is none as one of bytes."""
    literals = ((i, text_of(token), token) for i, token in sorted(tokens.items()))
    return "".join(f"{i} {token if text is None else text!r} {len(token)}\n" for i, text, token in literals).encode()
