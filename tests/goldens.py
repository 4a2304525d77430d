"""Recordings of the families that transformers does not have: ids, and the logits of their original implementations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.decoder.kv import KVCache
from llmkit.decoder.packed import Packed

GOLDEN = Path(__file__).with_name("golden")
TOLERANCE = 2e-5
N_PAD = 3
# Folder of recordings -> the plugin, and what its config lacks: the tiny configs of Baichuan 2 leave out the key
# that its published configs have.
CASES = {
    "baichuan-7b": ("baichuan", {}),
    "baichuan-13b": ("baichuan13b", {}),
    "baichuan2-7b": ("baichuan", {"z_loss_weight": 0}),
    "baichuan2-13b": ("baichuan13b", {"z_loss_weight": 0}),
    "chatglm-6b": ("chatglm", {}),
    "chatglm2-6b": ("chatglm2", {}),
    "chatglm3-6b": ("chatglm2", {}),
}
# The same for remote code that the core's kinds carry: folder -> plugin.
REMOTE = {
    "aquila-7b": "aquila",
    "internlm-7b": "internlm",
    "internlm-20b": "internlm",
    "internlm2-7b": "internlm2",
    "minicpm-2b": "minicpm",
    "moss-003": "moss",
    "mpt-7b-storywriter": "mpt",
    "qwen-7b": "qwen",
    "rwkv5-eagle": "rwkv5",
    "rwkv6-finch": "rwkv6",
    "rwkv7-goose": "rwkv7",
    "skywork-13b": "skywork",
    "xverse-13b": "xverse",
    "yi-6b": "yi",
}


def golden(name: str) -> tuple[Checkpoint, torch.Tensor, torch.Tensor]:
    """The checkpoint, the ids [1, S] and the recorded logits [1, S, vocab]."""
    folder = GOLDEN / name
    ckpt = open_checkpoint(folder)
    recorded = np.load(folder / "expected.npz")
    ids, logits = torch.from_numpy(recorded["input_ids"]), torch.from_numpy(recorded["logits"])
    changes = CASES[name][1] if name in CASES else {}
    return ckpt.derive(config={**ckpt.config, **changes}), ids, logits


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit where that is above one."""
    return float((found - wanted).abs().max() / max(1.0, float(wanted.abs().max())))


def stepwise(decoder, ids: torch.Tensor) -> torch.Tensor:
    """Logits of answers token by token; the prompt of a prefix-LM at once, for that is what it sees of itself."""
    cache, prompt = KVCache(), 8
    parts = [decoder(ids[:, :prompt], cache)]
    parts += [decoder(ids[:, i : i + 1], cache) for i in range(prompt, ids.shape[1])]
    return torch.cat(parts, 1)


def padded(ids, *, is_left):
    """The recorded row with padding, beside one that is longer by as much."""
    padding = torch.zeros(1, N_PAD, dtype=ids.dtype)
    row = torch.cat([padding, ids] if is_left else [ids, padding], 1)
    other = torch.cat([ids[:, :N_PAD], ids] if is_left else [ids, ids[:, -N_PAD:]], 1)
    mask = torch.ones(2, row.shape[1], dtype=torch.int64)
    mask[0, slice(0, N_PAD) if is_left else slice(-N_PAD, None)] = 0
    return torch.cat([row, other]), mask


class RecordedLogits:
    """What a decoder computes as recorded; a fixture `case` gives (decoder, ids [1, S], logits [1, S, vocab])."""

    def test_prefill(self, case):
        decoder, ids, logits = case
        assert error(decoder(ids), logits) <= TOLERANCE

    def test_step_by_step(self, case):
        decoder, ids, logits = case
        assert error(stepwise(decoder, ids), logits) <= TOLERANCE

    def test_left_padded_in_a_batch(self, case):
        decoder, ids, logits = case
        rows, mask = padded(ids, is_left=True)
        assert error(decoder(rows, mask=mask)[:1, N_PAD:], logits) <= TOLERANCE

    def test_beside_others_without_padding(self, case):
        decoder, ids, logits = case
        n = ids.shape[1]
        row = torch.cat([ids[:, :8], ids, ids[:, : n - 1]], 1)
        found = decoder(row, Packed(None, [8, n, n - 1]))
        assert error(found[:, 8 : 8 + n], logits) <= TOLERANCE
