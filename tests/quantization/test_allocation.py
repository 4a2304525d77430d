"""The allocation beside every choice there is."""

from itertools import pairwise, product

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.quantization.allocation import Size, allocate, least_nbytes

SIZES = st.lists(
    st.lists(st.builds(Size, st.integers(1, 40), st.integers(0, 60).map(float)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def totals(sizes, chosen):
    picked = [own[i] for own, i in zip(sizes, chosen, strict=True)]
    return sum(size.nbytes for size in picked), sum(size.error for size in picked)


def best(sizes, budget):
    every = (totals(sizes, chosen) for chosen in product(*(range(len(own)) for own in sizes)))
    return min(error for nbytes, error in every if nbytes <= budget)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SIZES, st.integers(0, 60))
def test_within_one_step_of_the_least_error(sizes, spare):
    budget = least_nbytes(sizes) + spare
    chosen = allocate(sizes, budget)
    nbytes, error = totals(sizes, chosen)
    assert nbytes <= budget
    ordered = [sorted(own, key=lambda size: size.nbytes) for own in sizes]
    step = max((max(a.error - b.error for a in own for b in own) for own in ordered), default=0)
    assert best(sizes, budget) <= error <= best(sizes, budget) + step
    assert allocate(sizes, budget) == chosen


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SIZES, st.integers(0, 60))
def test_optimal_where_the_room_is_used_up_in_convex_steps(sizes, spare):
    convex = [
        [Size(n, sum(range(len(own) - n + 1)) + 0.25 * m) for n in range(len(own))] for m, own in enumerate(sizes)
    ]
    budget = least_nbytes(convex) + spare
    assert totals(convex, allocate(convex, budget))[1] == best(convex, budget)  # steps of one byte always fit


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SIZES)
def test_more_room_is_never_worse(sizes):
    errors = [totals(sizes, allocate(sizes, least_nbytes(sizes) + spare))[1] for spare in (0, 1000)]
    assert all(later <= earlier for earlier, later in pairwise(errors))
    assert errors[-1] == sum(min(size.error for size in own) for own in sizes)
