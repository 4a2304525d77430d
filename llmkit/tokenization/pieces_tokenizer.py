"""The tokenizer of a GGUF file with scored pieces: what llama.cpp makes of them, through SentencePiece.

llama.cpp merges as SentencePiece does: the largest score first, the leftmost of equal ones. A list of merges, which is
what tokenizer.json holds, cannot say that; so the pieces themselves are the tokenizer here. Control tokens, and tokens
that were added to the model, are cut out of a text before. Source: ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.tokenizers import SentencePieceFile
from llmkit.tokenization.file_codecs import SentencePieceCodec
from llmkit.tokenization.file_tokenizer import FileTokenizer
from llmkit.tokenization.published import token_name
from llmkit.tokenization.sentencepiece_model import SPACE, PieceKind, SentencePieceModel

ADDED_SCORE = -1000.0  # of tokens that were added to a SentencePiece model; llama.cpp's converter writes it, too
_SPECIAL = (PieceKind.CONTROL, PieceKind.UNKNOWN)


def tokenizer_of_pieces(data: bytes, settings: Mapping[str, Any], label: str) -> FileTokenizer:
    """The tokenizer of a model that was made from a GGUF file's vocabulary.

    Args:
        data: tokenizer.model.
        settings: tokenizer_config.json.
        label: for messages.

    Raises:
        InputError: SentencePiece cannot read the model.
    """
    where = f"{label}: tokenizer.model"
    model = SentencePieceModel.parse(data, where)
    # Without a space before every text, SentencePiece itself finds added tokens at the same places, and a literal
    # space mark in them.
    words = {
        p.text.replace(SPACE, " "): i
        for i, p in enumerate(model.pieces)
        if model.has_dummy_prefix and p.kind is PieceKind.USER_DEFINED and p.score <= ADDED_SCORE
    }
    hidden = set(words.values())
    pieces = [replace(p, kind=PieceKind.UNUSED, raw=b"") if i in hidden else p for i, p in enumerate(model.pieces)]
    codec = SentencePieceCodec(model.with_pieces(pieces).serialized(), SentencePieceFile(file="tokenizer.model"), where)
    specials = {p.text: i for i, p in enumerate(model.pieces) if p.kind in _SPECIAL}
    names = {n: token_name(settings, n, None) for n in ("bos", "eos", "pad", "unk")}
    around = {
        n: [model.ids[text]]
        for n in ("bos", "eos")
        if settings.get(f"add_{n}_token") and (text := names[n]) is not None and text in model.ids
    }
    return FileTokenizer(
        codec,
        specials=specials,
        words=words,
        prefix=around.get("bos", ()),
        suffix=around.get("eos", ()),
        names={n: text if text in model.ids else None for n, text in names.items()},
        settings=settings,
        name_or_path=label,
    )
