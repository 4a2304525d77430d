"""What `--with FILE` brings: the tokens of another tokenizer, or a list of words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmkit.checkpoint.file_content import FileContent
from llmkit.errors import InputError, listing
from llmkit.formats.paths import expanded
from llmkit.formats.text_file import decoded
from llmkit.formats.tokenizer_files import FileKind, names_of
from llmkit.formats.unreadable import no_file
from llmkit.tokenization.bundle import read_tokenizer, tokenizer_contents
from llmkit.tokenization.byte_level import from_bytes, text_of, to_bytes
from llmkit.tokenization.fast import FastTokenizer
from llmkit.tokenization.sentencepiece_model import SPACE, PieceKind, SentencePieceModel
from llmkit.tokenization.tiktoken_ranks import looks_like_ranks

_NAMES = names_of(FileKind.FAST, FileKind.SENTENCEPIECE_OR_RANKS, FileKind.SENTENCEPIECE, FileKind.RANKS)


@dataclass(frozen=True, slots=True)
class Entry:
    """One token of a source, in its own spelling.

    Attributes:
        token: text with ▁ for spaces, byte characters, or plain text, by the source's kind.
        score: of a SentencePiece piece.
    """

    token: str
    score: float = 0.0


@dataclass(frozen=True)
class Source:
    """The tokens of one file, most important first.

    Attributes:
        kind: `sentencepiece`, `byte_level` or `words`.
        model_type: of a SentencePiece model: unigram or bpe.
        added: its tokens that are matched as a whole: `content`, how it is matched, and whether it is special.
    """

    label: str
    kind: str
    entries: tuple[Entry, ...]
    model_type: str = ""
    added: tuple[Mapping[str, Any], ...] = ()

    def spelled_for(self, kind: str) -> tuple[list[Entry], int]:
        """The tokens as a vocabulary of `kind` spells them, and how many have no spelling there (half characters)."""
        if self.kind == kind or (kind == "unigram" and self.kind == "sentencepiece"):
            return list(self.entries), 0
        spelled, n_lost = [], 0
        for entry in self.entries:
            text = self._text(entry.token)
            if text is None or not text:
                n_lost += 1
            elif kind == "byte_level":
                spelled.append(Entry(from_bytes(text.encode()), entry.score))
            else:
                spelled.append(Entry(text.replace(" ", SPACE), entry.score))
        return spelled, n_lost

    def _text(self, token: str) -> str | None:
        if self.kind == "sentencepiece":
            return token.replace(SPACE, " ")
        if self.kind == "words":
            return token
        return text_of(to_bytes(token))


def read_source(path: Path) -> Source:
    """Read a tokenizer file, or the tokenizer of a folder, or a text file with one token a line.

    Raises:
        InputError: nothing there, or a kind that brings no tokens.
    """
    path = expanded(path)
    if not path.exists():
        raise InputError(no_file(path), hint="give sp.model, tokenizer.json, a tiktoken file or a word list")
    if path.is_file() and path.suffix in (".txt", ".list", ".tsv"):
        data = FileContent(path=path).read()
        if not looks_like_ranks(data):
            return _from_words(data, path)
    files = tokenizer_contents(path)
    tokenizer = read_tokenizer(str(path), files)
    label = path.name if path.is_file() else tokenizer.sp_name or tokenizer.ranks_name or "tokenizer.json"
    added = tuple(t for _, t in sorted(tokenizer.added.items()))
    if tokenizer.ranks is not None and tokenizer.sp is None:
        ordered = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
        return Source(label, "byte_level", tuple(Entry(from_bytes(t)) for t in ordered if len(t) > 1), added=added)
    if tokenizer.sp is not None:
        pieces = tokenizer.sp.ids
        beside = tuple(token for token in added if token["content"] not in pieces)
        return replace(_from_sentencepiece(tokenizer.sp, label), added=beside)
    if tokenizer.fast is None:
        raise InputError(
            f"{path} holds no tokenizer: expected one of {listing(_NAMES, len(_NAMES))}",
            hint="give a folder with one of them, or a text file with one token a line",
        )
    return replace(_from_fast(tokenizer.fast, path if path.is_file() else path / label), added=added)


def _from_sentencepiece(model: SentencePieceModel, label: str) -> Source:
    left_out = (PieceKind.UNKNOWN, PieceKind.BYTE, PieceKind.UNUSED)
    entries = tuple(Entry(p.text, p.score) for p in model.pieces if p.kind not in left_out)
    return Source(label, "sentencepiece", entries, model.model_type)


def _from_fast(fast: FastTokenizer, path: Path) -> Source:
    added = {t["content"] for t in fast.added}
    tokens = [t for t, _ in sorted(fast.vocab.items(), key=lambda item: item[1]) if t not in added]
    if fast.kind == "byte_level":
        # In the order of the merges: what is merged early is frequent, and longer tokens are built of it.
        merged = dict.fromkeys(a + b for a, b in fast.merges)
        order = [*merged, *(t for t in tokens if t not in merged and len(t) > 1)]
        return Source(path.name, "byte_level", tuple(Entry(t) for t in order if t in fast.vocab))
    if fast.kind in ("sentencepiece", "unigram"):
        vocab = fast.data["model"]["vocab"]
        scores = dict(vocab) if isinstance(vocab, list) else {}
        is_byte = {f"<0x{b:02X}>" for b in range(256)}
        entries = tuple(Entry(t, float(scores.get(t, 0.0))) for t in tokens if t not in is_byte)
        return Source(path.name, "sentencepiece", entries, "unigram" if scores else "bpe")
    raise InputError(
        f"{path} holds a {fast.kind} tokenizer; tokens are taken from BPE and Unigram ones",
        hint="write the tokens into a text file, one a line, and give that",
    )


def _from_words(data: bytes, path: Path) -> Source:
    lines = decoded(data, str(path)).splitlines()
    words = list(dict.fromkeys(line for line in lines if line.strip()))
    if not words:
        raise InputError(f"{path} has no tokens: expected one a line")
    return Source(path.name, "words", tuple(Entry(w) for w in words))
