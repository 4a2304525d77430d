"""Merges that make a token reachable: what BPE must learn so that the token's text becomes the token."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from llmkit.tokenization.bpe import Priority, apply_bpe

# Beyond this many parts the best order of merges is not searched: they are chained from the left.
_MAX_SEARCHED = 16


def make_reachable(
    symbols: Sequence[str],
    priority: Priority,
    vocabulary: Container[str],
    learn: Callable[[str, str], None],
) -> None:
    """Learn merges until BPE makes one symbol of `symbols`, a token's characters.

    BPE is run again after each merge, so that what is learnt is what it will do. Merges learnt later come last in
    priority and cannot undo this: while a token is made, an earlier merge is always possible.

    Args:
        vocabulary: tokens that exist; a merge that makes another one costs an id, and the fewest are made.
        learn: called with the two sides of a merge; must make `priority` know it, last in rank.
    """
    parts = apply_bpe(symbols, priority).parts
    while len(parts) > 1:
        at = _next_pair(parts, vocabulary)
        learn(parts[at], parts[at + 1])
        parts = apply_bpe(symbols, priority).parts


def _next_pair(parts: Sequence[str], vocabulary: Container[str]) -> int:
    """Where the innermost, leftmost merge of the cheapest bracketing stands."""
    n = len(parts)
    if n == 2 or n > _MAX_SEARCHED:
        return 0
    cost: dict[tuple[int, int], int] = {(i, i): 0 for i in range(n)}
    split: dict[tuple[int, int], int] = {}
    for width in range(1, n):
        for i in range(n - width):
            j = i + width
            best = min(range(i, j), key=lambda m, i=i, j=j: cost[i, m] + cost[m + 1, j])  # type: ignore[misc]
            split[i, j] = best
            is_new = width < n - 1 and "".join(parts[i : j + 1]) not in vocabulary
            cost[i, j] = cost[i, best] + cost[best + 1, j] + is_new
    i, j = 0, n - 1
    while j - i > 1:
        middle = split[i, j]
        i, j = (i, middle) if middle > i else (middle + 1, j)
    return i
