"""Tokenizers that were published with code of their own, as data: which file, which special tokens, where they go.

A folder whose tokenizer is a class of remote code still holds the vocabulary in a file of a known format. What the
code adds to it (ids of special tokens, the tokens around a text, spellings of blanks) is told by a kind of this module,
so that the file is read and the code is never run. Each is an entry of the group `llmkit.tokenizers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from llmkit.entry_points import loaded

GROUP = "llmkit.tokenizers"


@dataclass(frozen=True, slots=True)
class Blanks:
    """Line ends, tabs and runs of spaces that the text spells as pieces of their own.

    Attributes:
        newline, tab: the pieces.
        run: the piece of a run of spaces, with `{n}`.
        longest: the longest run that has a piece; the shortest is 2.
    """

    newline: str
    tab: str
    run: str
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """What the kinds have in common.

    Attributes:
        file: the file that holds the vocabulary.
        classes: the remote classes, by the names that tokenizer_config.json gives them.
        specials: tokens that the code adds after the file's last id, in this order.
        prefix, suffix: special tokens around every text.
        bos, eos, pad, unk: their strings, where tokenizer_config.json does not say; None for none.
    """

    file: str
    classes: tuple[str, ...] = ()
    specials: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceFile(PublishedFile):
    """A SentencePiece model.

    Attributes:
        reserved: pieces of the file that are special tokens: they are never looked for in text.
        appended: pieces that follow the reserved ones in a file, with byte fallback; the code appended all of them to
            files that have no reserved ones.
        blanks: how line ends and blanks are spelt; None leaves them as they are.
        offset_key: the key of tokenizer_config.json with the id of the model's first piece.
        id_keys: keys of config.json with the id of a special token, which tell the offset where nothing else does.
        adds_bos, adds_eos: whether they are put around a text where tokenizer_config.json does not say; None for a
            tokenizer that knows no such keys.
    """

    reserved: tuple[str, ...] = ()
    appended: tuple[str, ...] = ()
    blanks: Blanks | None = None
    offset_key: str | None = None
    id_keys: Mapping[str, str] | None = None
    adds_bos: bool | None = None
    adds_eos: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TiktokenFile(PublishedFile):
    """Byte-pair ranks in base64, one a line, and the pattern that cuts a text into words.

    Attributes:
        is_composed: a text is brought to Unicode's composed form (NFC) first.
    """

    pattern: str
    is_composed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteTrieFile(PublishedFile):
    """Byte strings, one a line as `id literal length`; a text becomes the longest that fits, from left to right.

    Attributes:
        end: the string of id 0, which the file leaves out.
    """

    end: str


TokenizerKind = SentencePieceFile | TiktokenFile | ByteTrieFile


def published_tokenizers() -> Mapping[str, TokenizerKind]:
    """All kinds that are registered, by name."""
    return cast("Mapping[str, TokenizerKind]", loaded(GROUP, PublishedFile))
