"""The gated delta rule over a sequence: token by token, or in chunks whose updates are solved for at once.

For each head, with the state S [K, V], the key k_t, the value v_t, the decay exp(g_t) and the rate b_t:

    S_t = exp(g_t) S_{t-1} + k_t (b_t (v_t - exp(g_t) S_{t-1}^T k_t))^T,   o_t = S_t^T q_t

Where each channel of a key has a decay of its own (g_t [K]), its row of S is multiplied by its own.
A token with g = 0 and b = 0 leaves the state as it is. Sources: Yang et al. 2024 (arXiv:2406.06484 for the chunks,
arXiv:2412.06464 for the decay), Kimi team 2025 (arXiv:2510.26692 for that of channels).
"""

from __future__ import annotations

from llmkit.lazy_imports import torch

_CHUNK = 64
_CHUNK_OF_CHANNELS = 16  # products of each two tokens are made for each channel


def delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, rate: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs and the state after the last token; one token by itself, more of them in chunks.

    Args:
        q, k: [B, H, S, K] float32.
        v: [B, H, S, V] float32.
        decay: [B, H, S] or [B, H, S, K] float32, g: the logarithm of what the state is multiplied by, at most 0.
        rate: [B, H, S] float32, b.
        state: [B, H, K, V] float32, before the first token.

    Returns:
        [B, H, S, V], and [B, H, K, V].
    """
    if q.shape[2] == 1:
        return recurrent(q, k, v, decay, rate, state)
    return (chunked if decay.ndim == 3 else chunked_by_channel)(q, k, v, decay, rate, state)


def recurrent(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, rate: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`delta_rule` token by token; shapes as there."""
    outputs = []
    left = (decay[..., None] if decay.ndim == 3 else decay).exp()
    for t in range(q.shape[2]):
        key = k[:, :, t, None]
        state = state * left[:, :, t, :, None]
        error = (v[:, :, t, None] - key @ state) * rate[:, :, t, None, None]
        state = state + key.transpose(2, 3) * error
        outputs.append(q[:, :, t, None] @ state)
    return torch.cat(outputs, 2), state


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    rate: torch.Tensor,
    state: torch.Tensor,
    chunk: int = _CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`delta_rule` in chunks of C tokens.

    With G the sums of g from the start of a chunk, the corrections e_t = b_t (v_t - exp(g_t) S_{t-1}^T k_t) of a chunk
    follow from one triangular system, for the state S before it:

        (I + A) E = diag(b) (V - diag(exp(G)) K S),   A_ij = b_i exp(G_i - G_j) k_i.k_j for j < i

    so only the products with S go from chunk to chunk.
    """
    from torch.nn.functional import pad

    length, width = q.shape[2], v.shape[3]
    chunk = min(chunk, length)
    if short := -length % chunk:  # what is appended changes nothing
        q, k, v = (pad(x, (0, 0, 0, short)) for x in (q, k, v))
        decay, rate = (pad(x, (0, short)) for x in (decay, rate))
    q, k, v = (x.unflatten(2, (-1, chunk)) for x in (q, k, v))  # [B, H, N, C, …]
    summed = decay.unflatten(2, (-1, chunk)).cumsum(-1)[..., None]  # G, [B, H, N, C, 1]
    rate = rate.unflatten(2, (-1, chunk))[..., None]

    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    faded = (summed - summed.mT).masked_fill_(later, float("-inf")).exp_()  # exp(G_i - G_j) for j <= i
    scored = k * rate
    system = scored @ k.mT * faded
    since = summed.exp()  # what is left of the state before the chunk
    sides = torch.cat([v * rate, scored * since], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    values, reads = solved.split([width, k.shape[-1]], -1)
    within = q @ k.mT * faded
    q = q * since
    written = (k * (summed[..., -1:, :] - summed).exp()).mT
    left = since[..., -1:, :]

    outputs = torch.empty_like(values)
    for i in range(q.shape[2]):
        error = values[:, :, i] - reads[:, :, i] @ state
        outputs[:, :, i] = q[:, :, i] @ state + within[:, :, i] @ error
        state = state * left[:, :, i] + written[:, :, i] @ error
    return outputs.flatten(2, 3)[:, :, :length], state


def chunked_by_channel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, rate: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunked` with a decay for each channel: A_ij = b_i sum_c exp(G_ic - G_jc) k_ic k_jc.

    Each exponent is at most 0: nothing overflows, however fast a channel decays.
    """
    length = q.shape[2]
    outputs = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for start in range(0, length, _CHUNK_OF_CHANNELS):
        cut = slice(start, min(start + _CHUNK_OF_CHANNELS, length))
        queries, keys, values, b = q[:, :, cut], k[:, :, cut], v[:, :, cut], rate[:, :, cut, None]
        summed = decay[:, :, cut].cumsum(2)  # G
        later = torch.ones(*[summed.shape[2]] * 2, dtype=torch.bool, device=q.device).triu(1)
        between = summed[:, :, :, None] - summed[:, :, None]  # [B, H, C, C, K]
        faded = between.masked_fill_(later[..., None], float("-inf")).exp_() * keys[:, :, None]
        system = (faded @ keys[..., None])[..., 0] * b
        within = (faded @ queries[..., None])[..., 0]
        since = summed.exp()
        sides = torch.cat([values * b, keys * since * b], -1)
        solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
        solved_values, reads = solved.split([v.shape[3], k.shape[3]], -1)
        error = solved_values - reads @ state
        outputs[:, :, cut] = (queries * since) @ state + within @ error
        written = keys * (summed[:, :, -1:] - summed).exp()
        state = state * since[:, :, -1, :, None] + written.mT @ error
    return outputs, state
