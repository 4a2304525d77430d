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

__all__ = ["n_words", "pack", "pack_into", "unpack"]


def n_words(n: int, bits: int) -> int:
    """Words that `n` values take."""
    return -(-n // (32 // bits))


def pack(values: torch.Tensor, bits: int, *, dim: int = 1) -> torch.Tensor:
    """An int8 matrix of values -2^(bits-1) … 2^(bits-1)-1 as int32 words along `dim` (0 or 1)."""
    import torch

    if dim == 0:
        return pack(values.t(), bits).t().contiguous()
    missing = -values.shape[1] % (32 // bits)
    if missing:
        values = torch.nn.functional.pad(values, (0, missing), value=-(1 << (bits - 1)))
    words = torch.empty((values.shape[0], values.shape[1] * bits // 32), dtype=torch.int32)
    pack_into(words, values.clone(memory_format=torch.contiguous_format), bits)
    return words


def pack_into(words: torch.Tensor, values: torch.Tensor, bits: int) -> None:
    """Pack rows that fill their words, into `words`; both contiguous, and `values` (int8) is scratch afterwards.

    Works on bytes in pairs: flip the sign bit (which adds the offset), then move the second nibble beside the first. No
    loop over elements and no gather. A machine that stores low bytes first is assumed, as everywhere in safetensors.
    """
    import torch

    # Flat, because torch leaves odd strides on dimensions of length 1, and then refuses to view bytes as words.
    flat, into = values.view(-1), words.view(-1).view(torch.uint8)
    if bits == 8:
        torch.bitwise_xor(flat.view(torch.uint8), 0x80, out=into)
        return
    pairs = flat.view(torch.int16).bitwise_xor_(0x0808).bitwise_and_(0x0F0F)
    pairs.bitwise_or_(pairs >> 4)
    into.copy_(pairs)  # keeps the low byte of each pair


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
