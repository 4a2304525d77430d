"""tokenizer.json for a tokenizer that was published as remote code, so that transformers loads it without that code.

The file is made when somebody reads it: planning a conversion does not pay for the vocabulary.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.architecture.tokenizers import SentencePieceFile, TiktokenFile, TokenizerKind
from llmkit.checkpoint.file_content import FileContent
from llmkit.tokenization.bpe import implied_merges
from llmkit.tokenization.documents import bpe_model, document, sentencepiece_steps, template_processing
from llmkit.tokenization.fast import FastTokenizer
from llmkit.tokenization.file_codecs import RanksCodec, SentencePieceCodec
from llmkit.tokenization.file_tokenizer import FileTokenizer
from llmkit.tokenization.parity import compare, tied_texts
from llmkit.tokenization.published import build_tokenizer, token_name
from llmkit.tokenization.sentencepiece_model import SPACE, PieceKind, SentencePieceModel
from llmkit.tokenization.wire import read_fields

# What only the published code reads, or what tokenizer.json says itself.
_LEFT_OUT = ("auto_map", "added_tokens_decoder", "add_bos_token", "add_eos_token", "do_lower_case", "remove_space",
             "use_fast", "sp_model_kwargs")  # fmt: skip
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def can_be_fast(kind: TokenizerKind) -> bool:
    """Whether tokenizer.json can say what the kind does: not spellings of blanks, nor the longest byte string."""
    return isinstance(kind, TiktokenFile) or (isinstance(kind, SentencePieceFile) and kind.blanks is None)


def fast_files(
    kind: TokenizerKind,
    files: Mapping[str, FileContent],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    label: str,
) -> dict[str, FileContent]:
    """tokenizer.json, and a tokenizer_config.json that names no code; the published file stays.

    Args:
        kind: one that `can_be_fast`.
        files: of the checkpoint.
        settings: tokenizer_config.json.
        config: config.json.
        label: the checkpoint's, for messages.
    """
    names = {n: token_name(settings, n, getattr(kind, n)) for n in ("bos", "eos", "pad", "unk")}
    kept = {k: v for k, v in settings.items() if k not in _LEFT_OUT and k.removesuffix("_token") not in names}
    kept |= {f"{n}_token": text for n, text in names.items() if text is not None}
    kept |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": settings.get("padding_side") or "left",
        "clean_up_tokenization_spaces": False,
    }

    read = {n: files[n].read() for n in (kind.file, "added_tokens.json") if n in files}

    def check(document: bytes) -> str | None:
        tokenizer = build_tokenizer(kind, read, settings, config, label)
        more = []
        if isinstance(tokenizer.codec, SentencePieceCodec):
            more = tied_texts(SentencePieceModel.parse(read[kind.file], label).scores)
        difference = compare(
            lambda text: tokenizer.encode(text, False, split_special_tokens=False),
            FastTokenizer.parse(document, "tokenizer.json").encoder(),
            more=[*more, *(f"a{t}b" for t in tokenizer.specials), *(f"a{t} b" for t in tokenizer.words)],
        )
        return None if difference is None else f"tokenizer.json, made from {kind.file}, which is exact: {difference}"

    def make() -> bytes:
        tokenizer = build_tokenizer(kind, read, settings, config, label)
        if isinstance(tokenizer.codec, RanksCodec):
            document = json.loads(tokenizer.codec.tokenizer.to_str())
            plain: list[tuple[int, str]] = []
        else:
            model = SentencePieceModel.parse(read[kind.file], f"{label}: {kind.file}")
            document, plain = _sentencepiece(model), _whole_pieces(model, tokenizer)
        document["added_tokens"] = _added(tokenizer, plain)
        names = [(str(tokenizer.convert_ids_to_tokens(i)), i) for i in (*tokenizer.prefix_ids, *tokenizer.suffix_ids)]
        n = len(tokenizer.prefix_ids)
        document["post_processor"] = template_processing(names[:n], names[n:]) or document.get("post_processor")
        return json.dumps(document, ensure_ascii=False).encode()

    return {"tokenizer.json": FileContent(make=make, check=check), "tokenizer_config.json": FileContent.of_json(kept)}


def _sentencepiece(model: SentencePieceModel) -> dict[str, Any]:
    unknown = next((p.text for p in model.pieces if p.kind is PieceKind.UNKNOWN), None)
    if model.model_type == "unigram":
        pieces = [[p.text, p.score] for p in model.pieces]
        inner: dict[str, Any] = {"type": "Unigram", "unk_id": model.ids.get(unknown or ""), "vocab": pieces}
        inner["byte_fallback"] = model.has_byte_fallback
    else:
        merges = implied_merges(model.scores, model.ids)
        inner = bpe_model(
            model.ids, merges, unknown=unknown, fuses_unknown=True, has_byte_fallback=model.has_byte_fallback
        )
    steps: list[dict[str, Any]] = []
    if charsmap := _charsmap(model):
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if model.trims_spaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    normalizer, decoder = sentencepiece_steps(adds_space=model.has_dummy_prefix, before=steps)
    return document(inner, normalizer=normalizer, decoder=decoder)


def _charsmap(model: SentencePieceModel) -> bytes:
    """The compiled table of the model's normalization (field 2 of NormalizerSpec, field 3 of the model)."""
    for outer in read_fields(model.rest):
        if outer.number == 3 and isinstance(outer.value, bytes):
            for inner in read_fields(outer.value):
                if inner.number == 2 and isinstance(inner.value, bytes):
                    return inner.value
    return b""


def _whole_pieces(model: SentencePieceModel, tokenizer: FileTokenizer) -> list[tuple[int, str]]:
    """Pieces that a text is cut at before all else."""
    return [
        (i, p.text.replace(SPACE, " "))
        for i, p in enumerate(model.pieces)
        if p.kind is PieceKind.USER_DEFINED and p.text not in tokenizer.specials
    ]


def _added(tokenizer: FileTokenizer, plain: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    special = {i: text for text, i in tokenizer.specials.items()}
    words = {**dict(plain), **{i: text for text, i in tokenizer.words.items()}}
    return [
        {"id": i, "content": text, **_FLAGS, "special": i in special}
        for i, text in sorted({**words, **special}.items())
    ]
