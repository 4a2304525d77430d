"""Byte-pair encoding of single tokens, with its trace, and the merges that a SentencePiece vocabulary implies.

Two readings of "which merge comes next" are in use. SentencePiece merges any two neighbours whose concatenation is a
piece, the largest score first, the leftmost of equal ones. tokenizer.json lists pairs, the earliest first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[str, str]
# The smaller comes first; None is no merge.
Priority = Callable[[str, str], float | None]


@dataclass(frozen=True, slots=True)
class Trace:
    """What BPE made of a string.

    Attributes:
        parts: the symbols that are left.
        made: every symbol that a merge made on the way, in that order.
    """

    parts: tuple[str, ...]
    made: tuple[str, ...]


def apply_bpe(symbols: Iterable[str], priority: Priority) -> Trace:
    """Merge neighbours, best priority first, the leftmost of equal ones, until none is left.

    Merges inside a token do not depend on what stands around it: had one crossed its edge, the token would not be
    there. So the trace of a token alone is its trace in every text.
    """
    parts, merged = list(symbols), []
    while len(parts) > 1:
        best, at = None, -1
        for i in range(len(parts) - 1):
            rank = priority(parts[i], parts[i + 1])
            if rank is not None and (best is None or rank < best):
                best, at = rank, i
        if best is None:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merged.append(parts[at])
    return Trace(tuple(parts), tuple(merged))


def by_score(scores: Mapping[str, float]) -> Priority:
    """SentencePiece's order: the largest score of the concatenation."""

    def priority(left: str, right: str) -> float | None:
        score = scores.get(left + right)
        return None if score is None else -score

    return priority


def by_rank(ranks: Mapping[Pair, int]) -> Priority:
    """The order of a list of merges."""
    return lambda left, right: ranks.get((left, right))


def implied_merges(scores: Mapping[str, float], symbols: Collection[str]) -> list[Pair]:
    """The list of merges that follows a SentencePiece BPE vocabulary, as closely as a list can.

    Every way to cut a piece into two is a merge; larger scores come first. Where scores are equal SentencePiece takes
    the leftmost pair, which depends on the text and which no list can say. The nearest order puts a pair before those
    that begin with the symbol it ends with; its proxy here is how often the left symbol stands on the right in pairs
    of that score. On the 49,953 pieces of Chinese-LLaMA it halves the differing lines that the order of transformers'
    converter leaves (longer parts first), and cuts them to an eighth on English.

    Args:
        scores: piece -> score, of everything a merge can make.
        symbols: what a merge can take: the pieces of `scores` and single characters.
    """
    pairs = [
        (score, text[:i], text[i:])
        for text, score in scores.items()
        for i in range(1, len(text))
        if text[:i] in symbols and text[i:] in symbols
    ]
    on_left = Counter((score, left) for score, left, _ in pairs)
    on_right = Counter((score, right) for score, _, right in pairs)

    def order(item: tuple[float, str, str]) -> tuple[float, float, int, int]:
        score, left, right = item
        n_right = on_right[score, left]
        return (-score, n_right / (n_right + on_left[score, left]), -len(left), -len(right))

    return [(left, right) for _, left, right in sorted(pairs, key=order)]


def tied_pairs(merges: Sequence[Pair], scores: Mapping[str, float]) -> int:
    """How many pairs make a piece that shares its score with another piece that merges make."""
    shared = Counter(scores[text] for text in dict.fromkeys(left + right for left, right in merges))
    return sum(shared[scores[left + right]] > 1 for left, right in merges)


def scores_of_merges(merges: Sequence[Pair]) -> dict[str, float]:
    """Scores under which SentencePiece takes these merges in this order: minus the position of a piece's first."""
    scores: dict[str, float] = {}
    for i, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(i))
    return scores
