"""A tokenizer made from one published file, with the part of transformers' interface that is used here.

It differs from transformers in one thing: special tokens are not looked for in text unless that is asked for
(`split_special_tokens=False`, as for the text of a chat template).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from llmkit.lazy_imports import torch
from llmkit.tokenization.file_codecs import Codec

_NO_LIMIT = int(1e30)  # what transformers says of a tokenizer that knows no longest text


class FileTokenizer:
    """Encodes with a codec and adds special tokens.

    Args:
        codec: the vocabulary.
        specials: string -> id of every special token.
        words: string -> id of tokens that were added and are text; they are always looked for, the longest first.
        prefix, suffix: ids around every text.
        answers_after_suffix: the suffix ends the question, and the answer is encoded apart and follows it.
        names: `bos`, `eos`, `pad`, `unk` -> string or None.
        settings: tokenizer_config.json, for the chat template and the longest text.
        padding_side: `left` or `right`.
        name_or_path: for messages and records.
    """

    is_fast = False

    def __init__(
        self,
        codec: Codec,
        *,
        specials: Mapping[str, int],
        words: Mapping[str, int],
        prefix: Sequence[int],
        suffix: Sequence[int],
        answers_after_suffix: bool = False,
        names: Mapping[str, str | None],
        settings: Mapping[str, Any],
        padding_side: str = "left",
        name_or_path: str,
    ) -> None:
        self.codec = codec
        self.specials = dict(specials)
        self.prefix_ids = tuple(prefix)
        self.suffix_ids = tuple(suffix)
        self.answers_after_suffix = answers_after_suffix
        self.bos_token, self.eos_token = names.get("bos"), names.get("eos")
        self.pad_token, self.unk_token = names.get("pad"), names.get("unk")
        self.padding_side = padding_side
        self.name_or_path = name_or_path
        self.chat_template = _default_template(settings.get("chat_template"))
        longest = settings.get("model_max_length")
        self.model_max_length = int(longest) if isinstance(longest, int | float) else _NO_LIMIT
        self.words = dict(words)
        self._string_of = {i: text for text, i in self.specials.items()}
        self._word_of = {i: text for text, i in self.words.items()}
        self._words_in = _any_of(self.words)
        self._tokens_in = _any_of([*self.words, *self.specials])
        self.bos_token_id, self.eos_token_id = self._id(self.bos_token), self._id(self.eos_token)
        self.pad_token_id, self.unk_token_id = self._id(self.pad_token), self._id(self.unk_token)

    def __len__(self) -> int:
        return max([self.codec.n_tokens, *(i + 1 for i in (*self._string_of, *self._word_of))])

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool = True,
        padding: bool = False,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> dict[str, Any]:
        """Ids and mask of a text, or of many.

        Args:
            text: one text, or a list of them.
            add_special_tokens: put the prefix and the suffix around.
            split_special_tokens: a text that spells a special token is only text.
            padding: make the rows of a list as long as the longest.
            return_attention_mask: give `attention_mask` too.
            return_tensors: `pt` for torch tensors.
            verbose: taken for transformers' sake.
        """
        single = isinstance(text, str)
        texts: Iterable[str] = [text] if isinstance(text, str) else text
        rows = [self.encode(t, add_special_tokens, split_special_tokens=split_special_tokens) for t in texts]
        masks = [[1] * len(row) for row in rows]
        if padding:
            rows, masks = self._padded(rows)
        encoding: dict[str, Any] = {"input_ids": rows, "attention_mask": masks}
        if not return_attention_mask:
            del encoding["attention_mask"]
        if return_tensors is not None:
            return {name: torch.tensor(value) for name, value in encoding.items()}
        return {name: value[0] for name, value in encoding.items()} if single else encoding

    def encode(self, text: str, add_special_tokens: bool = True, *, split_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        ids = self._encode_between(text, self._words_in if split_special_tokens else self._tokens_in)
        return self.build_inputs_with_special_tokens(ids) if add_special_tokens else ids

    def build_inputs_with_special_tokens(self, ids: Sequence[int]) -> list[int]:
        """Ids with the prefix and the suffix around them."""
        return [*self.prefix_ids, *ids, *self.suffix_ids]

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of some ids; each stretch between special tokens is decoded on its own."""
        parts = []
        strings = self._string_of | self._word_of
        for is_known, stretch in groupby([ids] if isinstance(ids, int) else ids, strings.__contains__):
            if not is_known:
                parts.append(self.codec.decode([int(i) for i in stretch]))
                continue
            parts += [strings[i] for i in stretch if not (skip_special_tokens and i in self._string_of)]
        return "".join(parts)

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The string of an id, or of each of many."""
        if isinstance(ids, int):
            return self._string_of.get(ids) or self._word_of.get(ids) or self.codec.piece(ids)
        return [self.convert_ids_to_tokens(int(i)) for i in ids]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a string that is one token, or of each of many; the unknown token's where it is none."""
        if isinstance(tokens, str):
            i = self._id(tokens)
            return self.unk_token_id if i is None else i
        return [self.convert_tokens_to_ids(t) for t in tokens]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """`bos_token`, … -> string of those there are, as a chat template reads them."""
        named = {"bos": self.bos_token, "eos": self.eos_token, "pad": self.pad_token, "unk": self.unk_token}
        return {f"{name}_token": text for name, text in named.items() if text is not None}

    def _id(self, token: str | None) -> int | None:
        if token is None:
            return None
        i = self.specials.get(token, self.words.get(token))
        return self.codec.find(token) if i is None else i

    def _encode_between(self, text: str, tokens: re.Pattern[str]) -> list[int]:
        """The ids of a text; what `tokens` finds in it are tokens, what lies between them is encoded on its own."""
        ids: list[int] = []
        start = 0
        for match in tokens.finditer(text):
            ids += self.codec.encode(text[start : match.start()])
            ids.append(self.specials.get(match[0], self.words.get(match[0], 0)))
            start = match.end()
        return ids + self.codec.encode(text[start:])

    def _padded(self, rows: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        pad = next((i for i in (self.pad_token_id, self.unk_token_id, self.eos_token_id) if i is not None), 0)
        longest = max(map(len, rows), default=0)
        filled, masks = [], []
        for row in rows:
            padding, ones = [pad] * (longest - len(row)), [1] * len(row)
            zeros = [0] * len(padding)
            filled.append(padding + row if self.padding_side == "left" else row + padding)
            masks.append(zeros + ones if self.padding_side == "left" else ones + zeros)
        return filled, masks


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of some texts, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _default_template(stated: Any) -> Any:
    """The template, or the one called `default` of several; what is no text is refused where it is rendered."""
    if isinstance(stated, list):
        return next((t.get("template") for t in stated if isinstance(t, dict) and t.get("name") == "default"), None)
    return stated or None
