"""transformers' model of a tiny checkpoint: the reference of the contract."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.decoder.foreign import quiet_transformers, transformers_model
from llmkit.errors import RequirementError
from llmkit.lazy_imports import torch

Reference = Callable[..., "torch.Tensor"]


def reference_logits(architecture: Architecture, config: Mapping[str, Any], ckpt: Checkpoint) -> Reference | None:
    """(ids [B, S], mask [B, S] or None) -> logits of transformers' model with the same weights; None without one."""
    import transformers

    config = dict(architecture.reference_config(config)) if architecture.reference_config else dict(config)
    if "rope_parameters" in config and transformers.__version__.startswith("4."):
        return None  # it would take its defaults for what it does not know
    weights = {n: t.load() for n, t in ckpt.tensors.items()}
    how = architecture.reference_attention
    try:
        model = transformers_model(config, weights, ckpt.label, dtype=torch.float32, attention=how)
    except RequirementError:
        return None
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def logits(ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        more: dict[str, torch.Tensor] = {}
        if mask is not None:
            more["attention_mask"] = mask
            if takes_positions:  # a model left to itself counts padding, too
                more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.inference_mode(), quiet_transformers():
            rows: torch.Tensor = model(ids, **more).logits.float()
        return rows

    return logits
