"""Recordings of the families that transformers does not have: ids, and the logits of their original implementations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.decoder.kv import KVCache

GOLDEN = Path(__file__).with_name("golden")
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
