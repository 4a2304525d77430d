"""Families whose class is remote code elsewhere: logits that their original code gave, in torch and ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from goldens import GOLDEN, REMOTE, error, golden, stepwise

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


def test_a_prompt_that_is_continued_keeps_its_base(tmp_path):
    """Qwen's base follows the length of the prompt: recorded step by step after a prompt that is not a long one."""
    ckpt, ids, _ = golden("qwen-7b")
    wanted = torch.from_numpy(np.load(GOLDEN / "qwen-7b" / "expected.npz")["stepwise"])
    assert error(stepwise(load_decoder(ckpt), ids), wanted) <= TOLERANCE
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
    save(export(ckpt), tmp_path / "out")
    assert error(stepwise(load_onnx(tmp_path / "out", threads=1), ids), wanted) <= 1e-4


def test_onnx(case, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
    ckpt, decoder, ids, logits = case
    save(export(ckpt), tmp_path / "out")
    exported = load_onnx(tmp_path / "out", threads=1)
    assert error(exported(ids), logits) <= 1e-4
    limit = decoder.exact_sharing_limit or ids.shape[1]
    assert error(stepwise(exported, ids[:, :limit]), decoder(ids[:, :limit])) <= 1e-4
