"""Text to ids and back by one published file, without special tokens: a SentencePiece model, or tiktoken ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

from llmkit.architecture.tokenizers import Blanks, SentencePieceFile, TiktokenFile
from llmkit.errors import InputError
from llmkit.tokenization.byte_level import from_bytes, to_bytes
from llmkit.tokenization.sentencepiece_model import Piece, PieceKind, SentencePieceModel
from llmkit.tokenization.tiktoken_ranks import parse_ranks
from llmkit.tokenization.wire import encode_field

_TRAINER, _BYTE_FALLBACK = 2, 35  # field numbers of sentencepiece_model.proto


class Codec(Protocol):
    """What a tokenizer needs of its vocabulary."""

    @property
    def n_tokens(self) -> int:
        """Largest id + 1."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""

    def piece(self, i: int) -> str:
        """The string of an id."""

    def find(self, piece: str) -> int | None:
        """The id of a string that is one entry of the vocabulary."""


class SentencePieceCodec:
    """A SentencePiece model as the library applies it.

    Args:
        data: the file.
        kind: what to make of it.
        where: names the file in errors.

    Attributes:
        offset: the id of its first piece.

    Raises:
        InputError: it is no SentencePiece model.
    """

    def __init__(self, data: bytes, kind: SentencePieceFile, where: str) -> None:
        self.processor = _processor(_completed(data, kind, where), where)
        self.offset = 0
        self.blanks = kind.blanks

    @property
    def n_tokens(self) -> int:
        return self.offset + int(self.processor.get_piece_size())

    def encode(self, text: str) -> list[int]:
        if self.blanks is not None:
            text = spell_blanks(text, self.blanks)
        return [i + self.offset for i in self.processor.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        n = self.n_tokens
        text = str(self.processor.decode([i - self.offset for i in ids if self.offset <= i < n]))
        return text if self.blanks is None else unspell_blanks(text, self.blanks)

    def piece(self, i: int) -> str:
        return str(self.processor.id_to_piece(i - self.offset)) if self.offset <= i < self.n_tokens else ""

    def find(self, piece: str) -> int | None:
        i = int(self.processor.piece_to_id(piece))
        return i + self.offset if str(self.processor.id_to_piece(i)) == piece else None

    def is_control(self, i: int) -> bool:
        """Whether an id stands for no text (<s>, </s>, reserved tokens)."""
        inside = self.offset <= i < self.n_tokens
        return inside and bool(self.processor.is_control(i - self.offset))


class RanksCodec:
    """Byte-pair encoding by tiktoken ranks, through the tokenizers library.

    Args:
        data: the file.
        kind: what to make of it.
        where: names the file in errors.
    """

    def __init__(self, data: bytes, kind: TiktokenFile, where: str) -> None:
        self._ranks = parse_ranks(data, where)
        self._pattern, self._is_composed = kind.pattern, kind.is_composed
        self.n_tokens = max(self._ranks.values(), default=-1) + 1

    @cached_property
    def tokenizer(self) -> Any:
        """The same ranks as merges: every way to cut a token into two, in the order of the token's rank."""
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        ranks = self._ranks
        merges = [
            (rank, from_bytes(token[:i]), from_bytes(token[i:]))
            for token, rank in ranks.items()
            for i in range(1, len(token))
            if token[:i] in ranks and token[i:] in ranks
        ]
        merges.sort(key=lambda m: m[0])
        vocab = {from_bytes(token): rank for token, rank in ranks.items()}
        # a word that is a token is taken whole, as tiktoken does
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(a, b) for _, a, b in merges], ignore_merges=True))
        words = pre_tokenizers.Split(Regex(self._pattern), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        tokenizer.decoder = decoders.ByteLevel()
        if self._is_composed:
            tokenizer.normalizer = normalizers.NFC()
        return tokenizer

    @cached_property
    def _tokens(self) -> dict[int, bytes]:
        return {rank: token for token, rank in self._ranks.items()}

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._tokens.get(i, b"") for i in ids).decode("utf-8", "replace")

    def piece(self, i: int) -> str:
        return from_bytes(self._tokens.get(i, b""))

    def find(self, piece: str) -> int | None:
        data = to_bytes(piece)
        return None if data is None else self._ranks.get(data)


def spell_blanks(text: str, blanks: Blanks) -> str:
    """Line ends, tabs and runs of spaces as their pieces, the longest run first."""
    text = text.replace("\n", blanks.newline).replace("\t", blanks.tab)

    def spelt(match: re.Match[str]) -> str:
        n = len(match[0])
        n_longest, rest = divmod(n, blanks.longest)
        tail = blanks.run.replace("{n}", str(rest)) if rest > 1 else " " * rest
        return blanks.run.replace("{n}", str(blanks.longest)) * n_longest + tail

    return re.sub(" {2,}", spelt, text)


def unspell_blanks(text: str, blanks: Blanks) -> str:
    """The reverse of `spell_blanks`."""
    text = text.replace(blanks.newline, "\n").replace(blanks.tab, "\t")
    for n in range(2, blanks.longest + 1):
        text = text.replace(blanks.run.replace("{n}", str(n)), " " * n)
    return text


def _processor(data: bytes, where: str) -> Any:
    from sentencepiece import SentencePieceProcessor

    if not data:  # the library takes it for a model that is still to be loaded
        raise InputError(f"{where} is empty")
    try:
        return SentencePieceProcessor(model_proto=data)
    except Exception as error:
        raise InputError(f"{where} is truncated or no SentencePiece model") from error


def _completed(data: bytes, kind: SentencePieceFile, where: str) -> bytes:
    """The model with the pieces that its code would append, and with reserved pieces that no text can spell."""
    if not kind.reserved:
        return data
    processor = _processor(data, where)
    held = [t for t in kind.reserved if processor.id_to_piece(processor.piece_to_id(t)) == t]
    if all(processor.is_control(processor.piece_to_id(t)) for t in held) and (held or not kind.appended):
        return data
    model = SentencePieceModel.parse(data, where)
    if held:
        pieces = [Piece(p.text, p.score, PieceKind.CONTROL) if p.text in held else p for p in model.pieces]
        return model.with_pieces(pieces).serialized()
    new = [Piece(t, 0.0, PieceKind.CONTROL) for t in kind.reserved]
    new += [Piece(t, 0.0, PieceKind.USER_DEFINED) for t in kind.appended]
    new += [Piece(f"<0x{b:02X}>", 0.0, PieceKind.BYTE) for b in range(256)]
    new = [p for p in new if p.text not in model.ids]
    # protobuf merges a message that occurs twice: this sets one field of the trainer's settings
    return model.extended(new).serialized() + encode_field(_TRAINER, encode_field(_BYTE_FALLBACK, 1))
