"""Exported folders give the logits recorded from the original implementations, whatever op computes attention.

The whole way: the checkpoint as it was published, the folder that `llmkit export` writes, ONNX Runtime.
"""

from __future__ import annotations

import pytest
import torch
from goldens import CASES, error, golden, stepwise

from llmkit.api import save
from llmkit.decoder.packed import Packed
from llmkit.errors import RequirementError
from llmkit.onnx.export import ATTENTIONS, export
from llmkit.onnx.opening import load_onnx

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
TOLERANCE = 2e-5
N_PAD = 3
REFUSED = {
    ("chatglm2-6b", "mha"), ("chatglm3-6b", "mha"),  # fewer key heads than query heads
    ("chatglm-6b", "flash"), ("baichuan-13b", "flash"), ("baichuan2-13b", "flash"),  # an open prefix, biases
}  # fmt: skip


@pytest.fixture(scope="module", params=[(n, a) for n in CASES for a in ATTENTIONS], ids="-".join)
def case(request, tmp_path_factory):
    """The decoder of the exported folder, the ids and the recorded logits."""
    name, attention = request.param
    ckpt, ids, logits = golden(name)
    if (name, attention) in REFUSED:
        with pytest.raises(RequirementError, match="this model"):
            export(ckpt, attention=attention)
        pytest.skip(f"{attention} cannot compute {name}, and says so")
    folder = tmp_path_factory.mktemp("golden") / "out"
    save(export(ckpt, attention=attention), folder)
    decoder = load_onnx(folder, threads=1)
    assert decoder.model.family == CASES[name][0]
    return decoder, ids, logits


def test_prefill(case):
    decoder, ids, logits = case
    assert error(decoder(ids), logits) <= TOLERANCE


def test_step_by_step(case):
    decoder, ids, logits = case
    assert error(stepwise(decoder, ids), logits) <= TOLERANCE


def padded(ids, *, is_left):
    """The recorded row with padding, beside one that is longer by as much."""
    padding = torch.zeros(1, N_PAD, dtype=ids.dtype)
    row = torch.cat([padding, ids] if is_left else [ids, padding], 1)
    other = torch.cat([ids[:, :N_PAD], ids] if is_left else [ids, ids[:, -N_PAD:]], 1)
    mask = torch.ones(2, row.shape[1], dtype=torch.int64)
    mask[0, slice(0, N_PAD) if is_left else slice(-N_PAD, None)] = 0
    return torch.cat([row, other]), mask


def test_left_padded_in_a_batch(case):
    decoder, ids, logits = case
    rows, mask = padded(ids, is_left=True)
    assert error(decoder(rows, mask=mask)[:1, N_PAD:], logits) <= TOLERANCE


def test_right_padded_in_a_batch(case):
    decoder, ids, logits = case
    rows, mask = padded(ids, is_left=False)
    found = decoder(rows, mask=mask)
    assert error(found[:1, :-N_PAD], logits) <= TOLERANCE
    assert error(found[1:, :-N_PAD], logits) <= TOLERANCE


def test_beside_others_without_padding(case):
    decoder, ids, logits = case
    n = ids.shape[1]
    row = torch.cat([ids[:, :8], ids, ids[:, : n - 1]], 1)
    found = decoder(row, Packed(None, [8, n, n - 1]))
    assert error(found[:, 8 : 8 + n], logits) <= TOLERANCE
