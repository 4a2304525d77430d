"""The recurrences of state space models over more than one chunk, against plain loops over the tokens in float64."""

from __future__ import annotations

import torch

from llmkit.decoder.mamba import decaying_attention, selective_scan


def test_decaying_attention_over_chunks():
    """Steep decays, too: a chunk's sums of them are large, and their differences must not lose digits."""
    q, k, v = torch.randn(2, 150, 3, 4), torch.randn(2, 150, 3, 4), torch.randn(2, 150, 3, 5)
    decay = -torch.rand(2, 150, 3) * torch.tensor([0.01, 1.0, 30.0])
    start, wanted = torch.randn(2, 3, 4, 5), []
    y, last = decaying_attention(q, k, v, decay, start)
    q, k, v, decay, state = (x.double() for x in (q, k, v, decay, start))
    for t in range(150):
        state = state * decay[:, t, :, None, None].exp() + k[:, t, :, :, None] * v[:, t, :, None]
        wanted.append((q[:, t, :, None] @ state)[:, :, 0])
    torch.testing.assert_close(y.double(), torch.stack(wanted, 1), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(last.double(), state, atol=2e-5, rtol=1e-5)


def test_selective_scan_over_chunks():
    u, step, a = torch.randn(2, 150, 6), torch.rand(2, 150, 6), -torch.rand(6, 4)
    b, c, start, wanted = torch.randn(2, 150, 4), torch.randn(2, 150, 4), torch.randn(2, 6, 4), []
    y, last = selective_scan(u, step, a, b, c, start)
    u, step, a, b, c, state = (x.double() for x in (u, step, a, b, c, start))
    for t in range(150):
        state = state * (step[:, t, :, None] * a).exp() + (step[:, t] * u[:, t])[..., None] * b[:, t, None]
        wanted.append((state @ c[:, t, :, None])[..., 0])
    torch.testing.assert_close(y.double(), torch.stack(wanted, 1), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(last.double(), state, atol=2e-5, rtol=1e-5)
