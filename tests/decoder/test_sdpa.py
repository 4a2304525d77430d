"""Attention over a shared past beside one softmax over all keys, as torch's reference function computes it."""

import pytest
import torch

from llmkit.decoder import sdpa


def reference(q, k, v, scale, n_past, lengths):
    """Each sequence after the same past, by the plain formula in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    outs, start = [], 0
    for n in lengths:
        own = slice(n_past + start, n_past + start + n)
        keys = torch.cat([k[:, :, :n_past], k[:, :, own]], 2)
        values = torch.cat([v[:, :, :n_past], v[:, :, own]], 2)
        hidden = torch.ones(n, n_past + n, dtype=torch.bool).triu(n_past + 1)
        scores = (q[:, :, start : start + n] @ keys.transpose(2, 3) * scale).masked_fill(hidden, float("-inf"))
        outs.append(scores.softmax(-1) @ values)
        start += n
    return torch.cat(outs, 2)


@pytest.mark.parametrize("n_past", [0, 1, 70])
@pytest.mark.parametrize("lengths", [[1], [130], [3, 65, 1, 8]])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_a_past_and_what_continues_it(n_past, lengths, heads, has_gradients):
    torch.manual_seed(len(lengths) + n_past)
    total = n_past + sum(lengths)
    q = torch.randn(1, heads[0], sum(lengths), 16) * 3
    k, v = torch.randn(1, heads[1], total, 16), torch.randn(1, heads[1], total, 16)
    expected = reference(q, k, v, 0.25, n_past, lengths)
    past = (k[:, :, :n_past], v[:, :, :n_past]) if n_past else None
    q.requires_grad_(has_gradients)
    out = sdpa.attend_causal(q, k[:, :, n_past:], v[:, :, n_past:], 0.25, past, lengths)
    assert torch.allclose(out.double(), expected, atol=2e-6)
    if len(lengths) == 1:  # the past may also stand before the new keys, as a cache has it
        assert torch.allclose(sdpa.attend_causal(q, k, v, 0.25).double(), expected, atol=2e-6)


@pytest.mark.parametrize("has_products", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(monkeypatch, dtype, has_products):
    """In float32 where the CPU has no products of half precision: then only the result is rounded."""
    monkeypatch.setattr(sdpa, "product_dtype", lambda device: torch.bfloat16 if has_products else None)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 40, 16).to(dtype) for n in (4, 2, 2))
    past = tuple(torch.randn(2, 2, 30, 16).to(dtype) for _ in range(2))
    every = [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)]
    expected = reference(q, *every, 0.25, 30, [40])
    out = sdpa.attend_causal(q, k, v, 0.25, past)
    assert out.dtype is dtype
    exact = dtype is torch.float16 or not has_products
    assert (out.double() - expected).abs().max() < (0.5 if exact else 2) * torch.finfo(dtype).eps * 2
