"""Phi-3's long contexts: what the releases' configs call them, and lengths that the contract does not reach."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmkit.architecture.registry import default_registry
from llmkit.architecture.scaling import LongRope
from llmkit.decoder.contract import TOLERANCE, random_checkpoint
from llmkit.decoder.load import load_decoder

PHI3 = next(default_registry().load(p) for p in default_registry().plugins if p.name == "phi3")


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_the_first_releases_call_it_otherwise(name):
    """transformers 4 takes `su` and `yarn` for longrope; transformers 5 cannot read them at all."""
    config = PHI3.tiny_config("128k-short")
    config["rope_scaling"] = {**config["rope_scaling"], "type": name}
    scaling = PHI3.bind(config).block.position.scaling
    assert isinstance(scaling, LongRope)
    assert scaling.long_factor[-1] == 21.0
    # sqrt(1 + ln(64 / 32) / ln 32): the published formula
    assert scaling.attention_factor == pytest.approx(1.0954451150103321)


def test_a_stated_factor_wins_over_the_ratio_of_the_contexts():
    config = PHI3.tiny_config("128k-short")
    config["rope_scaling"] = {**config["rope_scaling"], "factor": 32.0}
    assert PHI3.bind(config).block.position.scaling.attention_factor == pytest.approx(2**0.5)


@pytest.mark.parametrize("length", [15, 16, 17, 60])
def test_both_sides_of_the_border(length):
    """The original context is 16 tokens: one more, and every frequency is another."""
    config = PHI3.tiny_config("128k-long")
    ckpt = random_checkpoint(PHI3, config)
    theirs = transformers.Phi3ForCausalLM._from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager"
    ).eval()
    theirs.load_state_dict({n: t.load() for n, t in ckpt.tensors.items()})
    ids = torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        wanted = theirs(ids).logits
    found = load_decoder(ckpt)(ids)
    assert (found - wanted).abs().max() / wanted.abs().max() < TOLERANCE
