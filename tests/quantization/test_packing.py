"""Codes as bytes and as words: words are those of compressed-tensors, and unpacking undoes packing."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.quantization.packing import n_bytes, n_words, pack, pack_into, pack_words, unpack, unpack_words
from tests.quantization.lazies import LIBRARY_HAS_GAPS


def _codes(rows: int, cols: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, cols), dtype=torch.uint8, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(2, 8), st.integers(0, 999))
def test_words_are_those_of_compressed_tensors_and_unpack_undoes_pack(rows, cols, bits, seed):
    codes = _codes(rows, cols, bits, seed)
    signed = (codes.short() - (1 << (bits - 1))).to(torch.int8)
    words = pack_words(codes, bits)
    assert words.shape[1] == n_words(cols, bits)
    if 32 % bits == 0 or not LIBRARY_HAS_GAPS:
        assert torch.equal(words, pack_to_int32(signed, bits))
        assert torch.equal(unpack_from_int32(words, bits, signed.shape), signed)
    assert torch.equal(unpack_words(words, bits, cols), codes)
    gaps = sum(
        torch.nn.functional.pad(codes, (0, -cols % (32 // bits)))[:, i :: 32 // bits].long() << (bits * i)
        for i in range(32 // bits)
    ).to(torch.int32)
    if gaps.shape != words.shape or 32 % bits == 0:  # else they cannot be told apart
        assert torch.equal(unpack_words(gaps, bits, cols), codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 35), st.integers(2, 8), st.integers(0, 999))
def test_bytes(rows, half, bits, seed):
    for cols in (2 * half, 2 * half - 1):
        codes = _codes(rows, cols, bits, seed)
        stored = pack(codes, bits)
        assert stored.shape == (rows, n_bytes(cols, bits))
        assert torch.equal(unpack(stored, bits, cols), codes)
    codes = _codes(rows, 2 * half, bits, seed)
    into = torch.empty(rows, n_bytes(2 * half, bits), dtype=torch.uint8)
    pack_into(into, (codes.short() - (1 << (bits - 1))).to(torch.int8), bits)
    assert torch.equal(into, pack(codes, bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_layout_of_one_word(bits):
    """Lowest bits first; written out by hand. The bytes of a row are those of its words."""
    codes = torch.arange(32 // bits, dtype=torch.uint8).view(1, -1)
    expected = sum(i << (bits * i) for i in range(32 // bits))
    words = pack_words(codes, bits)
    assert words.item() == (expected if expected < 2**31 else expected - 2**32)
    assert torch.equal(words.view(torch.uint8), pack(codes, bits))


def test_pack_leaves_its_input_alone_and_takes_strided_views():
    codes = _codes(16, 24, 4, 0)
    before = codes.clone()
    for way in (pack, pack_words):
        assert torch.equal(way(codes.t(), 4), way(codes.t().contiguous(), 4))
    assert torch.equal(codes, before)
