"""What a family does far from the start of a sequence, where short tests cannot look; against transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmkit.architecture.registry import default_registry
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.kv import KVCache
from llmkit.decoder.load import load_decoder
from llmkit.errors import InputError

N_TOKENS = 700


def tiny(plugin, variant=None):
    architecture = next(default_registry().load(p) for p in default_registry().plugins if p.name == plugin)
    config = architecture.tiny_config(variant)
    return architecture, config, random_checkpoint(architecture, config)


def test_biases_are_rounded_as_the_models_were_trained():
    """Falcon-RW: position 300 times a slope is not representable in bfloat16, nor is position 301 itself."""
    architecture, config, ckpt = tiny("falcon", "rw-1b")
    ids = torch.randint(0, 96, (2, N_TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :150] = 0
    known = {k: v for k, v in config.items() if k != "architectures"}
    theirs = transformers.FalconForCausalLM(transformers.FalconConfig(**known)).eval()
    theirs.load_state_dict({n: t.load() for n, t in ckpt.tensors.items()}, strict=False)
    theirs.tie_weights()
    with torch.inference_mode():
        theirs.set_attn_implementation("sdpa")
        expected = theirs(ids, attention_mask=mask).logits
    decoder = load_decoder(ckpt, architecture=architecture)
    found = decoder(ids, mask=mask)
    scale = expected.abs().max()
    assert (found - expected)[0, 150:].abs().max() <= 1e-5 * scale
    assert (found - expected)[1].abs().max() <= 1e-5 * scale
    cache = KVCache()
    parts = [decoder(ids[1:, :600], cache), *(decoder(ids[1:, i : i + 1], cache) for i in range(600, N_TOKENS))]
    assert (torch.cat(parts, 1) - expected[1:]).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("plugin", ["gpt2", "opt"])
def test_a_sequence_longer_than_the_table_of_positions_is_refused(plugin):
    architecture, _, ckpt = tiny(plugin)
    decoder = load_decoder(ckpt, architecture=architecture)
    assert decoder(torch.zeros(1, 64, dtype=torch.int64)).shape == (1, 64, 96)
    with pytest.raises(InputError, match="65 tokens long; the model has learned positions for 64") as error:
        decoder(torch.zeros(1, 65, dtype=torch.int64))
    assert error.value.hint == "give a shorter text (eval: fewer shots)"
