"""The size of a tokenizer, from its files alone: no tokenizer library is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.architecture.tokenizers import SentencePieceFile
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError
from llmkit.tokenization.checked import MOST_IDS, read_tokenizer_json
from llmkit.tokenization.published import choose_kind
from llmkit.tokenization.tiktoken_ranks import looks_like_ranks
from llmkit.tokenization.wire import read_fields

__all__ = ["Vocabulary", "count_pieces", "read_vocabulary"]


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

    def __str__(self) -> str:
        added = f" ({self.n_added} added)" if self.n_added else ""
        template = ", chat template" if self.has_chat_template else ""
        return f"{self.kind} ({self.file}), {self.n_tokens} tokens{added}{template}"


def read_vocabulary(ckpt: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a checkpoint, or None when it has no tokenizer files that are known.

    Raises:
        InputError: a tokenizer file is malformed.
    """
    files = ckpt.files
    config = _json(ckpt, "tokenizer_config.json")
    has_template = "chat_template.jinja" in files or "chat_template.json" in files or bool(config.get("chat_template"))
    added = _added_ids(ckpt, config)
    for name, count in (
        ("tokenizer.json", _fast),
        ("20B_tokenizer.json", _fast),
        ("tokenizer.model", _model),
        ("spiece.model", _sentencepiece),
        ("ice_text.model", _sentencepiece),
        ("vocab.json", _vocab_json),
        ("qwen.tiktoken", _tiktoken),
        ("vocab.tiktoken", _tiktoken),
        ("rwkv_vocab_v20230424.txt", _numbered_lines),
        ("vocab.txt", _lines),
    ):
        if name in files:
            kind, n_model, more = count(ckpt, name)
            offset, n_specials = _of_its_code(ckpt, config, name)
            n_model += offset
            more = [*more, *range(n_model, n_model + n_specials)]
            ids = [i for i in {*added, *more} if i >= n_model]
            return Vocabulary(name, kind, max([n_model, *(i + 1 for i in ids)]), len(ids), has_template)
    return None


Counted = tuple[str, int, list[int]]


def _of_its_code(ckpt: Checkpoint, config: Mapping[str, Any], name: str) -> tuple[int, int]:
    """What the code of a published tokenizer adds: ids before the file's first, special tokens after its last."""
    kind = choose_kind(config, {name: ckpt.files[name].read()}) if name != "tokenizer.json" else None
    if kind is None:
        return 0, 0
    key = kind.offset_key if isinstance(kind, SentencePieceFile) else None
    offset = config.get(key) if key is not None else 0
    return offset if isinstance(offset, int) else 0, len(kind.specials)


def _json(ckpt: Checkpoint, name: str) -> Mapping[str, Any]:
    if name not in ckpt.files:
        return {}
    return read_tokenizer_json(name, ckpt.files[name].read(), f"{ckpt.label}: {name}")


def _added_ids(ckpt: Checkpoint, config: Mapping[str, Any]) -> list[int]:
    decoder = config.get("added_tokens_decoder")
    ids = [int(i) for i in decoder if str(i).isdigit()] if isinstance(decoder, dict) else []
    return ids + [i for i in _json(ckpt, "added_tokens.json").values() if isinstance(i, int)]


def _fast(ckpt: Checkpoint, name: str) -> Counted:
    data = _json(ckpt, name)
    model = data.get("model")
    model = model if isinstance(model, dict) else {}
    vocab = model.get("vocab") or []
    ids: Iterable[Any] = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    added = data.get("added_tokens") or []
    more = [t["id"] for t in added if isinstance(t, dict) and isinstance(t.get("id"), int)]
    return str(model.get("type") or "fast tokenizer"), max((int(i) for i in ids), default=-1) + 1, more


def _vocab_json(ckpt: Checkpoint, name: str) -> Counted:
    return "BPE", max((i for i in _json(ckpt, name).values() if isinstance(i, int)), default=-1) + 1, []


def _tiktoken(ckpt: Checkpoint, name: str) -> Counted:
    return "tiktoken", len(ckpt.files[name].read().split(b"\n")) - 1, []


def _model(ckpt: Checkpoint, name: str) -> Counted:
    """tokenizer.model is either; Llama 3 and GLM-4 call their ranks so."""
    return (_tiktoken if looks_like_ranks(ckpt.files[name].read()) else _sentencepiece)(ckpt, name)


def _numbered_lines(ckpt: Checkpoint, name: str) -> Counted:
    last = ckpt.files[name].read().rstrip().rsplit(b"\n", 1)[-1].split(b" ", 1)[0]
    if not last.isdigit() or len(last) > len(str(MOST_IDS)):
        raise InputError(f"{ckpt.label}: the last line of {name} does not begin with an id: {last[:40]!r}")
    return "byte trie", int(last) + 1, []


def _lines(ckpt: Checkpoint, name: str) -> Counted:
    return "word list", len(ckpt.files[name].read().splitlines()), []


def _sentencepiece(ckpt: Checkpoint, name: str) -> Counted:
    try:
        return "SentencePiece", count_pieces(ckpt.files[name].read()), []
    except IndexError as error:
        raise InputError(f"{ckpt.label}: {name} is truncated or no SentencePiece model") from error


def count_pieces(data: bytes) -> int:
    """The number of pieces of a SentencePiece model: its ModelProto's repeated field 1.

    Raises:
        IndexError: the data ends within a field.
    """
    return sum(f.number == 1 for f in read_fields(data))
