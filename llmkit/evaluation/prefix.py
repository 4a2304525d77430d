"""From token sequences to shared prefixes: which stretches of tokens are computed once, and from which they continue.

All sequences are arranged in a radix tree. A node of the tree that is worth it becomes a `Segment` of its own, whose
keys and values are kept while everything below it is computed; a node that is not worth it is dissolved, and its
tokens are repeated in each segment below. Cuts are between tokens, never inside text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llmkit.tokenization.shared_prefixes import common_length

Tokens = tuple[int, ...]

FORWARD_COST = 48
"""What one more forward call costs, in tokens. Measured on SmolLM2-135M, two CPU cores; only speed depends on it."""


@dataclass(frozen=True, slots=True)
class Query:
    """One continuation to score.

    Attributes:
        tokens: the model's input, at least as long as `targets`: its last positions predict them.
        targets: the continuation's tokens, at least one.
    """

    tokens: Tokens
    targets: Tokens

    @property
    def first(self) -> int:
        """The position that predicts the first target."""
        return len(self.tokens) - len(self.targets)


@dataclass(slots=True, eq=False)
class Segment:
    """A stretch of tokens computed once, continuing its parent.

    Attributes:
        row: a sequence that contains it.
        stop: where it ends in that sequence (it starts where its parent stops).
        parent: the segment it continues; None at the beginning of a sequence.
        children: the segments that continue it; their presence means that its keys and values are kept.
        reads: (position, query, slot): target `slot` of query `query` is read at absolute position `position`.
        is_whole: a whole sequence that must not be cut.
    """

    row: Tokens
    stop: int
    parent: Segment | None = None
    children: list[Segment] = field(default_factory=list)
    reads: list[tuple[int, int, int]] = field(default_factory=list)
    is_whole: bool = False

    @property
    def start(self) -> int:
        """Its first position."""
        return self.parent.stop if self.parent is not None else 0

    @property
    def tokens(self) -> Tokens:
        """The tokens to compute."""
        return self.row[self.start : self.stop]

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(slots=True)
class _TreeNode:
    """A node of the radix tree while the sequences below it are being visited."""

    depth: int
    row: Tokens
    segments: list[Segment] = field(default_factory=list)
    complete: list[Tokens] = field(default_factory=list)  # sequences that end at this node


def share_prefixes(
    queries: Sequence[Query], forward_cost: int = FORWARD_COST, limit: int | None = None
) -> list[Segment]:
    """The segments at the beginning of the sequences; the others hang below them.

    A shared stretch becomes a segment of its own when this saves more than `forward_cost` tokens. Every target of
    every query is read exactly once. Sequences longer than `limit` share nothing and stay whole (where a position's
    key depends on the sequence's length, as under dynamic NTK scaling, sharing would change the scores).
    """
    rows = sorted({q.tokens for q in queries})
    wholes = [Segment(row, len(row), is_whole=True) for row in rows if limit is not None and len(row) > limit]
    segment_of = {segment.row: segment for segment in wholes}
    roots = _build([row for row in rows if row not in segment_of], segment_of, forward_cost) + wholes
    for index, query in enumerate(queries):
        segment = segment_of[query.tokens]
        for slot in reversed(range(len(query.targets))):
            position = query.first + slot
            while segment.parent is not None and position < segment.start:
                segment = segment.parent
            segment.reads.append((position, index, slot))
    return roots


def _build(rows: Sequence[Tokens], segment_of: dict[Tokens, Segment], forward_cost: int) -> list[Segment]:
    """Visit sorted rows; a node closes when the next row leaves it, so children always close before parents."""
    root = _TreeNode(0, ())
    path = [root]
    for index, row in enumerate(rows):
        shared = common_length(rows[index - 1], row) if index else 0
        while path[-1].depth > shared:
            node = path.pop()
            if path[-1].depth < shared:
                path.append(_TreeNode(shared, node.row))
            path[-1].segments += _close(node, path[-1].depth, segment_of, forward_cost)
        path.append(_TreeNode(len(row), row, complete=[row]))
    while len(path) > 1:
        node = path.pop()
        path[-1].segments += _close(node, path[-1].depth, segment_of, forward_cost)
    return root.segments


def _close(node: _TreeNode, parent_depth: int, segment_of: dict[Tokens, Segment], forward_cost: int) -> list[Segment]:
    """The segments that stand for a finished node: itself, or, when it is dissolved, those below it."""
    saved = (node.depth - parent_depth) * (len(node.segments) - 1)
    if not node.segments or saved > forward_cost:
        segment = Segment(node.row, node.depth, children=node.segments)
        for child in node.segments:
            child.parent = segment
        segments = [segment]
    else:
        segments = node.segments
    for row in node.complete:
        segment_of[row] = segments[0]
    return segments


def pack(segments: Sequence[Segment], batch_tokens: int, *, whole: bool = False) -> Iterator[list[Segment]]:
    """Segments in their order, as many at a time as `batch_tokens` holds; a longer one comes alone.

    Args:
        whole: each with all that is below it.
    """
    batch: list[Segment] = []
    room = batch_tokens
    for segment in segments:
        n_tokens = count_tokens([segment]) if whole else len(segment)
        if batch and n_tokens > room:
            yield batch
            batch, room = [], batch_tokens
        batch.append(segment)
        room -= n_tokens
    if batch:
        yield batch


def depth_first(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Segments, each followed by all that is below it."""
    pending = [*reversed(segments)]
    while pending:
        segment = pending.pop()
        yield segment
        pending += reversed(segment.children)


def count_tokens(roots: Sequence[Segment]) -> int:
    """How many tokens are computed in all."""
    return sum(map(len, depth_first(roots)))
