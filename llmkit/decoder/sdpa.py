"""Scaled dot-product attention in the shapes the caches need, each on the fastest path measured for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmkit.decoder.scores import Scores
from llmkit.lazy_imports import torch
from llmkit.tensors.device import CPU, product_dtype

if TYPE_CHECKING:
    Pair = tuple[torch.Tensor, torch.Tensor]
    Above = tuple[slice, slice]
    """Queries, and the keys that all of them see."""

_BLOCK = 64  # query rows at a time: their scores stay in the cache, and later keys are never touched


def attend_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Every query sees every key. q [B, N, S, H]; k, v [B, K, T, H]; K divides N."""
    from torch.nn.functional import scaled_dot_product_attention

    batch, heads, length, width = q.shape
    if heads == k.shape[1]:
        return scaled_dot_product_attention(q, k, v, scale=scale)
    # Without a mask the queries of one group are just more queries of its key/value head: no key is repeated.
    folded = q.reshape(batch, k.shape[1], -1, width)
    return scaled_dot_product_attention(folded, k, v, scale=scale).view(batch, heads, length, width)


def attend_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    past: Pair | None = None,
    lengths: Sequence[int] | None = None,
    above: Sequence[Above] = (),
) -> torch.Tensor:
    """The S queries are the last of the keys; each sees the keys up to its own.

    Args:
        q: [B, N, S, H].
        k, v: [B, K, T, H], T >= S.
        scale: multiplies the scores.
        past: keys and values before these, [B, K, P, H] each, seen by all.
        lengths: the tokens are several sequences side by side, of so many tokens each (T = S); all continue `past`.
        above: which of these tokens see which others besides, on a CPU.

    What all queries see is computed for all of them at once, what each sequence adds by itself; the two are weighted
    by the sums of their softmaxes. Where gradients are wanted torch's own function computes, which has them.
    """
    if k.shape[2] > q.shape[2]:
        n_seen = k.shape[2] - q.shape[2]
        earlier = k[:, :, :n_seen], v[:, :, :n_seen]
        past = earlier if past is None else (torch.cat([past[0], earlier[0]], 2), torch.cat([past[1], earlier[1]], 2))
        k, v = k[:, :, n_seen:], v[:, :, n_seen:]
    if q.device.type != "cpu" or q.requires_grad:
        return _by_mask(q, k, v, scale, past, lengths)
    dtype, computed = q.dtype, _compute_dtype(q.dtype)
    q, k, v = q.to(computed), k.to(computed), v.to(computed)
    wide = _repeated(k, v, q.shape[1])
    pieces = [t.split(list(lengths or [q.shape[2]]), 2) for t in (q, *wide)]
    own = [_flash(*piece, scale=scale, is_causal=True) for piece in zip(*pieces, strict=True)]
    seen = [(queries, (k[:, :, keys], v[:, :, keys])) for queries, keys in above]
    return _beside(q, own, scale, seen, past).to(dtype)


def attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    past: Pair | None,
    spans: Sequence[slice],
    above: Sequence[Above] = (),
) -> torch.Tensor:
    """A few queries on a CPU; each sees all of `past`, the keys of its own span, and those that `above` says.

    q [B, N, len(spans), H].
    """
    dtype, computed = q.dtype, _compute_dtype(q.dtype)
    q, k, v = q.to(computed), k.to(computed), v.to(computed)
    own = []
    for i, span in enumerate(spans):
        folded = q[:, :, i].reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        out, sums = _flash(folded, k[:, :, span], v[:, :, span], scale=scale)
        own.append((out.reshape(q[:, :, :1].shape), sums.reshape(*q.shape[:2], 1)))
    seen = [(queries, (k[:, :, keys], v[:, :, keys])) for queries, keys in above]
    return _beside(q, own, scale, seen, past).to(dtype)


def _beside(
    q: torch.Tensor, own: Sequence[Pair], scale: float, seen: Sequence[tuple[slice, Pair]], past: Pair | None
) -> torch.Tensor:
    """What queries [B, N, S, H] get of their own keys, outputs and logarithms of sums, of the keys that some of them
    see besides, and of `past`, seen by all."""
    out, sums = (torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in zip(*own, strict=True))
    every = [*seen, *([(slice(None), past)] if past is not None else [])]
    if every:
        out = out.float()
    for queries, (keys, values) in every:
        some, known, before = q[:, :, queries], out[:, :, queries], sums[:, :, queries]
        # Without a mask the queries of one group are just more queries of its key/value head: no key is repeated.
        folded = some.reshape(q.shape[0], keys.shape[1], -1, q.shape[3])
        more, more_sums = _flash(folded, keys.to(q.dtype), values.to(q.dtype), scale=scale)
        more_sums = more_sums.reshape(before.shape)
        known.lerp_(more.reshape(known.shape).float(), torch.sigmoid(more_sums - before).unsqueeze(-1))
        before.copy_(torch.logaddexp(before, more_sums))
    return out


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What attention on a CPU is computed in: half precision in float32 where the CPU has no products of it."""
    return dtype if dtype is product_dtype(CPU) else torch.float32


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, is_causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch's fused CPU kernel, which `scaled_dot_product_attention` calls and whose second result it drops.

    Returns:
        The output [B, N, S, H], and the logarithm of each query's sum of exponentials, [B, N, S] float32.
    """
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    return out, sums


