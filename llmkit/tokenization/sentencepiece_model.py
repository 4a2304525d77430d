"""SentencePiece models (`tokenizer.model`): pieces are read and changed, every other byte is kept.

Only field 1 of the ModelProto, the pieces, is understood in full: {1: string, 2: float32 score, 3: type}. The rest
(trainer, normalizer, self-test) is copied. SentencePiece's own protobuf module is not used: it refuses every
protobuf runtime older than the one it was generated with, and counting pieces must not cost an import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

from llmkit.errors import InputError
from llmkit.tokenization.wire import Field, encode_field, float32_of, read_fields

SPACE = "▁"


class PieceKind(IntEnum):
    """The type of a piece, as sentencepiece_model.proto numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its position.

    Attributes:
        text: the string, spaces written as ▁.
        score: log-probability (Unigram), or priority of the merge that makes it (BPE: larger is earlier).
        raw: the record as it was read; empty for a new piece.
    """

    text: str
    score: float
    kind: PieceKind = PieceKind.NORMAL
    raw: bytes = field(default=b"", compare=False, repr=False)

    def encoded(self) -> bytes:
        """The record (field 1 of the model) that stands for this piece."""
        if self.raw:
            return self.raw
        body = encode_field(1, self.text.encode()) + encode_field(2, float(self.score))
        if self.kind is not PieceKind.NORMAL:
            body += encode_field(3, int(self.kind))
        return encode_field(1, body)


@dataclass(frozen=True)
class SentencePieceModel:
    """A parsed ModelProto.

    Attributes:
        pieces: the vocabulary, by id.
        rest: every other field, as it stands in the file.
        model_type: unigram, bpe, word or char.
        normalizer: name of the normalization (`identity`, `nmt_nfkc`, …).
        has_dummy_prefix: a space is put before the text.
        trims_spaces: leading, trailing and repeated spaces are taken out of the text.
        has_byte_fallback: what no piece covers becomes BYTE pieces.
    """

    pieces: tuple[Piece, ...]
    rest: bytes
    model_type: str
    normalizer: str
    has_dummy_prefix: bool
    trims_spaces: bool
    has_byte_fallback: bool

    @classmethod
    def parse(cls, data: bytes, where: str) -> SentencePieceModel:
        """Read the bytes of a model; `where` names them in errors.

        Raises:
            InputError: it is truncated or no SentencePiece model.
        """
        pieces: list[Piece] = []
        rest, trainer, normalizer = bytearray(), b"", b""
        try:
            for record in read_fields(data):
                if record.number == 1:
                    pieces.append(_piece(record))
                    continue
                rest += record.raw
                if isinstance(record.value, bytes) and record.number in (2, 3):
                    trainer, normalizer = (record.value, normalizer) if record.number == 2 else (trainer, record.value)
            if not pieces:
                raise IndexError("no pieces")
            t = {f.number: f.value for f in read_fields(trainer)}
            n = {f.number: f.value for f in read_fields(normalizer)}
        except (IndexError, ValueError) as error:
            raise InputError(f"{where} is truncated or no SentencePiece model ({error})") from error
        # Defaults of sentencepiece_model.proto: model_type UNIGRAM, add_dummy_prefix and remove_extra_whitespaces true.
        kinds = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
        name = n.get(1, b"")
        return cls(
            pieces=tuple(pieces),
            rest=bytes(rest),
            model_type=kinds.get(_integer(t.get(3, 1)), "unknown"),
            normalizer=name.decode("utf-8", "replace") if isinstance(name, bytes) else "",
            has_dummy_prefix=bool(n.get(3, 1)),
            trims_spaces=bool(n.get(4, 1)),
            has_byte_fallback=bool(t.get(35, 0)),
        )

    def serialized(self) -> bytes:
        """The bytes of the model, as protobuf writes it: pieces, then the rest."""
        return b"".join(p.encoded() for p in self.pieces) + self.rest

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Piece -> id."""
        return {p.text: i for i, p in enumerate(self.pieces)}

    @cached_property
    def scores(self) -> Mapping[str, float]:
        """Piece -> score, of the pieces that merges can make (types NORMAL and USER_DEFINED)."""
        usable = (PieceKind.NORMAL, PieceKind.USER_DEFINED)
        return {p.text: p.score for p in self.pieces if p.kind in usable}

    def extended(self, pieces: Iterable[Piece]) -> SentencePieceModel:
        """This model with pieces appended; all present ids stay."""
        return self.with_pieces((*self.pieces, *pieces))

    def with_pieces(self, pieces: Sequence[Piece]) -> SentencePieceModel:
        """The same model with other pieces."""
        return replace(self, pieces=tuple(pieces))

    def encoder(self) -> Callable[[str], list[int]]:
        """SentencePiece's own encoder of this model: text -> ids, without bos and eos."""
        processor = self.processor()
        return lambda text: list(processor.encode(text))

    def processor(self) -> Any:
        """SentencePiece's own processor of this model.

        Raises:
            InputError: the library cannot read it.
        """
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_proto=self.serialized())
        except Exception as error:
            first = str(error).strip().splitlines()[-1:] or ["no reason given"]
            raise InputError(f"sentencepiece cannot read the model: {first[0]}") from error


def bpe_settings(n_pieces: int, *, has_bytes: bool, adds_space: bool, ids: Mapping[int, Any] | None = None) -> bytes:
    """TrainerSpec and NormalizerSpec of a BPE model whose text is left as it is, spaces included.

    Args:
        has_bytes: what no piece covers becomes byte pieces.
        adds_space: a space is put before the text.
        ids: field number of a special token (40 unk, 41 bos, 42 eos, 43 pad) -> its id; what is none is left out.
    """
    trainer = encode_field(3, 2) + encode_field(4, n_pieces) + encode_field(35, int(has_bytes))
    special = {field: i for field, i in (ids or {}).items() if isinstance(i, int) and i in range(n_pieces)}
    trainer += b"".join(encode_field(field, i) for field, i in special.items())
    normalizer = encode_field(1, b"identity") + encode_field(3, int(adds_space)) + encode_field(4, 0)
    return encode_field(2, trainer) + encode_field(3, normalizer + encode_field(5, 1))


def _piece(record: Field) -> Piece:
    if not isinstance(record.value, bytes):
        raise IndexError("a piece that is no message")
    text, score, kind = "", 0.0, PieceKind.NORMAL
    for part in read_fields(record.value):
        if part.number == 1 and isinstance(part.value, bytes):
            text = part.value.decode()
        elif part.number == 2:
            score = float32_of(part.value)
        elif part.number == 3:
            kind = PieceKind(_integer(part.value))
    return Piece(text, score, kind, record.raw)


def _integer(value: int | bytes) -> int:
    return value if isinstance(value, int) else -1
