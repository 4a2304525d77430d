"""Prefix-shared scores equal those of one plain forward for each sequence."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.evaluation.prefix import Query, count_tokens, pack, share_prefixes

token = st.integers(0, 3)
tails = st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=6)


@st.composite
def query_sets(draw):
    """Sequences grown from each other's beginnings, so that prefixes are shared at several depths."""
    rows = [draw(st.lists(token, min_size=1, max_size=8))]
    for tail in draw(tails):
        stem = draw(st.sampled_from(rows))
        rows.append(stem[: draw(st.integers(0, len(stem)))] + tail)
    queries = []
    for row in rows:
        n = draw(st.integers(1, len(row)))
        queries.append(Query(tuple(row), tuple(draw(st.lists(token, min_size=n, max_size=n)))))
    return queries


def walk(roots):
    pending = list(roots)
    while pending:
        segment = pending.pop()
        yield segment
        pending += segment.children


@given(query_sets(), st.integers(0, 10))
def test_every_target_is_read_once_where_its_own_sequence_runs(queries, cost):
    seen = []
    for segment in walk(share_prefixes(queries, cost)):
        for position, index, slot in segment.reads:
            query = queries[index]
            assert segment.start <= position < segment.stop
            assert position == len(query.tokens) - len(query.targets) + slot
            assert segment.row[: position + 1] == query.tokens[: position + 1]
            seen.append((index, slot))
    assert sorted(seen) == [(i, s) for i, q in enumerate(queries) for s in range(len(q.targets))]


@given(query_sets(), st.integers(0, 10))
def test_children_continue_their_parents(queries, cost):
    for segment in walk(share_prefixes(queries, cost)):
        assert segment.stop > segment.start
        for child in segment.children:
            assert child.parent is segment
            assert child.row[: segment.stop] == segment.row[: segment.stop]


@given(query_sets())
def test_free_forwards_share_every_prefix(queries):
    prefixes = {q.tokens[: n + 1] for q in queries for n in range(len(q.tokens))}
    assert count_tokens(share_prefixes(queries, 0)) == len(prefixes)


@given(query_sets())
def test_dear_forwards_share_only_what_is_the_same_run(queries):
    roots = share_prefixes(queries, 10**6)
    rows = sorted({q.tokens for q in queries})
    # a sequence that another one begins with needs no run of its own
    alone = [a for a, b in pairwise([*rows, ()]) if b[: len(a)] != a]
    assert sorted(s.row for s in roots) == alone
    assert not any(s.children for s in roots)


@pytest.mark.parametrize(("cost", "kept"), [(19, True), (20, False)])
def test_a_shared_stretch_is_kept_when_it_saves_more_than_it_costs(cost, kept):
    stem = tuple(range(10))
    queries = [Query((*stem, 50 + i), (1,)) for i in range(3)]  # 10 tokens, needed three times: saves 20
    roots = share_prefixes(queries, cost)
    assert (len(roots) == 1) is kept
    assert count_tokens(roots) == (13 if kept else 33)


def test_four_one_token_answers_cost_one_sequence():
    queries = [Query((1, 2, 3), (letter,)) for letter in (7, 8, 9, 10)]
    (root,) = share_prefixes(queries)
    assert len(root) == 3
    assert root.reads == [(2, 0, 0), (2, 1, 0), (2, 2, 0), (2, 3, 0)]


def test_sequences_beyond_the_limit_share_nothing_and_stay_whole():
    queries = [Query((*range(20), i), (1,)) for i in range(30, 34)]
    roots = share_prefixes(queries, 0, limit=20)
    assert [len(r) for r in roots] == [21] * 4
    assert all(r.is_whole and not r.children for r in roots)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12))
@settings(max_examples=50)
def test_batches_keep_order_and_hold_no_more_than_they_may(lengths, room):
    segments = share_prefixes([Query((100 + i, *[i] * (n - 1)), (1,)) for i, n in enumerate(lengths)])
    batches = list(pack(segments, room))
    assert [s for batch in batches for s in batch] == segments
    for batch in batches:
        assert len(batch) == 1 or sum(map(len, batch)) <= room
