"""States of recurrences: rows padded anywhere and segments side by side give what each sequence gives by itself."""

from __future__ import annotations

import pytest
import torch

from llmkit.decoder.kv import Heads, KVCache
from llmkit.decoder.packed import Packed
from llmkit.decoder.scores import Scores
from llmkit.decoder.states import Rows, Segments, short_convolution

WIDTH, KERNEL = 3, 4
WEIGHT, BIAS = torch.randn(WIDTH, 1, KERNEL), torch.randn(WIDTH)


def convolved(x):
    """Plain PyTorch: zeros before one sequence [T, WIDTH]."""
    padded = torch.nn.functional.pad(x.T[None], (KERNEL - 1, 0))
    return torch.nn.functional.conv1d(padded, WEIGHT, BIAS, groups=WIDTH)[0].T


def run(x, state, real):
    """A short convolution and a running sum, as a recurrence: padding must follow the tokens of its row."""
    if real is not None:
        assert bool((real.int().diff(dim=1) <= 0).all())
        x = x.masked_fill(~real[..., None], float("nan"))  # nothing may be read there
    if state is None:
        state = x.new_zeros(len(x), KERNEL - 1, WIDTH), x.new_zeros(len(x), WIDTH)
    y, window = short_convolution(x, WEIGHT, BIAS, state[0], real)
    terms = x if real is None else x.masked_fill(~real[..., None], 0)
    return torch.cat([y, terms.cumsum(1) + state[1][:, None]], -1), (window, state[1] + terms.sum(1))


def wanted(x):
    return torch.cat([convolved(x), x.cumsum(0)], -1)


@pytest.mark.parametrize(
    "masks",
    [
        ([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], [[1, 1], [1, 1]]),
        ([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], [[1, 0], [0, 1]]),
        ([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0]], [[0, 0], [1, 1]]),
    ],
    ids=["left", "right", "between"],
)
def test_padding_changes_nothing(masks):
    """Two calls, padded in the first and in the second: each row continues its own tokens."""
    state, rows, outputs = None, [[], []], [[], []]
    for mask in masks:
        real = torch.tensor(mask) != 0
        x = torch.randn(2, real.shape[1], WIDTH)
        y, state = Rows(real).run(run, x, state)
        for i in range(2):
            rows[i].append(x[i, real[i]])
            outputs[i].append(y[i, real[i]])
    for row, found in zip(rows, outputs, strict=True):
        torch.testing.assert_close(torch.cat(found), wanted(torch.cat(row)), atol=1e-5, rtol=0)
    window, total = state
    torch.testing.assert_close(total, torch.stack([torch.cat(row).sum(0) for row in rows]), atol=1e-5, rtol=0)
    for i in range(2):
        tokens = torch.cat([torch.zeros(KERNEL - 1, WIDTH), *rows[i]])
        torch.testing.assert_close(window[i], tokens[-KERNEL + 1 :], atol=0, rtol=0)


@pytest.mark.parametrize(
    "lengths", [[7], [3, 3], [9, 1, 8, 2, 9], [4] * 65 + [5] * 65], ids=["one", "two", "five", "many"]
)
def test_segments_continue_one_state(lengths):
    before = torch.randn(5, WIDTH)
    _, state = run(before[None], None, None)
    x = torch.randn(1, sum(lengths), WIDTH)
    y, after = Segments(lengths).run(run, x, state)
    for i, (own, found) in enumerate(zip(x[0].split(lengths), y[0].split(lengths), strict=True)):
        whole = torch.cat([before, own])
        torch.testing.assert_close(found, wanted(whole)[5:], atol=1e-5, rtol=0)
        torch.testing.assert_close(after[1][i], whole.sum(0), atol=1e-5, rtol=0)


def test_a_layer_may_keep_keys_and_a_state():
    """Layers are held by their number: some with keys, some with a state, some with both."""
    cache, x = KVCache(), torch.randn(1, 4, WIDTH)
    keys = torch.randn(1, 2, 4, 8)
    cache.begin(torch.zeros(1, 4, dtype=torch.long), None)
    cache.recur(0, run, x)
    cache.recur(2, run, x)
    cache.attend(2, Heads(keys, keys, keys), Scores(1.0))
    cache.end()
    layers = []
    packed = Packed(cache, [2, 3], keep=True, on_layer=lambda: layers.append(1))
    packed.begin(torch.zeros(1, 5, dtype=torch.long), None)
    more, new = torch.randn(1, 5, WIDTH), torch.randn(1, 2, 5, 8)
    packed.recur(0, run, more)
    packed.recur(2, run, more)
    packed.attend(2, Heads(new, new, new), Scores(1.0))
    assert len(layers) == 2
    other = packed.segment(1)
    assert other.layers == (2,)
    torch.testing.assert_close(other.layer(2)[0], torch.cat([keys, new[:, :, 2:]], 2))
    torch.testing.assert_close(other.state(0)[1], (x.sum(1) + more[:, 2:].sum(1)))
