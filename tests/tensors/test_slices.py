"""Slices in which two tensors are read side by side cover both, whatever rows each can be computed in."""

from __future__ import annotations

from math import prod

import pytest
import torch
from safetensors.torch import save_file

from llmkit.formats.folder import read_file
from llmkit.tensors.lazy import Apply
from llmkit.tensors.rearrange import permute_blocks, split_columns, transpose
from llmkit.tensors.slices import common_slices, load_rows
from llmkit.tensors.spec import DType, TensorSpec

ORDER = [2, 0, 1]


@pytest.fixture
def stored(tmp_path):
    state = {"a": torch.arange(24 * 6).reshape(24, 6).float(), "t": torch.arange(6 * 24).reshape(6, 24).float()}
    save_file(state | {"s": torch.tensor(3.0), "e": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    return read_file(tmp_path / "model.safetensors"), state


def test_slices_of_two_tensors_put_together_are_both(stored):
    lazies, state = stored
    a, x = lazies["a"], state["a"]
    packed = Apply("sum", [a], TensorSpec(DType.F32, (12, 6)), lambda x: x[::2] + x[1::2], output_rows=[2], row_step=2)
    pairs = {
        "plain": (a, a, x, x, 12),
        "blocks of rows": (a, permute_blocks(a, ORDER), x, x.view(8, 3, 6)[:, ORDER].reshape(24, 6), 8),
        "only whole": (a, transpose(lazies["t"]), x, state["t"].t(), 1),
        "one of several outputs": (split_columns(a, 2)[1], split_columns(a, 2)[0], x[:, 3:], x[:, :3], 1),
        "rows of another space": (packed.output(), packed.output(), x[::2] + x[1::2], x[::2] + x[1::2], 1),
        "a scalar": (lazies["s"], lazies["s"], torch.tensor(3.0), torch.tensor(3.0), 1),
        "nothing": (lazies["e"], lazies["e"], torch.empty(0, 4), torch.empty(0, 4), 0),
    }
    for name, (one, other, want, wanted, n) in pairs.items():
        slices = common_slices(one, other, 2 * one.spec.row_nbytes)
        assert len(slices) == n, name
        for lazy, right in ((one, want), (other, wanted)):
            pieces = [load_rows(lazy, rows) for rows in slices]
            found = torch.cat([p.reshape(-1) for p in pieces]) if pieces else torch.empty(0)
            assert found.numel() == prod(lazy.shape)
            assert torch.equal(found, right.reshape(-1)), name
