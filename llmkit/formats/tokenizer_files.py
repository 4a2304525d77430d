"""The files of tokenizers by name, and what each holds: the one table of them."""

from __future__ import annotations

from enum import StrEnum


class FileKind(StrEnum):
    """What a tokenizer file holds."""

    FAST = "the tokenizers library's document"
    SENTENCEPIECE_OR_RANKS = "a SentencePiece model, or tiktoken ranks (Llama 3, GLM-4): its first line tells"
    SENTENCEPIECE = "a SentencePiece model"
    VOCABULARY = "token -> id of byte-level BPE, whose merges lie in a file of their own"
    RANKS = "tiktoken ranks"
    BYTE_STRINGS = "byte strings with their ids, one a line"
    WORDS = "words, one a line"
    MERGES = "the merges of byte-level BPE"
    ADDED = "added token -> id"
    SETTINGS = "the settings of transformers' class, with its added tokens by id"
    SPECIALS = "the special tokens by their roles"
    TEMPLATE = "the chat template"


_KINDS = {
    "tokenizer.json": FileKind.FAST,
    "20B_tokenizer.json": FileKind.FAST,
    "tokenizer.model": FileKind.SENTENCEPIECE_OR_RANKS,
    "spiece.model": FileKind.SENTENCEPIECE,
    "sentencepiece.bpe.model": FileKind.SENTENCEPIECE,
    "ice_text.model": FileKind.SENTENCEPIECE,
    "sp.model": FileKind.SENTENCEPIECE,
    "vocab.json": FileKind.VOCABULARY,
    "qwen.tiktoken": FileKind.RANKS,
    "vocab.tiktoken": FileKind.RANKS,
    "rwkv_vocab_v20230424.txt": FileKind.BYTE_STRINGS,
    "vocab.txt": FileKind.WORDS,
    "merges.txt": FileKind.MERGES,
    "added_tokens.json": FileKind.ADDED,
    "tokenizer_config.json": FileKind.SETTINGS,
    "special_tokens_map.json": FileKind.SPECIALS,
    "chat_template.jinja": FileKind.TEMPLATE,
    "chat_template.json": FileKind.TEMPLATE,
}
TOKENIZER_FILES = tuple(_KINDS)
_BESIDE = (FileKind.MERGES, FileKind.ADDED, FileKind.SETTINGS, FileKind.SPECIALS, FileKind.TEMPLATE)
VOCABULARIES = {name: kind for name, kind in _KINDS.items() if kind not in _BESIDE}
"""Name -> kind of the files that hold a vocabulary, the preferred first."""


def names_of(*kinds: FileKind) -> tuple[str, ...]:
    """The names of the files of some kinds, the preferred first."""
    return tuple(name for name, kind in _KINDS.items() if kind in kinds)