def _by_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, past: Pair | None, lengths: Sequence[int] | None
) -> torch.Tensor:
    product = torch.nn.functional.scaled_dot_product_attention
    outs = []
    pieces = [t.split(list(lengths or [q.shape[2]]), 2) for t in (q, k, v)]
    for queries, keys, values in zip(*pieces, strict=True):
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        keys, values = _repeated(keys, values, q.shape[1])
        new, total = queries.shape[2], keys.shape[2]
        if new == total:
            outs.append(product(queries, keys, values, is_causal=True, scale=scale))
        else:
            visible = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
            outs.append(product(queries, keys, values, attn_mask=visible, scale=scale))
    return torch.cat(outs, 2) if len(outs) > 1 else outs[0]


def attend_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """A query sees the keys for which `visible` [B, 1, S, T] is True."""
    from torch.nn.functional import scaled_dot_product_attention

    k, v = _repeated(k, v, q.shape[1])
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)


def attend_scored(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: Scores,
    positions: torch.Tensor,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention with biases, caps, windows, chunks, sinks or an open prefix, in float32 and in blocks of query rows.

    Args:
        q: [B, N, S, H], the last S of the T tokens.
        k, v: [B, K, T, H].
        scores: how scores are made and which keys are seen.
        positions: [B, T] int64, the position of each key in its own sequence; windows and chunks count by them.
        real: [B, T] bool, False for padding; None for none. A padding token sees itself, so that its row of the
            softmax is not empty (its output is never read).
    """
    batch, heads, length, width = q.shape
    groups, total = k.shape[1], k.shape[2]
    keys, values = k.float().transpose(2, 3), v.float()
    bias = scores.key_bias(positions)[:, :, None] if scores.key_bias is not None else None
    index = torch.arange(total, device=q.device)
    prefix = positions < scores.prefix[:, None] if scores.prefix is not None else None
    # What lies between the tokens of a row takes no room in its window.
    gaps = int((~real & (real.cumsum(-1) > 0)).sum(-1).max()) if real is not None and scores.window is not None else 0
    out = torch.empty(batch, length, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        first, last = total - length + start, total - length + stop
        # Keys that no query of the block sees are not computed with.
        low = max(first - scores.window - gaps + 1, 0) if scores.window is not None and prefix is None else 0
        if scores.chunk is not None and prefix is None and real is None:  # positions are places in the row
            low = max(low, first // scores.chunk * scores.chunk)
        high = last if prefix is None else total
        own, others = index[first:last, None], index[low:high]
        seen = (others <= own)[None]
        if scores.window is not None:
            seen = seen & (positions[:, None, low:high] > positions[:, first:last, None] - scores.window)
        if scores.chunk is not None:
            begins = positions[:, first:last, None] // scores.chunk * scores.chunk
            seen = seen & (positions[:, None, low:high] >= begins)
        if prefix is not None:
            seen = seen | prefix[:, None, low:high]
        if real is not None:
            seen = seen & real[:, None, low:high] | (others == own)
        if scores.selection is not None:
            seen = scores.selection.among(seen.expand(batch, -1, -1), keys[..., low:high], start)
        block = q[:, :, start:stop].float() * scores.scale
        products = (block.reshape(batch, groups, -1, width) @ keys[..., low:high]).view(batch, heads, stop - start, -1)
        if scores.softcap is not None:
            products = scores.softcap * (products / scores.softcap).tanh_()
        if bias is not None:
            products = products + bias[..., low:high]
        products = products.masked_fill_(~seen[:, None], float("-inf"))
        shares = products.softmax(-1) if scores.sinks is None else _beside_sinks(products, scores.sinks)
        attended = shares.view(batch, groups, -1, high - low) @ values[:, :, low:high]
        out[:, :, start:stop] = attended.view(batch, heads, stop - start, width)
    return out


def _beside_sinks(products: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """The softmax of scores [B, heads, S, T] beside one more score for each head, which is dropped then."""
    more = sinks.float()[:, None, None].expand(products.shape[0], -1, products.shape[2], 1)
    return torch.cat([products, more], -1).softmax(-1)[..., :-1]


def _repeated(k: torch.Tensor, v: torch.Tensor, heads: int) -> Pair:
    """Keys and values repeated for the query heads of their group; a single head is seen by all without a copy."""
    times = heads // k.shape[1]
    if times == 1:
        return k, v
    if k.shape[1] == 1:
        return k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
    return k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
