"""Exported folders give the logits recorded from the original implementations, whatever op computes attention.

The whole way: the checkpoint as it was published, the folder that `llmkit export` writes, ONNX Runtime.
"""

from __future__ import annotations

import pytest
from goldens import CASES, N_PAD, TOLERANCE, RecordedLogits, error, golden, padded

from llmkit.api import save
from llmkit.errors import RequirementError
from llmkit.onnx.export import ATTENTIONS, export
from llmkit.onnx.opening import load_onnx

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
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


class TestExported(RecordedLogits):
    def test_right_padded_in_a_batch(self, case):
        decoder, ids, logits = case
        rows, mask = padded(ids, is_left=False)
        found = decoder(rows, mask=mask)
        assert error(found[:1, :-N_PAD], logits) <= TOLERANCE
        assert error(found[1:, :-N_PAD], logits) <= TOLERANCE
