"""Text to tokens by the rules of lm-eval's `hf` backend, many texts at a time."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from typing import Any

from llmkit.errors import InputError
from llmkit.tokenization.chat import encode_marked, is_marked
from llmkit.tokenization.shared_prefixes import common_length, encode_sharing_prefixes


class Encoder:
    """A transformers tokenizer with lm-eval's rules for the beginning-of-sequence token.

    A text that already begins with the prefix token gets no second one.

    Args:
        tokenizer: a transformers tokenizer.
        is_templated: texts are the tokenizer's chat template's, which spells special tokens.
    """

    def __init__(self, tokenizer: Any, *, is_templated: bool = False) -> None:
        self.tokenizer = tokenizer
        self._options = {"split_special_tokens": False} if is_templated else {}
        eos = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id
        if eos is None and bos is None:
            raise InputError(
                "the tokenizer has neither an end nor a beginning token", hint="name eos_token in tokenizer_config.json"
            )
        self.eos_id: int = eos if eos is not None else bos
        self.prefix_id: int = bos if bos is not None else eos
        self._prefix_text: str = tokenizer.decode([self.prefix_id])

    def encode(self, texts: Sequence[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """Token ids of each text; every distinct text is encoded once. Marked texts are read as such.

        Args:
            texts: any number of texts.
            add_special_tokens: None leaves them to the tokenizer.
        """
        marked = {text: self._marked(text, add_special_tokens) for text in texts if is_marked(text)}
        flags = {text: self._special(text, add_special_tokens) for text in texts if text not in marked}
        ids_of: dict[str, list[int]] = marked
        for flag in (None, True, False):
            some = [text for text, wanted in flags.items() if wanted is flag]
            if some:
                options = self._options | ({} if flag is None else {"add_special_tokens": flag})
                ids_of |= zip(some, encode_sharing_prefixes(self.tokenizer, some, options), strict=True)
        return [ids_of[text] for text in texts]

    def _marked(self, text: str, wanted: bool | None) -> list[int]:
        return encode_marked(self.tokenizer, text, add_special_tokens=wanted is not False)

    def _special(self, text: str, wanted: bool | None) -> bool | None:
        if wanted is not None:
            return wanted
        return False if self._prefix_text and text.startswith(self._prefix_text) else None

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Context and continuation as lm-eval splits them.

        Spaces at the end of a context belong to the continuation; the two are encoded together and cut where the
        context's own tokens end. An empty context becomes the prefix token. Where the tokenizer closes a question with
        tokens after which the answer starts, the continuation is encoded apart, without the space before it.
        """
        if getattr(self.tokenizer, "answers_after_suffix", False):
            heads = self.encode([context for context, _ in pairs])
            tails = self.encode([b.removeprefix(" ") for _, b in pairs], add_special_tokens=False)
            return list(zip(heads, tails, strict=True))
        moved = [_move_spaces(context, continuation) for context, continuation in pairs]
        texts = [context for context, _ in moved if context] + [a + b for a, b in moved if a]
        ids = dict(zip(texts, self.encode(texts), strict=True))
        bare = [b for a, b in moved if not a]
        alone = dict(zip(bare, self.encode(bare, add_special_tokens=False), strict=True))
        encoded = []
        for context, continuation in moved:
            if context:
                head = ids[context]
                encoded.append((head, ids[context + continuation][len(head) :]))
                continue
            tokens = alone[continuation]
            if tokens[:1] == [self.prefix_id]:
                encoded.append((tokens[:1], tokens[1:]))
            else:
                encoded.append(([self.prefix_id], tokens))
        return encoded

    def encode_choices(
        self, contexts: Sequence[str], continuations: Sequence[Sequence[str]]
    ) -> list[tuple[list[int], list[list[int]]]]:
        """Each context with what each of its continuations adds to it when the two are encoded together.

        Where the tokenizer joins the end of a context with a continuation, the context ends before. Where it closes a
        question with tokens after which the answer starts, continuations are encoded apart, without the space before.
        """
        heads = self.encode(contexts)
        if getattr(self.tokenizer, "answers_after_suffix", False):
            bare = [x.removeprefix(" ") for some in continuations for x in some]
            tails = iter(self.encode(bare, add_special_tokens=False))
            return [(head, [next(tails) for _ in some]) for head, some in zip(heads, continuations, strict=True)]
        texts = [context + x for context, some in zip(contexts, continuations, strict=True) for x in some]
        joint = iter(self.encode(texts))
        encoded = []
        for head, some in zip(heads, continuations, strict=True):
            whole = [next(joint) for _ in some]
            shared = min(common_length(tuple(head), tuple(ids)) for ids in whole)
            encoded.append((head[:shared], [ids[shared:] for ids in whole]))
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def eos_text(self) -> str:
        """The end token as text, which is a stop string too."""
        return str(self.tokenizer.decode([self.eos_id], skip_special_tokens=False))


def hash_ids(ids: Sequence[int]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of token ids, as little-endian 64-bit integers."""
    words = array("q", ids)
    if sys.byteorder == "big":
        words.byteswap()
    return hashlib.sha256(words.tobytes()).hexdigest()[:16]


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
