"""Logits of the families that transformers does not have, recorded from their original implementations."""

from __future__ import annotations

import json

import pytest
import torch
from goldens import CASES, GOLDEN, error, golden, stepwise

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.decoder.packed import Packed

TOLERANCE = 2e-5


@pytest.fixture(params=CASES)
def case(request):
    """The decoder, its family, the ids and the recorded logits."""
    ckpt, ids, logits = golden(request.param)
    decoder = load_decoder(ckpt)
    assert decoder.model.family == CASES[request.param][0]
    return decoder, ids, logits


def test_prefill(case):
    decoder, ids, logits = case
    assert error(decoder(ids), logits) <= TOLERANCE


def test_step_by_step(case):
    decoder, ids, logits = case
    assert error(stepwise(decoder, ids), logits) <= TOLERANCE


def test_left_padded_in_a_batch(case):
    decoder, ids, logits = case
    n_pad = 3
    longer = torch.cat([ids.flip(-1)[:, :0], torch.zeros(1, n_pad, dtype=ids.dtype), ids], 1)
    other = torch.cat([ids[:, :n_pad], ids], 1)
    mask = torch.ones(2, longer.shape[1], dtype=torch.int64)
    mask[0, :n_pad] = 0
    found = decoder(torch.cat([longer, other]), mask=mask)
    assert error(found[:1, n_pad:], logits) <= TOLERANCE


def test_beside_others_without_padding(case):
    decoder, ids, logits = case
    n = ids.shape[1]
    row = torch.cat([ids[:, :8], ids, ids[:, : n - 1]], 1)
    found = decoder(row, Packed(None, [8, n, n - 1]))
    assert error(found[:, 8 : 8 + n], logits) <= TOLERANCE


def test_a_prompt_without_its_end_is_refused():
    folder = GOLDEN / "chatglm-6b"
    decoder = load_decoder(open_checkpoint(folder))
    config = json.loads((folder / "config.json").read_text())
    from llmkit.errors import InputError

    with pytest.raises(InputError, match=f"no <sop> \\(id {config['bos_token_id']}\\)") as caught:
        decoder(torch.tensor([[5, 6, 7]]))
    assert "[gMASK] <sop>" in caught.value.hint
    with pytest.raises(InputError, match="neither \\[gMASK\\]"):
        decoder(torch.tensor([[5, 6, config["bos_token_id"]]]))


def test_both_masks():
    """[MASK] serves as [gMASK] does; the later code takes [gMASK] where a prompt has both."""
    folder = GOLDEN / "chatglm-6b"
    ckpt = open_checkpoint(folder)
    decoder = load_decoder(ckpt)
    gmask, mask, start = (ckpt.config[k] for k in ("gmask_token_id", "mask_token_id", "bos_token_id"))
    swapped = load_decoder(ckpt.derive(config={**ckpt.config, "gmask_token_id": mask, "mask_token_id": gmask}))
    with_mask = torch.tensor([[5, mask, 7, start, 9]])
    assert torch.equal(decoder(with_mask), swapped(with_mask))
    both = torch.tensor([[5, mask, 7, gmask, start, 9]])
    # Swapping the ids moves the place that answers stand at from 3 to 1.
    assert not torch.allclose(decoder(both), swapped(both), atol=1e-4)
