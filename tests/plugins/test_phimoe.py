"""PhiMoE's window: a key of config.json that versions of transformers read otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from llmkit.architecture.registry import require
from llmkit.decoder.contract import TOLERANCE, random_checkpoint, random_ids
from llmkit.decoder.foreign import load_transformers
from llmkit.decoder.load import load_decoder


@pytest.mark.parametrize("stated", [True, False])
def test_a_window_counts_whatever_use_sliding_window_says(stated):
    """PhiMoE's config class has no such key, and the models of transformers 5 do not read it.

    4.57 does, in the masks of two of its three attentions; what it computes where the key is false is no one else's.
    """
    phimoe = require({"model_type": "phimoe"}, "phimoe")
    plain = random_checkpoint(phimoe, phimoe.tiny_config("long"))
    ckpt = replace(plain, config={**plain.config, "use_sliding_window": stated})
    ids, decoder = random_ids(phimoe, plain.config), load_decoder(ckpt)
    is_alone = transformers.__version__.startswith("4.") and not stated
    wanted = load_transformers(plain if is_alone else ckpt, torch.float32, torch.device("cpu"))(ids)
    assert (decoder(ids) - wanted).abs().max() / wanted.abs().max() < TOLERANCE
    assert decoder.model.unread.warnings == ()
    without = load_decoder(replace(plain, config={**plain.config, "sliding_window": None}))
    assert (without(ids) - wanted).abs().max() > 0.01
