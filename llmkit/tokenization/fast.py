"""tokenizer.json: its kind, vocabulary, merges and added tokens; the same file with other ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmkit.errors import InputError
from llmkit.tokenization.checked import read_tokenizer_json
from llmkit.tokenization.panics import WithoutPanic, without_panic

Pair = tuple[str, str]


@dataclass(frozen=True)
class FastTokenizer:
    """A parsed tokenizer.json.

    Attributes:
        data: the whole document; never changed in place.
    """

    data: Mapping[str, Any]

    @classmethod
    def parse(cls, data: bytes, where: str) -> FastTokenizer:
        """Read the bytes of a tokenizer.json; `where` names them in errors.

        Raises:
            InputError: not a tokenizer.json.
        """
        return cls(read_tokenizer_json("tokenizer.json", data, where))

    def serialized(self) -> bytes:
        """The bytes of the file, without the indentation that makes a megabyte of merges slow to write."""
        return json.dumps(self.data, ensure_ascii=False).encode()

    @property
    def kind(self) -> str:
        """`byte_level` and `sentencepiece` are BPE, `unigram` is SentencePiece's other model; else the model's type."""
        model = self.data["model"]
        name = str(model.get("type") or ("Unigram" if isinstance(model["vocab"], list) else "BPE"))
        if name == "BPE":
            return "byte_level" if self._uses("ByteLevel") else "sentencepiece" if self._is_spaced else "BPE"
        return "unigram" if name == "Unigram" else name

    @property
    def _is_spaced(self) -> bool:
        return bool(self.data["model"].get("byte_fallback")) or self._uses("Metaspace") or "▁" in self.vocab

    def _uses(self, component: str) -> bool:
        pending = [self.data.get(k) for k in ("pre_tokenizer", "decoder")]
        while pending:
            item = pending.pop()
            if isinstance(item, dict):
                if item.get("type") == component:
                    return True
                pending += item.values()
            elif isinstance(item, list):
                pending += item
        return False

    @cached_property
    def vocab(self) -> Mapping[str, int]:
        """Token -> id, of the model (added tokens apart)."""
        vocab = self.data["model"]["vocab"]
        return vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}

    @cached_property
    def merges(self) -> tuple[Pair, ...]:
        """The merges, first to last."""
        listed = self.data["model"].get("merges") or ()
        return tuple(_pair(m) for m in listed)

    @property
    def added(self) -> tuple[Mapping[str, Any], ...]:
        """The entries of added_tokens."""
        return tuple(self.data.get("added_tokens") or ())

    @property
    def n_tokens(self) -> int:
        """Largest id + 1."""
        ids = [*self.vocab.values(), *(t["id"] for t in self.added)]
        return max(ids, default=-1) + 1

    def with_model(self, vocab: Mapping[str, int], merges: Sequence[Pair]) -> FastTokenizer:
        """The same file with another BPE vocabulary; merges are written in the form they had."""
        model = dict(self.data["model"])
        old: Sequence[Any] = model.get("merges") or []
        as_text = bool(old) and isinstance(old[0], str)
        model["vocab"] = dict(vocab)
        model["merges"] = [f"{a} {b}" if as_text else [a, b] for a, b in merges]
        return FastTokenizer({**self.data, "model": model})

    def with_unigrams(self, pieces: Iterable[tuple[str, float]], unk_id: int | None) -> FastTokenizer:
        """The same file with another Unigram vocabulary."""
        model = {**self.data["model"], "vocab": [[text, score] for text, score in pieces], "unk_id": unk_id}
        return FastTokenizer({**self.data, "model": model})

    def with_added(self, added: Iterable[Mapping[str, Any]]) -> FastTokenizer:
        """The same file with other added tokens."""
        return FastTokenizer({**self.data, "added_tokens": [dict(t) for t in added]})

    def renumbered(self, new_of: Mapping[int, int]) -> FastTokenizer:
        """The ids of added tokens, post-processor and padding mapped; added tokens without a new id are left out."""
        data = dict(self.data)
        data["added_tokens"] = [{**t, "id": new_of[t["id"]]} for t in self.added if t["id"] in new_of]
        data["added_tokens"].sort(key=lambda t: t["id"])
        if isinstance(data.get("post_processor"), dict):
            data["post_processor"] = _renumbered(data["post_processor"], new_of)
        padding = data.get("padding")
        if isinstance(padding, dict) and padding.get("pad_id") in new_of:
            data["padding"] = {**padding, "pad_id": new_of[padding["pad_id"]]}
        return FastTokenizer(data)

    @property
    def adds_space(self) -> bool:
        """Whether it puts a space before a text."""
        text = json.dumps([self.data.get("normalizer"), self.data.get("pre_tokenizer")])
        if '"Metaspace"' in text and '"prepend_scheme"' in text:
            return '"Prepend"' in text or '"prepend_scheme": "never"' not in text
        is_spaced = '"add_prefix_space": true' in text or ('"Metaspace"' in text and "add_prefix_space" not in text)
        return '"Prepend"' in text or is_spaced

    def encoder(self) -> Callable[[str], list[int]]:
        """The tokenizers library's own encoder of this file: text -> ids, without bos and eos."""
        encode = WithoutPanic(self.tokenizer().encode)
        return lambda text: list(encode(text, add_special_tokens=False).ids)

    def tokenizer(self) -> Any:
        """The tokenizers library's own tokenizer of this file.

        Raises:
            InputError: the library cannot read it.
        """
        from tokenizers import Tokenizer

        try:
            with without_panic():
                return Tokenizer.from_str(self.serialized().decode())
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise InputError(f"tokenizer.json cannot be read by the tokenizers library: {error}") from error


def _pair(merge: str | list[str]) -> Pair:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _renumbered(item: Any, new_of: Mapping[int, int]) -> Any:
    """Ids in a post-processor: {"ids": [...]} of templates, ["</s>", 2] pairs of the BERT and RoBERTa kinds."""
    if isinstance(item, list):
        if len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], int):
            return [item[0], new_of.get(item[1], item[1])]
        return [_renumbered(x, new_of) for x in item]
    if not isinstance(item, dict):
        return item
    mapped = {k: _renumbered(v, new_of) for k, v in item.items()}
    if isinstance(item.get("ids"), list):
        mapped["ids"] = [new_of.get(i, i) if isinstance(i, int) else i for i in item["ids"]]
    return mapped
