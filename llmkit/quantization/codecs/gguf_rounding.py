"""Blocks of 32 weights made by plain rounding, with the bits of the gguf library (which are ggml's).

    Q8_0          d = max |w| / 127                        q = w / d, halves away from zero
    Q4_0, Q5_0    d = w of the largest |w| / -2^(bits-1)   code = trunc(w / d + 2^(bits-1) + 1/2)
    Q4_1, Q5_1    d = (max - min) / (2^bits - 1), e = min  code = trunc((w - e) / d + 1/2)

Source: `quantize_blocks` in gguf/quants.py of ggml-org/llama.cpp; every division by d is a product with float32 1 / d.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.lazy_imports import torch
from llmkit.quantization.codecs.gguf_grids import BlockGrid
from llmkit.quantization.codecs.gguf_search import Blocks

_N_CHUNK = 2**17  # weights at work: few enough that a core has them near


def rounded(weight: torch.Tensor, grid: BlockGrid) -> Iterator[Blocks]:
    """The blocks of float32 weights [rows, in], of a type without integers beside its scales, some at a time."""
    round_all = _round_signed if grid.bits == 8 else _round_centred if grid.e is None else _round_between
    for blocks in weight.reshape(-1, grid.block).split(_N_CHUNK // grid.block):
        codes, *halves = round_all(blocks, 1 << (grid.bits - 1))
        yield Blocks(codes, tuple(half.half() for half in halves), None)


def _round_signed(x: torch.Tensor, half: int) -> tuple[torch.Tensor, ...]:
    """Codes and d of blocks [blocks, weights]."""
    d = torch.maximum(x.amax(-1).abs_(), x.amin(-1).abs_()) / (half - 1)
    scaled = x * _inverse(d)
    q = (scaled * 2).trunc_().sub_(scaled.trunc_())
    return q.add_(half).to(torch.uint8), d


def _round_centred(x: torch.Tensor, half: int) -> tuple[torch.Tensor, ...]:
    """Likewise."""
    high, low = x.amax(-1), x.amin(-1)
    extreme = torch.where(high > -low, high, low)
    both = (high == -low).nonzero().view(-1)  # the first of them is divided by
    of_both = x[both]
    extreme[both] = of_both.gather(1, of_both.abs().argmax(1, keepdim=True)).squeeze(1)
    d = extreme / -half
    return (x * _inverse(d)).add_(half + 0.5).to(torch.uint8).clamp_(max=2 * half - 1), d


def _round_between(x: torch.Tensor, half: int) -> tuple[torch.Tensor, ...]:
    """Likewise, and e."""
    high, low = x.amax(-1), x.amin(-1)
    d = (high - low) / (2 * half - 1)
    return (x - low.unsqueeze(-1)).mul_(_inverse(d)).add_(0.5).to(torch.uint8).clamp_(max=2 * half - 1), d, low


def _inverse(d: torch.Tensor) -> torch.Tensor:
    """1 / d, 0 for a d of 0; [blocks, 1]."""
    return d.reciprocal().masked_fill_(d == 0, 0).unsqueeze(-1)
