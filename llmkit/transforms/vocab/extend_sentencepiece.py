"""Extending a SentencePiece vocabulary: pieces appended to tokenizer.model, tokenizer.json made to follow."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.errors import RequirementError, require_choice
from llmkit.tokenization.bpe import apply_bpe, by_score, implied_merges, tied_pairs
from llmkit.tokenization.bundle import TokenizerFiles
from llmkit.tokenization.fast import FastTokenizer
from llmkit.tokenization.parity import compare
from llmkit.tokenization.segment import merge_scores, segmenter
from llmkit.tokenization.sentencepiece_model import SPACE, Piece, SentencePieceModel
from llmkit.transforms.vocab.change import Change
from llmkit.transforms.vocab.extend_byte_level import AddedToken, WholeTokens
from llmkit.transforms.vocab.reach import make_reachable
from llmkit.transforms.vocab.sources import Entry

SCORES = {
    "zero": "0, above every old piece, as Chinese-LLaMA's merge_tokenizers.py does",
    "own": "the score it has in the source, as BELLE does",
    "after": "below every old piece, in the order of the source",
}
_N_PROBES, _PROBE_TOKENS = 500, 8
# Characters that SentencePiece never merges have scores around -1e9; float32 has no room for an order there.
_LOWEST = -1e8


def extend_pieces(
    tokenizer: TokenizerFiles,
    entries: Sequence[Entry],
    scores: str | None,
    *,
    build: bool,
    added: Sequence[AddedToken] = (),
) -> Change:
    """Append the entries whose strings are absent, in their order; every present piece keeps its id.

    Added tokens that stood behind the model's pieces move behind the new ones, with their rows.

    Args:
        scores: a name in `SCORES`; None is `zero` for BPE, `own` for Unigram.
        build: append the pieces between, too, without which BPE never arrives at an entry.
        added: tokens that are matched as a whole, to be put behind all others.

    Raises:
        RequirementError: `own` or Unigram where the scores are not there.
        InputError: no such way to score.
    """
    is_bpe = tokenizer.kind == "sentencepiece"
    rule = scores or ("zero" if is_bpe else "own")
    require_choice("--scores", rule, SCORES)
    if not is_bpe and rule == "zero":
        raise RequirementError(
            f"{tokenizer.label} has a Unigram model: a piece of score 0 has probability 1 and would win everywhere",
            hint="use --scores own",
        )
    old_scores = merge_scores(tokenizer) if is_bpe else _unigrams(tokenizer)
    ids = dict(tokenizer.known)
    fresh = [e for e in {e.token: e for e in entries}.values() if e.token not in ids]
    floor = min((s for t, s in old_scores.items() if len(t) > 1 and s > _LOWEST), default=0.0)
    table, pieces = dict(old_scores), list[Piece]()

    def append(token: str, own_score: float) -> None:
        score = {"zero": 0.0, "own": own_score, "after": floor - 1 - len(pieces)}[rule]
        pieces.append(Piece(token, score))
        table[token] = score
        ids[token] = -1

    n_between = 0
    for entry in fresh:
        if entry.token in ids:  # made on the way to an earlier one
            continue
        if build and is_bpe:
            for character in dict.fromkeys(entry.token):
                if character not in ids and character != entry.token:
                    append(character, entry.score)
                    n_between += 1

            def learn(left: str, right: str, entry: Entry = entry) -> None:
                nonlocal n_between
                n_between += left + right != entry.token
                append(left + right, entry.score)

            make_reachable(entry.token, by_score(table), ids, learn)
        if entry.token not in ids:
            append(entry.token, entry.score)
    return _change(tokenizer, entries, pieces, table, rule, n_between, added)


def _change(
    tokenizer: TokenizerFiles, entries: Sequence[Entry], pieces: list[Piece], table: dict[str, float], rule: str,
    n_between: int, added: Sequence[AddedToken],
) -> Change:  # fmt: skip
    n_model, k = tokenizer.n_model, len(pieces)
    tail = range(n_model, tokenizer.n_tokens)
    whole = WholeTokens.of(tokenizer, added, tokenizer.n_tokens + k, {p.text for p in pieces})
    old_of = (*range(n_model), *[None] * k, *tail, *[None] * len(whole.tokens))
    new_of = {old: new for new, old in enumerate(old_of) if old is not None}
    sp = tokenizer.sp.extended(pieces) if tokenizer.sp is not None else None
    fast = _fast(tokenizer, pieces, table)
    cut = segmenter(tokenizer)
    notes = [
        f"{k} new tokens at ids {n_model} to {n_model + k - 1} ({len(entries) - (k - n_between)} of "
        f"{len(entries)} were there already); score of each: {SCORES[rule]}"
    ]
    figures = {"tokens": len(old_of), "new_tokens": k + len(whole.tokens)}
    if n_between:
        notes.append(f"{n_between} of them are pieces between, without which the others could not be merged")
    if tail:
        moved = ", ".join(t["content"] for i, t in tokenizer.added.items() if i >= n_model)
        notes.append(f"{len(tail)} added tokens move behind the new ones, rows and ids: {moved}"[:300])
    warnings = []
    if tokenizer.kind == "sentencepiece":
        priority = by_score(table)
        n_reached = sum(apply_bpe(p.text, priority).parts == (p.text,) for p in pieces)
        figures["reachable"] = n_reached
        notes.append(f"{n_reached} of the {k} new tokens can be reached by merges")
        if fast is not None:
            warnings += _agreement(sp, tokenizer.sp_name, fast, pieces)
    if fast is None:
        notes.append(f"there is no tokenizer.json; loaders make theirs from {tokenizer.sp_name}")
    files = tokenizer.rewritten(new_of, sp=sp, fast=fast, new_added=whole.tokens)
    parts = (*(cut(p.text) for p in pieces), *whole.parts)
    return Change(old_of, parts, files, (*notes, *whole.notes), tuple(warnings), figures)


def _fast(tokenizer: TokenizerFiles, pieces: Sequence[Piece], table: dict[str, float]) -> FastTokenizer | None:
    fast = tokenizer.fast
    if fast is None:
        return None
    n_model = tokenizer.n_model
    new_ids = {p.text: n_model + i for i, p in enumerate(pieces)}
    if fast.kind == "unigram":
        rows = [(text, score) for text, score in fast.data["model"]["vocab"]] + [(p.text, p.score) for p in pieces]
        return fast.with_unigrams(rows, fast.data["model"].get("unk_id"))
    vocab = {t: i for t, i in fast.vocab.items() if i < n_model} | new_ids
    # Added tokens that stood in the vocabulary of the model too move with their ids.
    vocab |= {t: i + len(pieces) for t, i in fast.vocab.items() if i >= n_model}
    symbols = set(table) | {t for t in vocab if len(t) == 1}
    return fast.with_model(vocab, implied_merges(table, symbols))


def _agreement(
    sp: SentencePieceModel | None, name: str | None, fast: FastTokenizer, pieces: Sequence[Piece]
) -> list[str]:
    """Differences between tokenizer.json and tokenizer.model, measured on strings of new pieces."""
    if sp is None:
        return []
    n_tied = tied_pairs(fast.merges, sp.scores)
    chosen = [p.text.replace(SPACE, " ") for p in pieces]
    probes = ["".join(chosen[i : i + _PROBE_TOKENS]) for i in range(0, len(chosen), _PROBE_TOKENS)][:_N_PROBES]
    special = {
        str(t["content"]) for t in fast.added if t["id"] < len(sp.pieces)
    }  # which the model does not know in text
    difference = compare(sp.encoder(), fast.encoder(), more=probes, without=special)
    if difference is None and not n_tied:
        return []
    measured = "No test text shows it" if difference is None else f"Here {difference}"
    return [
        f"{n_tied} merges have equal scores: SentencePiece takes the leftmost in the text, which tokenizer.json cannot "
        f"say: {name} is exact. {measured}. Where the two must agree on every text, use --scores after (it cuts some "
        "texts otherwise than Chinese-LLaMA's tokenizer)"
    ]


def _unigrams(tokenizer: TokenizerFiles) -> dict[str, float]:
    if tokenizer.sp is not None:
        return dict(tokenizer.sp.scores)
    if tokenizer.fast is not None and isinstance(tokenizer.fast.data["model"]["vocab"], list):
        return {text: float(score) for text, score in tokenizer.fast.data["model"]["vocab"]}
    return {}
