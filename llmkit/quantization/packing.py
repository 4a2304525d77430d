"""Small integers in int32 words, as compressed-tensors stores them.

A word holds 32 // bits values, the first in the lowest bits. Each is stored as value + 2^(bits-1), so that -8…7 becomes
0…15. Weights are packed along the input columns, zero points along the output rows:

    weight_packed      [out, ceil(in / per_word)]
    weight_zero_point  [ceil(out / per_word), groups]

A last word that is not full is filled up with zero bits.

Source: compressed_tensors/compressors/pack_quantized/helpers.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["n_words", "pack", "unpack"]


def n_words(n: int, bits: int) -> int:
    """Words that `n` values take."""
    return -(-n // (32 // bits))


def pack(values: torch.Tensor, bits: int, *, dim: int = 1) -> torch.Tensor:
    """An int8 matrix of values -2^(bits-1) … 2^(bits-1)-1 as int32 words along `dim` (0 or 1).

    Works on the bytes in registers of two: flip the sign bit (which adds the offset), then move the second nibble
    beside the first. No loop over elements and no gather, and a machine that stores low bytes first is assumed, as
    everywhere in safetensors.
    """
    import torch

    if dim == 0:
        return pack(values.t(), bits).t().contiguous()
    missing = -values.shape[1] % (32 // bits)
    if missing:
        values = torch.nn.functional.pad(values, (0, missing), value=-(1 << (bits - 1)))
    # Flat, because torch leaves odd strides on dimensions of length 1, and then refuses to view bytes as words.
    flat, n_rows = values.contiguous().view(-1), values.shape[0]
    if bits == 8:
        return flat.view(torch.uint8).bitwise_xor(0x80).view(torch.int32).view(n_rows, -1)
    pairs = flat.view(torch.int16).bitwise_xor(0x0808).bitwise_and_(0x0F0F)
    pairs.bitwise_or_(pairs >> 4)
    return pairs.to(torch.uint8).view(torch.int32).view(n_rows, -1)


def unpack(words: torch.Tensor, bits: int, n: int, *, dim: int = 1) -> torch.Tensor:
    """The first `n` values along `dim` of int32 words, as int8."""
    import torch

    if dim == 0:
        return unpack(words.t(), bits, n).t().contiguous()
    n_rows = words.shape[0]
    stored = words.contiguous().view(-1).view(torch.uint8)
    if bits == 8:
        return stored.view(n_rows, -1)[:, :n].bitwise_xor(0x80).view(torch.int8)
    values = torch.empty((*stored.shape, 2), dtype=torch.int8)
    values[:, 0] = stored & 0x0F
    values[:, 1] = stored >> 4
    return values.sub_(8).view(n_rows, -1)[:, :n]
