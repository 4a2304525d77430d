"""Packing equals compressed-tensors', and unpacking undoes it."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.quantization.packing import n_words, pack, unpack


def _values(rows: int, cols: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, cols), dtype=torch.int8, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 70), st.sampled_from([4, 8]), st.sampled_from([0, 1]), st.integers(0, 999))
def test_words_are_those_of_compressed_tensors_and_unpack_undoes_pack(rows, cols, bits, dim, seed):
    values = _values(rows, cols, bits, seed)
    words = pack(values, bits, dim=dim)
    assert torch.equal(words, pack_to_int32(values, bits, packed_dim=dim))
    assert words.shape[dim] == n_words(values.shape[dim], bits)
    assert torch.equal(unpack(words, bits, values.shape[dim], dim=dim), values)
    assert torch.equal(
        unpack(words, bits, values.shape[dim], dim=dim), unpack_from_int32(words, bits, values.shape, dim)
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_layout_of_one_word(bits):
    """Lowest bits first, offset by half the range; written out by hand."""
    half, per_word = 1 << (bits - 1), 32 // bits
    values = torch.arange(per_word, dtype=torch.int8).sub(half).view(1, -1)
    expected = sum(i << (bits * i) for i in range(per_word))
    assert pack(values, bits).item() == (expected if expected < 2**31 else expected - 2**32)


def test_pack_leaves_its_input_alone_and_takes_strided_views():
    values = _values(16, 24, 4, 0)
    before = values.clone()
    assert torch.equal(pack(values.t(), 4), pack(values.t().contiguous(), 4))
    assert torch.equal(values, before)
