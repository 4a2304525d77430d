"""Extending a byte-level BPE vocabulary with real merges, and any vocabulary with added tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.errors import RequirementError, counted
from llmkit.tokenization.bpe import apply_bpe, by_rank
from llmkit.tokenization.bundle import TokenizerFiles
from llmkit.tokenization.byte_level import text_of, to_bytes
from llmkit.tokenization.fast import FastTokenizer
from llmkit.tokenization.segment import segmenter, spelled
from llmkit.transforms.vocab.change import Change
from llmkit.transforms.vocab.reach import make_reachable
from llmkit.transforms.vocab.sources import Entry

AddedToken = Mapping[str, Any]
"""As tokenizer.json has it, without its id."""
_MATCHED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def extend_bytes(tokenizer: TokenizerFiles, entries: Sequence[Entry], added: Sequence[AddedToken] = ()) -> Change:
    """Append tokens and, after all old merges, the merges that make them; behind them `added` tokens.

    Old merges keep their order and come first, so a text is cut as before and then new merges join some of the
    pieces: cutting each new token in two again, as its merge says, gives back the old tokens exactly.
    """
    fast = tokenizer.fast
    if fast is None:
        raise RequirementError(f"{tokenizer.label}: merges are added to tokenizer.json, which it does not have")
    first = tokenizer.n_tokens
    ids, ranks = dict(tokenizer.known), {pair: i for i, pair in enumerate(fast.merges)}
    cut_before = segmenter(tokenizer)
    new: dict[str, int] = {}
    wanted = [e.token for e in entries if to_bytes(e.token) is not None]
    n_present = sum(t in ids for t in wanted)

    def learn(left: str, right: str) -> None:
        ranks[left, right] = len(ranks)
        if left + right not in ids:
            ids[left + right] = new[left + right] = first + len(new)

    priority = by_rank(ranks)
    for token in wanted:
        make_reachable(token, priority, ids, learn)
    if not all(apply_bpe(t, priority).parts == (t,) for t in new):
        raise RequirementError(f"{tokenizer.label}: some new tokens cannot be reached by merges")  # cannot happen
    n_between = len(new.keys() - set(wanted))
    extended = fast.with_model({**fast.vocab, **new}, list(ranks))
    whole = WholeTokens.of(tokenizer, added, first + len(new), new)
    old_of = (*range(first), *[None] * (len(new) + len(whole.tokens)))
    files = tokenizer.rewritten({i: i for i in range(first)}, fast=extended, new_added=whole.tokens)
    notes = [
        f"{len(new)} new tokens at ids {first} to {first + len(new) - 1} ({n_present} of {len(wanted)} were there "
        f"already), and {len(ranks) - len(fast.merges)} merges after the {len(fast.merges)} old ones: "
        "text is cut as before, then new merges join pieces"
    ]
    if n_between:
        notes.append(f"{n_between} of them are pieces between, without which the others could not be merged")
    n_text, n_reached = _measured(extended, new)
    notes.append(f"measured: {n_reached} of the {n_text} new tokens that are whole characters come out as one token")
    if n_reached < n_text:
        notes.append(
            f"the other {n_text - n_reached} are cut before merging (they cross a border of the pre-tokenizer)"
        )
    notes += whole.notes
    figures = {
        "tokens": len(old_of),
        "new_tokens": len(new) + len(whole.tokens),
        "reachable": n_reached,
        "tested": n_text,
    }
    return Change(old_of, (*(cut_before(t) for t in new), *whole.parts), files, tuple(notes), (), figures)


def _measured(fast: FastTokenizer, new: dict[str, int]) -> tuple[int, int]:
    """Of the new tokens that are valid text: how many there are, and how many their text becomes."""
    texts = [(text, i) for token, i in new.items() if (text := text_of(to_bytes(token))) is not None]
    tokenizer = fast.tokenizer()
    encoded = tokenizer.encode_batch([t for t, _ in texts], add_special_tokens=False)
    return len(texts), sum(e.ids == [i] for e, (_, i) in zip(encoded, texts, strict=True))


@dataclass(frozen=True)
class WholeTokens:
    """New tokens that are matched as a whole, before the text around them is cut.

    Attributes:
        tokens: id -> description.
        parts: of each the old ids of its old tokenization.
        notes: which ids they have, if there are any.
    """

    tokens: Mapping[int, AddedToken]
    parts: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, tokenizer: TokenizerFiles, wanted: Sequence[AddedToken], first: int, beside: Collection[str] = ()
    ) -> WholeTokens:
        """Those that the tokenizer lacks, with ids from `first` on.

        Args:
            wanted: `content`, and how it is matched where that is not plainly.
            beside: other new tokens.
        """
        matched = {str(t["content"]): {key: t.get(key, plain) for key, plain in _MATCHED.items()} for t in wanted}
        fresh = [text for text in matched if text not in tokenizer.known and text not in beside]
        if tokenizer.kind == "byte_level":
            cut = tokenizer.encoder()
            parts = tuple(tuple(cut(text)) for text in fresh)
        else:
            pieces = segmenter(tokenizer)
            parts = tuple(pieces(spelled(tokenizer, text)) for text in fresh)
        note = (
            f"{counted(len(fresh), 'added token')} at ids {first} to {first + len(fresh) - 1} "
            f"({len(wanted) - len(fresh)} of {len(wanted)} were there already): each is matched before the text is cut"
        )
        tokens = {first + i: {"content": text, **matched[text]} for i, text in enumerate(fresh)}
        return cls(tokens, parts, (note,) if fresh else ())


def extend_added(tokenizer: TokenizerFiles, tokens: Sequence[AddedToken]) -> Change:
    """Enter added tokens: each is matched as a whole, before the text around it is cut."""
    first = tokenizer.n_tokens
    whole = WholeTokens.of(tokenizer, tokens, first)
    old_of = (*range(first), *[None] * len(whole.tokens))
    files = tokenizer.rewritten({i: i for i in range(first)}, new_added=whole.tokens)
    figures = {"tokens": len(old_of), "new_tokens": len(whole.tokens)}
    return Change(old_of, whole.parts, files, whole.notes, (), figures)
