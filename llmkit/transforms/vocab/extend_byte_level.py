"""Extending a byte-level BPE vocabulary with real merges, and any vocabulary with added tokens."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.errors import RequirementError
from llmkit.tokenization.bpe import apply_bpe, by_rank
from llmkit.tokenization.bundle import TokenizerFiles
from llmkit.tokenization.byte_level import text_of, to_bytes
from llmkit.tokenization.fast import FastTokenizer
from llmkit.tokenization.segment import segmenter, spelled
from llmkit.transforms.vocab.change import Change
from llmkit.transforms.vocab.reach import make_reachable
from llmkit.transforms.vocab.sources import Entry


def extend_bytes(tokenizer: TokenizerFiles, entries: Sequence[Entry]) -> Change:
    """Append tokens and, after all old merges, the merges that make them.

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
        make_reachable(token, token, priority, ids, learn)
    if not all(apply_bpe(t, priority).parts == (t,) for t in new):
        raise RequirementError(f"{tokenizer.label}: some new tokens cannot be reached by merges")  # cannot happen
    n_between = len(new.keys() - set(wanted))
    extended = fast.with_model({**fast.vocab, **new}, list(ranks))
    old_of = (*range(first), *[None] * len(new))
    files = tokenizer.rewritten({i: i for i in range(first)}, fast=extended)
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
    figures = {"tokens": len(old_of), "new_tokens": len(new), "reachable": n_reached, "tested": n_text}
    return Change(old_of, tuple(cut_before(t) for t in new), files, tuple(notes), (), figures)


def _measured(fast: FastTokenizer, new: dict[str, int]) -> tuple[int, int]:
    """Of the new tokens that are valid text: how many there are, and how many their text becomes."""
    texts = [(text, i) for token, i in new.items() if (text := text_of(to_bytes(token))) is not None]
    tokenizer = fast.tokenizer()
    encoded = tokenizer.encode_batch([t for t, _ in texts], add_special_tokens=False)
    return len(texts), sum(e.ids == [i] for e, (_, i) in zip(encoded, texts, strict=True))


def extend_added(tokenizer: TokenizerFiles, words: Sequence[str]) -> Change:
    """Enter words as added tokens: each is matched as a whole, before the text around it is cut."""
    first = tokenizer.n_tokens
    fresh = [w for w in dict.fromkeys(words) if w not in tokenizer.known]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added = {first + i: {"content": w, **plain} for i, w in enumerate(fresh)}
    if tokenizer.kind == "byte_level":
        cut = tokenizer.encoder()
        parts = tuple(tuple(cut(w)) for w in fresh)
    else:
        pieces = segmenter(tokenizer)
        parts = tuple(pieces(spelled(tokenizer, w)) for w in fresh)
    old_of = (*range(first), *[None] * len(fresh))
    files = tokenizer.rewritten({i: i for i in range(first)}, new_added=added)
    notes = (
        f"{len(fresh)} added tokens at ids {first} to {first + len(fresh) - 1} "
        f"({len(words) - len(fresh)} of {len(words)} were there already): each is matched before the text is cut",
    )
    return Change(old_of, parts, files, notes, (), {"tokens": len(old_of), "new_tokens": len(fresh)})
