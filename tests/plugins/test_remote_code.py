"""Families whose class is remote code elsewhere: logits that their original code gave, in torch and ONNX Runtime."""

from __future__ import annotations

import pytest
from goldens import REMOTE, error, golden, stepwise

from llmkit.api import save
from llmkit.decoder import load_decoder
from llmkit.onnx.export import export
from llmkit.onnx.opening import load_onnx

TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=REMOTE)
def case(request):
    """The checkpoint as it was published, its decoder, the ids and the recorded logits."""
    ckpt, ids, logits = golden(request.param)
    decoder = load_decoder(ckpt)
    assert decoder.model.family == REMOTE[request.param]
    assert not decoder.model.unread.refused
    assert not decoder.model.unread.unknown
    return ckpt, decoder, ids, logits


def test_prefill(case):
    _, decoder, ids, logits = case
    assert error(decoder(ids), logits) <= TOLERANCE


def test_step_by_step(case):
    _, decoder, ids, _ = case
    limit = decoder.exact_sharing_limit or ids.shape[1]
    assert error(stepwise(decoder, ids[:, :limit]), decoder(ids[:, :limit])) <= TOLERANCE


def test_onnx(case, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
    ckpt, decoder, ids, logits = case
    save(export(ckpt), tmp_path / "out")
    exported = load_onnx(tmp_path / "out", threads=1)
    assert error(exported(ids), logits) <= 1e-4
    limit = decoder.exact_sharing_limit or ids.shape[1]
    assert error(stepwise(exported, ids[:, :limit]), decoder(ids[:, :limit])) <= 1e-4
