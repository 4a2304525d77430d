"""Token ids of many texts that begin alike: what a text shares with another is encoded once.

The ids are those of each text encoded by itself. This holds for byte-level BPE behind a splitter: a splitter's regular
expression goes from left to right, and the pieces are encoded each by itself, so that two texts with one beginning have
one beginning of pieces, up to where the expression looks ahead. Other tokenizers encode each text by itself here.
"""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

_LEAST_SHARED = 128  # characters: less is encoded again
_LOOKAHEAD = 32  # characters before the first that differs, in which no cut is made
_SPLITTERS = {"ByteLevel", "Digits", "Split"}
Comparable = TypeVar("Comparable", str, tuple[int, ...])


def encode_sharing_prefixes(tokenizer: Any, texts: Sequence[str], options: Mapping[str, Any]) -> list[list[int]]:
    """Token ids of each text.

    Args:
        tokenizer: a transformers tokenizer.
        texts: distinct ones.
        options: of the tokenizer's call.
    """
    if len(texts) < 2 or not _encodes_pieces(tokenizer, texts, options):
        return _ids(tokenizer(list(texts), return_attention_mask=False, verbose=False, **options))
    found = _shared(tokenizer, sorted(texts), dict(options))
    return [found[text] for text in texts]


def _shared(tokenizer: Any, texts: list[str], options: dict[str, Any]) -> dict[str, list[int]]:
    """The ids of sorted texts: of the first of each group whole, of the others from a cut on."""
    groups = _groups(texts)
    leaders = [group[0] for group in groups]
    encoded = tokenizer(leaders, return_attention_mask=False, verbose=False, **options)
    found = dict(zip(leaders, _ids(encoded), strict=True))
    heads: dict[str, tuple[list[int], str]] = {}
    for group, encoding in zip(groups, encoded.encodings, strict=True):
        leader, *others = group
        cuts = _cuts(leader, encoding) if others else []
        for text in others:
            at = bisect_right(cuts, (common_length(leader, text) - _LOOKAHEAD, len(leader)))
            place, n_tokens = cuts[at - 1] if at else (0, 0)
            if place:
                heads[text] = found[leader][:n_tokens], text[place:]
    if whole := [text for text in texts if text not in found and text not in heads]:
        found |= zip(whole, _ids(tokenizer(whole, return_attention_mask=False, verbose=False, **options)), strict=True)
    if heads:
        tails = _shared(
            tokenizer, sorted({tail for _, tail in heads.values()}), options | {"add_special_tokens": False}
        )
        found |= {text: [*head, *tails[tail]] for text, (head, tail) in heads.items()}
    return found


def common_length(a: Comparable, b: Comparable) -> int:
    """How many leading characters or tokens two sequences share (bisected: slices are compared, not each element)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _groups(texts: Sequence[str]) -> list[list[str]]:
    """Sorted texts, together with the first before them that they share enough with."""
    groups: list[list[str]] = []
    for text in texts:
        if groups and common_length(groups[-1][0], text) >= _LEAST_SHARED:
            groups[-1].append(text)
        else:
            groups.append([text])
    return groups


def _cuts(text: str, encoding: Any) -> list[tuple[int, int]]:
    """(character, tokens before it) where a piece ends in no matter what follows: a word or a sign, before a space."""
    words, ends = encoding.word_ids, [end for _, end in encoding.offsets]
    return [
        (end, at + 1)
        for at, end in enumerate(ends[:-1])
        if words[at] is not None
        and words[at + 1] not in (None, words[at])
        and 0 < end < len(text)
        and text[end].isspace()
        and not text[end - 1].isspace()
    ]


def _encodes_pieces(tokenizer: Any, texts: Sequence[str], options: Mapping[str, Any]) -> bool:
    """Whether pieces are encoded each by itself, and nothing is put in front of a tail or behind a text."""
    from tokenizers.models import BPE
    from tokenizers.normalizers import NFC

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, BPE) or backend.model.dropout:
        return False
    is_plain = backend.normalizer is None or (
        isinstance(backend.normalizer, NFC) and all(unicodedata.is_normalized("NFC", text) for text in texts)
    )
    if not is_plain or backend.pre_tokenizer is None:
        return False
    splitter = json.loads(backend.pre_tokenizer.__getstate__())
    parts = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    if any(part["type"] not in _SPLITTERS or part.get("add_prefix_space") for part in parts):
        return False
    probe = [_ids(tokenizer(["a b"], **(dict(options) | extra)))[0] for extra in ({}, {"add_special_tokens": False})]
    return probe[0][-len(probe[1]) :] == probe[1]


def _ids(encoded: Any) -> list[list[int]]:
    return [list(ids) for ids in encoded["input_ids"]]
