"""Codes of quantized matrices as bytes: two in a byte where they have at most four bits, the first in the low ones.

It is how MatMulNBits has them, how compressed-tensors does (read as int32 words), and how all methods and codecs here
hand them on. Codes count from 0; a grid that is centred on zero has the code 2^(bits-1) there.
"""

from __future__ import annotations

from llmkit.lazy_imports import torch


def width(bits: int) -> int:
    """Bits that a code takes: 4 or 8."""
    return 4 if bits <= 4 else 8


def n_bytes(n: int, bits: int) -> int:
    """Bytes that a row of `n` codes takes."""
    return -(-n * width(bits) // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, uint8 [rows, n], as bytes, uint8 [rows, n_bytes(n)]; missing ones in the last byte are 0."""
    if width(bits) == 8:
        return codes
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    pairs = codes.contiguous().view(-1).view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8).view(len(codes), -1)  # the low byte of each pair


def pack_into(stored: torch.Tensor, signed: torch.Tensor, bits: int) -> None:
    """Pack numbers -2^(bits-1) … 2^(bits-1)-1 (int8 [rows, n], n even for 4 bits) into `stored`; both contiguous.

    `signed` is scratch afterwards. Works on pairs of bytes: flip the sign bit (which adds 2^(bits-1)), then move the
    second code beside the first. A machine that stores low bytes first is assumed, as everywhere in safetensors.
    """
    sign, mask = 1 << (bits - 1), (1 << bits) - 1
    # Flat, because torch leaves odd strides on dimensions of length 1, and then refuses to view bytes as pairs.
    flat, into = signed.view(-1), stored.view(-1)
    if bits == 8:
        torch.bitwise_xor(flat.view(torch.uint8), sign, out=into)
    elif width(bits) == 8:
        into.copy_(flat.view(torch.uint8).bitwise_xor_(sign).bitwise_and_(mask))
    else:
        pairs = flat.view(torch.int16).bitwise_xor_(sign * 0x0101).bitwise_and_(mask * 0x0101)
        into.copy_(pairs.bitwise_or_(pairs >> 4))


def unpack(stored: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The first `n` codes of each row, uint8 [rows, n], of bytes [rows, n_bytes(n)]."""
    if width(bits) == 8:
        return stored[:, :n]
    return torch.stack([stored & 0x0F, stored >> 4], -1).flatten(1)[:, :n]


def n_words(n: int, bits: int) -> int:
    """Int32 words that `n` codes take one after the other."""
    return -(-n * bits // 32)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, uint8 [rows, n], as int32 [rows, n_words(n)]: the bits of all, each code from its lowest, without gaps."""
    n = codes.shape[1]
    if bits == width(bits):
        filled = pack(torch.nn.functional.pad(codes, (0, -n % (32 // bits))), bits)
        return filled.reshape(-1).view(torch.int32).view(len(codes), -1)  # flat: see pack_into
    eight = torch.nn.functional.pad(codes, (0, -n % 32)).view(len(codes), -1, 8).long()
    together = (eight << torch.arange(0, 8 * bits, bits)).sum(-1)  # eight codes are `bits` bytes
    stored = together.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(1).contiguous()
    return stored.view(torch.int32)[:, : n_words(n, bits)].contiguous()


def unpack_words(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The first `n` codes of each row of int32 words, uint8 [rows, n].

    Without gaps, or 32 // bits in a word, which is another number of words where `bits` does not divide 32.
    """
    if words.shape[1] == n_words(n, bits):
        stored = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).contiguous().view(torch.uint8)
        together = torch.nn.functional.pad(stored.view(len(words), -1, bits), (0, 8 - bits)).view(torch.int64)
        count = 8
    else:
        together, count = words.unsqueeze(-1), 32 // bits
    codes = (together >> torch.arange(0, bits * count, bits)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(1)[:, :n]
