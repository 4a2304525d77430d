"""Tokenizer files from GGUF metadata: tokenizer.json, tokenizer.model where it is SentencePiece, tokenizer_config.json.

The large files are made when somebody reads them: opening a model does not pay for its vocabulary twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from llmkit.architecture.tokenizers import ByteTrieFile, published_tokenizers
from llmkit.checkpoint.file_content import FileContent
from llmkit.errors import InputError
from llmkit.tokenization.bpe import implied_merges, scores_of_merges
from llmkit.tokenization.byte_strings import trie_of, unescaped, vocabulary_file
from llmkit.tokenization.byte_trie import ByteTrie
from llmkit.tokenization.documents import bpe_model, document, sentencepiece_steps, template_processing
from llmkit.tokenization.fast import FastTokenizer
from llmkit.tokenization.parity import compare, tied_texts
from llmkit.tokenization.pieces_tokenizer import ADDED_SCORE, tokenizer_of_pieces
from llmkit.tokenization.pretokenizers import ADDING_BOS, COMPOSING, IGNORING_MERGES, NFC, pre_tokenizer_of
from llmkit.tokenization.sentencepiece_model import SPACE, Piece, PieceKind, bpe_settings

_WHOLE = (PieceKind.CONTROL, PieceKind.USER_DEFINED)
# tokenizer.ggml.model -> what it is; named by GGUF after the first model of each kind.
_KINDS = {"llama": "sentencepiece", "gemma4": "merged_pieces", "gpt2": "byte_level", "rwkv": "byte_strings"}


def tokenizer_files(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, FileContent]:
    """The tokenizer files of a model; none where the file has no vocabulary, or one of a kind that is not read.

    Raises:
        InputError: lists of different lengths.
    """
    if metadata.get("tokenizer.ggml.model") not in _KINDS or not metadata.get("tokenizer.ggml.tokens"):
        return {}
    vocabulary = _Vocabulary(metadata)
    if vocabulary.is_bytes:
        kind = next(kind for kind in published_tokenizers().values() if isinstance(kind, ByteTrieFile))
        added = {str(token.pop("id")): token for token in vocabulary.added()}
        settings = {**vocabulary.config(config), "tokenizer_class": kind.classes[0], "added_tokens_decoder": added}
        return {
            kind.file: FileContent(make=lambda: vocabulary_file(vocabulary.trie().tokens)),
            "tokenizer_config.json": FileContent(data=_json(settings)),
        }
    make = vocabulary.sentencepiece_json if vocabulary.is_sentencepiece else vocabulary.byte_level_json
    settings = vocabulary.config(config)
    check = vocabulary.difference if vocabulary.is_sentencepiece else None
    files = {"tokenizer.json": FileContent(make=make, check=check)}
    if vocabulary.is_sentencepiece:
        files["tokenizer.model"] = FileContent(make=vocabulary.sentencepiece_model)
    files["tokenizer_config.json"] = FileContent(data=_json(settings))
    return files


def reader_of(metadata: Mapping[str, Any], *, with_special: bool = True) -> Callable[[str], list[int]]:
    """What an engine makes of the vocabulary: text -> ids, without bos and eos.

    Args:
        with_special: special and added tokens are looked for in text; byte-level ones always are.

    Raises:
        InputError: SentencePiece or the tokenizers library cannot read it.
    """
    vocabulary = _Vocabulary(metadata)
    if vocabulary.is_sentencepiece:
        return vocabulary.exact(with_special=with_special)
    if vocabulary.is_bytes:
        return vocabulary.trie().encode
    fast = FastTokenizer.parse(vocabulary.byte_level_json(), "the GGUF vocabulary")
    return FastTokenizer({**fast.data, "normalizer": None}).encoder()  # llama.cpp normalizes no text


def _json(data: Any) -> bytes:
    return (json.dumps(data, ensure_ascii=False) + "\n").encode()


class _Vocabulary:
    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.tokens: Sequence[str] = self._get("tokens", [])
        kind = _KINDS[self._get("model")]
        self.is_sentencepiece = kind in ("sentencepiece", "merged_pieces")
        self.is_bytes = kind == "byte_strings"
        self.types: Sequence[int] = self._get("token_type") or [PieceKind.NORMAL] * len(self.tokens)
        self.scores: Sequence[float] = self._get("scores") or [0.0] * len(self.tokens)
        if not all(" " in m for m in self._get("merges") or []):
            raise InputError("tokenizer.ggml.merges is no list of pairs, with a space between the two")
        merges = [m.partition(" ") for m in self._get("merges") or []]
        self.merges = [] if kind == "sentencepiece" else [(left, right) for left, _, right in merges]
        if kind == "merged_pieces":  # whose scores say nothing
            order, last = scores_of_merges(self.merges), -float(len(self.merges))
            self.scores = [order.get(text, last) for text in self.tokens]
        for name, values in {"token_type": self.types, "scores": self.scores}.items():
            if len(values) != len(self.tokens):
                raise InputError(f"tokenizer.ggml.{name} has {len(values)} values for {len(self.tokens)} tokens")

    def _get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    @cached_property
    def adds_space(self) -> bool:
        return bool(self._get("add_space_prefix", True))

    def token(self, kind: str) -> str | None:
        """The text of a special token (`bos`, `eos`, …)."""
        i = self._get(f"{kind}_token_id")
        return self._text(i) if isinstance(i, int) and 0 <= i < len(self.tokens) else None

    def _text(self, i: int) -> str:
        return unescaped(self.tokens[i]).decode("utf-8", "replace") if self.is_bytes else self.tokens[i]

    def adds(self, kind: str) -> bool:
        """Whether bos or eos is put around a text."""
        default = kind == "bos" and (self.is_sentencepiece or self._get("pre") in ADDING_BOS)
        return bool(self._get(f"add_{kind}_token", default)) and self.token(kind) is not None

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """tokenizer_config.json."""
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for kind, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            text = self.token(key)
            if text is not None:
                settings[f"{kind}_token"] = text
        settings |= {f"add_{kind}_token": self.adds(kind) for kind in ("bos", "eos")}
        settings["clean_up_tokenization_spaces"] = False
        length = config.get("max_position_embeddings")
        if isinstance(length, int):
            settings["model_max_length"] = length
        key = "tokenizer.chat_template"
        stated = {k.removeprefix(f"{key}."): v for k, v in self._metadata.items() if k.startswith(f"{key}.")}
        templates = {"default": self._metadata.get(key), **stated}
        named = [{"name": name, "template": text} for name, text in templates.items() if isinstance(text, str)]
        if named:
            settings["chat_template"] = named if stated else templates["default"]
        return settings

    def trie(self) -> ByteTrie:
        """Byte strings, matched greedily."""
        return trie_of(self.tokens, self.types)

    def byte_level_json(self) -> bytes:
        """tokenizer.json of byte-level BPE."""
        pre = str(self._get("pre", "gpt-2"))
        pre_tokenizer = pre_tokenizer_of(pre) or pre_tokenizer_of("gpt-2")
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        return self._json(
            bpe_model(self._vocab(), self.merges, ignores_merges=pre in IGNORING_MERGES),
            normalizer=NFC if pre in COMPOSING else None,
            pre_tokenizer=pre_tokenizer,
            post_processor=byte_level,
            decoder={**byte_level, "trim_offsets": True, "use_regex": True},
        )

    def sentencepiece_json(self) -> bytes:
        """tokenizer.json of SentencePiece's BPE: its merges, or those that follow from the scores, in their order."""
        scores = {
            text: score
            for text, score, kind in zip(self.tokens, self.scores, self.types, strict=True)
            # Tokens that were added to a model have this score, and no merge makes them.
            if kind == PieceKind.NORMAL or (kind == PieceKind.USER_DEFINED and score > ADDED_SCORE)
        }
        characters = {c for text in scores for c in text}
        vocab = self._vocab()
        merges = self.merges or implied_merges(scores, {*scores, *characters & vocab.keys()})
        unknown = self.token("unknown") or "<unk>"
        normalizer, decoder = sentencepiece_steps(adds_space=self.adds_space)
        return self._json(
            bpe_model(vocab, merges, unknown=unknown, fuses_unknown=True, has_byte_fallback=True),
            normalizer=normalizer,
            decoder=decoder,
        )

    def exact(self, *, with_special: bool = True) -> Callable[[str], list[int]]:
        """The encoder of the pieces."""
        tokenizer = tokenizer_of_pieces(self.sentencepiece_model(), self.config({}), "the GGUF vocabulary")
        if not with_special:
            return tokenizer.codec.encode
        return lambda text: tokenizer.encode(text, False, split_special_tokens=False)

    def difference(self, document: bytes) -> str | None:
        """What the tokenizer.json of these pieces cuts otherwise than they."""
        scores = {t: s for t, s, k in zip(self.tokens, self.scores, self.types, strict=True) if k == PieceKind.NORMAL}
        name = "tokenizer.json, made from the vocabulary of the GGUF file"
        try:
            difference = compare(self.exact(), FastTokenizer.parse(document, name).encoder(), more=tied_texts(scores))
        except InputError as error:
            return f"{name}, could not be compared with it: {error.message}"
        if difference is None:
            return None
        return f"{name}: {difference}; where the ids matter, read tokenizer.model with sentencepiece: that is exact"

    def _vocab(self) -> dict[str, int]:
        vocab: dict[str, int] = {}
        for i, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind != PieceKind.UNUSED:
                vocab.setdefault(text, i)
        return vocab

    def added(self) -> list[dict[str, Any]]:
        """The tokens that are matched whole, as tokenizer.json lists them."""
        added = {i: self._text(i) for i, kind in enumerate(self.types) if kind in _WHOLE}
        if self.is_sentencepiece and (unknown := self._get("unknown_token_id")) is not None and self.token("unknown"):
            added[unknown] = self.tokens[unknown]
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        is_plain = [kind == PieceKind.USER_DEFINED for kind in self.types]
        # Looked for in normalized text, a run of spaces is found where the text has space marks, too; not where
        # normalizing puts a space before the token itself.
        is_late = self.is_sentencepiece and not self.adds_space
        return [
            {"id": i, "content": text, **flags, "normalized": is_plain[i] and is_late, "special": not is_plain[i]}
            for i, text in sorted(added.items())
        ]

    def _json(self, model: Mapping[str, Any], *, post_processor: Any = None, **steps: Any) -> bytes:
        """A tokenizer.json with the added tokens, which puts bos and eos around a text."""
        bos, eos = (
            [(text, self._get(f"{kind}_token_id"))]
            if self.adds(kind) and (text := self.token(kind)) is not None
            else []
            for kind in ("bos", "eos")
        )
        template = template_processing(bos, eos)
        if template is not None and post_processor is not None:
            post_processor = {"type": "Sequence", "processors": [post_processor, template]}
        return _json(document(model, added=self.added(), post_processor=post_processor or template, **steps))

    def sentencepiece_model(self) -> bytes:
        """tokenizer.model: a ModelProto of these pieces, of type BPE."""
        numbers = {int(kind) for kind in PieceKind}
        kinds = [PieceKind(kind) if kind in numbers else PieceKind.NORMAL for kind in self.types]
        unknown = self._get("unknown_token_id", 0)
        # User-defined pieces are stored with plain spaces.
        pieces = b"".join(
            Piece(text.replace(" ", SPACE), score, PieceKind.UNKNOWN if i == unknown else kind).encoded()
            for i, (text, score, kind) in enumerate(zip(self.tokens, self.scores, kinds, strict=True))
        )
        special = {41: "bos", 42: "eos", 43: "padding"}
        ids = {40: unknown} | {field: self._get(f"{name}_token_id") for field, name in special.items()}
        has_bytes = PieceKind.BYTE in kinds
        return pieces + bpe_settings(len(self.tokens), has_bytes=has_bytes, adds_space=self.adds_space, ids=ids)
