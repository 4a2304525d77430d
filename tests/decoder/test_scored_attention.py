"""Attention with caps, windows, biases and open prefixes, over several blocks of queries, against the plain formula."""

from __future__ import annotations

import pytest
import torch

from llmkit.decoder.kv import Heads, KVCache
from llmkit.decoder.scores import Scores
from llmkit.decoder.sdpa import attend_scored
from llmkit.decoder.selection import Selection


def formula(
    q, k, v, positions, *, scale=1.0, cap=None, window=None, chunk=None, slopes=None, prefix=None, sinks=None, real=None
):
    """The whole [S, T] matrix of scores at once, float64."""
    n_new, n_all = q.shape[2], k.shape[2]
    times = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(times, 1), v.double().repeat_interleave(times, 1)
    scores = q.double() @ k.transpose(2, 3) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if slopes is not None:
        scores = scores + slopes.double()[None, :, None, None] * positions[:, None, None].double()
    query, key = torch.arange(n_all - n_new, n_all)[:, None], torch.arange(n_all)
    seen = (key <= query).expand(q.shape[0], n_new, n_all)
    if window is not None:
        seen = seen & (query - key < window)
    if chunk is not None:
        seen = seen & (query // chunk == key // chunk)
    if prefix is not None:
        seen = seen | (positions < prefix[:, None])[:, None]
    if real is not None:
        seen = seen & real[:, None] | (key == query)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks is None:
        return torch.softmax(scores, -1) @ v
    exponentials = scores.exp()  # the plain sum of gpt-oss' model card: exp(sink) is one more term below the line
    return exponentials / (exponentials.sum(-1, keepdim=True) + sinks.double().exp()[:, None, None]) @ v


def made(n_new, n_all, batch=2):
    gen = torch.Generator().manual_seed(n_new)
    q = torch.randn(batch, 4, n_new, 8, generator=gen)
    k, v = (torch.randn(batch, 2, n_all, 8, generator=gen) for _ in range(2))
    return q, k, v, torch.arange(n_all).expand(batch, n_all)


@pytest.mark.parametrize(("n_new", "n_all"), [(150, 150), (130, 200), (1, 90)])
@pytest.mark.parametrize(
    "case", ["cap", "narrow", "wide", "window-of-one", "slopes", "prefix", "prefix-window", "sinks", "chunk"]
)
def test_blocks_are_the_formula(case, n_new, n_all):
    q, k, v, positions = made(n_new, n_all)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    given = {
        "cap": {"cap": 2.0},
        "narrow": {"window": 5},
        "wide": {"window": 100, "cap": 3.0},
        "window-of-one": {"window": 1},
        "slopes": {"slopes": slopes},
        "prefix": {"prefix": torch.tensor([80, 3])},
        "prefix-window": {"prefix": torch.tensor([80, 3]), "window": 20},
        "sinks": {"sinks": torch.tensor([0.5, -3.0, 4.0, 0.0]), "window": 20},
        "chunk": {"chunk": 70, "window": 50},
    }[case]
    scores = Scores(
        0.3,
        given.get("cap"),
        given.get("window"),
        (lambda p: slopes[:, None] * p[:, None].float()) if "slopes" in given else None,
        given.get("prefix"),
        given.get("sinks"),
        chunk=given.get("chunk"),
    )
    found = attend_scored(q, k, v, scores, positions)
    # A bias of 100 leaves float32 scores 7 digits: 8e-6.
    allowed = 1e-5 if case == "slopes" else 2e-6
    assert (found - formula(q, k, v, positions, scale=0.3, **given)).abs().max() < allowed


@pytest.mark.parametrize("window", [1, 30, 100])
def test_padding_and_windows(window):
    q, k, v, positions = made(140, 140)
    real = torch.ones(2, 140, dtype=torch.bool)
    real[1, :90] = False
    positions = (real.cumsum(-1) - 1).clamp_min(0)
    found = attend_scored(q, k, v, Scores(0.3, window=window), positions, real)
    wanted = formula(q, k, v, positions, scale=0.3, window=window, real=real)
    assert (found - wanted)[real[:, None].expand(2, 4, 140)].abs().max() < 2e-6


def test_a_window_that_hides_nothing_is_none_and_one_that_hides_a_key_is_not():
    scores = Scores(1.0, window=8)
    assert scores.over(8).is_plain
    assert scores.over(9) is scores
    q, k, v, positions = made(9, 9)
    for n in (8, 9):
        cache = KVCache()
        cache.begin(torch.zeros(2, n, dtype=torch.int64), None)
        found = cache.attend(0, Heads(q[:, :, :n], k[:, :, :n], v[:, :, :n]), scores)
        wanted = formula(q[:, :, :n], k[:, :, :n], v[:, :, :n], positions[:, :n], window=8)
        assert (found - wanted).abs().max() < 2e-6


@pytest.mark.parametrize("top_k", [1, 7, 200])
@pytest.mark.parametrize(("n_new", "n_all"), [(150, 150), (130, 200), (1, 90)])
def test_what_an_indexer_chooses(top_k, n_new, n_all):
    """The formula of the DeepSeek-V3.2 report, one query at a time."""
    q, k, v, positions = made(n_new, n_all)
    gen = torch.Generator().manual_seed(5)
    queries, weights = torch.randn(2, n_new, 6, 3, generator=gen), torch.randn(2, n_new, 6, generator=gen)
    found = attend_scored(q, k, v, Scores(0.3, selection=Selection(queries, weights, top_k)), positions)
    for row, i in [(0, 0), (1, n_new - 1), (0, n_new // 2)]:
        own = n_all - n_new + i
        keys = k[row, 0, : own + 1, -3:].double()
        scores = weights[row, i].double() @ (queries[row, i].double() @ keys.T).relu()
        best = scores.topk(min(top_k, own + 1)).indices
        for head in range(4):
            shares = (k[row, head // 2, best].double() @ q[row, head, i].double() * 0.3).softmax(0)
            assert (found[row, head, i] - shares @ v[row, head // 2, best].double()).abs().max() < 2e-6
