"""tokenizer.bin of llama2.c: the pieces of a SentencePiece BPE model with their scores, spaces as spaces.

u32 length of the longest piece in bytes, then for each id float32 score, u32 length, bytes. Ids 0, 1, 2 are unk, bos
and eos (the two with line breaks around them); `<0x0A>` and the like are byte pieces. Types and the settings of the
model are not there: a model made of such a file has those of LLaMA's (BPE, byte fallback, a space put before the text).

Source: karpathy/llama2.c, tokenizer.py.
"""

from __future__ import annotations

import re
import struct

from llmkit.errors import InputError
from llmkit.tokenization.sentencepiece_model import SPACE, Piece, PieceKind, SentencePieceModel, bpe_settings

_BOS, _EOS = 1, 2
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def to_scored_pieces(model: SentencePieceModel) -> bytes:
    """The tokenizer.bin of a model."""
    texts = [p.text.replace(SPACE, " ") for p in model.pieces]
    for i in (_BOS, _EOS):
        if i < len(texts):
            texts[i] = f"\n{texts[i]}\n"
    data = [text.encode() for text in texts]
    records = (struct.pack("<fI", p.score, len(d)) + d for p, d in zip(model.pieces, data, strict=True))
    return struct.pack("<I", max(map(len, data), default=0)) + b"".join(records)


def from_scored_pieces(data: bytes, n_tokens: int, where: str) -> SentencePieceModel:
    """The model of a tokenizer.bin.

    Raises:
        InputError: it ends too early, holds another number of pieces than `n_tokens`, or text that is no UTF-8.
    """
    pieces: list[Piece] = []
    position = 4
    try:
        while position < len(data):
            score, length = struct.unpack_from("<fI", data, position)
            position += 8 + length
            if position > len(data):
                raise struct.error("a piece ends beyond the file")
            pieces.append(_piece(len(pieces), data[position - length : position].decode(), score))
    except (struct.error, UnicodeDecodeError) as error:
        raise InputError(
            f"{where} is truncated or no tokenizer.bin: piece {len(pieces)}: {error}", hint="copy or export it again"
        ) from error
    if len(pieces) != n_tokens:
        raise InputError(
            f"{where} holds {len(pieces)} pieces, the model has {n_tokens}", hint="give the tokenizer.bin of this model"
        )
    rest = bpe_settings(len(pieces), has_bytes=True, adds_space=True)
    return SentencePieceModel(tuple(pieces), rest, "bpe", "identity", True, False, True)


def _piece(i: int, text: str, score: float) -> Piece:
    if i == 0:
        return Piece(text, score, PieceKind.UNKNOWN)
    if i in (_BOS, _EOS):
        return Piece(text.strip("\n"), score, PieceKind.CONTROL)
    if _BYTE.fullmatch(text):
        return Piece(text, score, PieceKind.BYTE)
    return Piece(text.replace(" ", SPACE), score)
