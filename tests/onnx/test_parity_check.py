"""The tolerance of the check after an export follows models that magnify rounding, and no further."""

from __future__ import annotations

import pytest
import torch
from tiny_graphs import PLUGINS

from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.onnx import parity

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")


class Magnifying:
    """A decoder whose logits depend on whether there is a mask: rounding, made large."""

    def __init__(self, decoder, by):
        self.model, self._decoder, self._by = decoder.model, decoder, by
        self.new_cache = decoder.new_cache

    def __call__(self, ids, cache=None, mask=None):
        return self._decoder(ids, cache, mask) + (self._by if mask is not None else 0.0)


def decoder():
    return load_decoder(random_checkpoint(PLUGINS["llama"], PLUGINS["llama"].tiny_config(None)))


def test_a_plain_decoder_agrees_with_itself():
    assert parity.own_difference(decoder()) < 1e-5


@pytest.mark.parametrize(("by", "tolerance"), [(0.0, 1e-4), (5e-4, 2e-3), (1.0, 1e-2)])
def test_tolerance(by, tolerance, monkeypatch, tmp_path):
    from llmkit.api import save
    from llmkit.onnx.export import export

    ckpt = random_checkpoint(PLUGINS["llama"], PLUGINS["llama"].tiny_config(None))
    save(export(ckpt), tmp_path / "out")
    scale = max(1.0, float(decoder()(torch.zeros(1, 1, dtype=torch.long)).abs().max()))
    monkeypatch.setattr(parity, "load_decoder", lambda c: Magnifying(load_decoder(c), by * scale))
    checked = parity.check_folder(tmp_path / "out", ckpt, dtype="float32")
    assert checked.tolerance == pytest.approx(tolerance, rel=0.9)
    assert checked.tolerance <= 1e-2
    assert bool(checked.failed) == (by == 1.0)
