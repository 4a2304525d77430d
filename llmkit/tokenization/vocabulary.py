"""The size of a tokenizer, from its files alone: no tokenizer library is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.architecture.tokenizers import SentencePieceFile
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError
from llmkit.formats.tokenizer_files import VOCABULARIES, FileKind, names_of
from llmkit.tokenization.added_tokens import added_tokens
from llmkit.tokenization.checked import MOST_IDS, read_tokenizer_json
from llmkit.tokenization.published import choose_kind
from llmkit.tokenization.tiktoken_ranks import looks_like_ranks
from llmkit.tokenization.wire import read_fields


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the tokenizer files say.

    Attributes:
        file: the file that was counted.
        kind: the model of the tokenizer (BPE, Unigram, SentencePiece, tiktoken, …).
        n_tokens: largest id + 1, added tokens included.
        n_added: added tokens beyond those of the model.
        has_chat_template: a chat template is among the files.
    """

    file: str
    kind: str
    n_tokens: int
    n_added: int
    has_chat_template: bool


def read_vocabulary(ckpt: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a checkpoint, or None when it has no tokenizer files that are known.

    Raises:
        InputError: a tokenizer file is malformed.
    """
    settings = _json(ckpt, "tokenizer_config.json")
    has_template = bool(settings.get("chat_template")) or any(n in ckpt.files for n in names_of(FileKind.TEMPLATE))
    name = next((n for n in VOCABULARIES if n in ckpt.files), None)
    if name is None:
        return None
    kind, where = VOCABULARIES[name], f"{ckpt.label}: {name}"
    data = ckpt.files[name].read()  # once: that of a GGUF file is made, of all its merges
    if kind is FileKind.SENTENCEPIECE_OR_RANKS:
        kind = FileKind.RANKS if looks_like_ranks(data) else FileKind.SENTENCEPIECE
    document = read_tokenizer_json(name, data, where) if kind in (FileKind.FAST, FileKind.VOCABULARY) else {}
    words, n_model = _kind_and_size(kind, document, data, where)
    before, after = _added_by_code(settings, name, data) if kind is not FileKind.FAST else (0, 0)
    n_model += before
    listed = added_tokens(_json(ckpt, "added_tokens.json"), settings, document if kind is FileKind.FAST else None)
    added = [i for i in {*listed, *range(n_model, n_model + after)} if i >= n_model]
    return Vocabulary(name, words, max([n_model, *(i + 1 for i in added)]), len(added), has_template)


def _kind_and_size(kind: FileKind, document: Mapping[str, Any], data: bytes, where: str) -> tuple[str, int]:
    """What a vocabulary is, in words, and the number of ids of its file."""
    if kind is FileKind.FAST:
        vocab = document["model"]["vocab"]
        ids: Iterable[int] = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return str(document["model"].get("type") or "fast tokenizer"), max(ids, default=-1) + 1
    if kind is FileKind.VOCABULARY:
        return "BPE", max(document.values(), default=-1) + 1
    if kind is FileKind.RANKS:
        return "tiktoken", len(data.split(b"\n")) - 1
    if kind is FileKind.WORDS:
        return "word list", len(data.splitlines())
    if kind is FileKind.BYTE_STRINGS:
        last = data.rstrip().rsplit(b"\n", 1)[-1].split(b" ", 1)[0]
        if not last.isdigit() or len(last) > len(str(MOST_IDS)):
            raise InputError(f"{where}: the last line does not begin with an id: {last[:40]!r}")
        return "byte trie", int(last) + 1
    try:
        return "SentencePiece", count_pieces(data)
    except IndexError as error:
        raise InputError(f"{where} is truncated or no SentencePiece model") from error


def _added_by_code(config: Mapping[str, Any], name: str, data: bytes) -> tuple[int, int]:
    """What the code of a published tokenizer adds: ids before the file's first, special tokens after its last."""
    kind = choose_kind(config, {name: data})
    if kind is None:
        return 0, 0
    key = kind.offset_key if isinstance(kind, SentencePieceFile) else None
    offset = config.get(key) if key is not None else 0
    return offset if isinstance(offset, int) else 0, len(kind.specials)


def _json(ckpt: Checkpoint, name: str) -> Mapping[str, Any]:
    if name not in ckpt.files:
        return {}
    return read_tokenizer_json(name, ckpt.files[name].read(), f"{ckpt.label}: {name}")


def count_pieces(data: bytes) -> int:
    """The number of pieces of a SentencePiece model: its ModelProto's repeated field 1.

    Raises:
        IndexError: the data ends within a field.
    """
    return sum(f.number == 1 for f in read_fields(data))
