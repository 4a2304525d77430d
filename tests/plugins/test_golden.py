"""Logits of the families that transformers does not have, recorded from their original implementations."""

from __future__ import annotations

import json

import pytest
import torch
from goldens import CASES, GOLDEN, RecordedLogits, golden

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder


@pytest.fixture(params=CASES)
def case(request):
    """The decoder, its family, the ids and the recorded logits."""
    ckpt, ids, logits = golden(request.param)
    decoder = load_decoder(ckpt)
    assert decoder.model.family == CASES[request.param][0]
    return decoder, ids, logits


class TestDecoder(RecordedLogits):
    """The torch decoder."""


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
