"""transformers' own model of a tiny checkpoint, with which the contract compares ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llmkit.architecture.architecture import Architecture
from llmkit.checkpoint.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

__all__ = ["Reference", "reference_logits"]

Reference = Callable[..., "torch.Tensor"]


def reference_logits(architecture: Architecture, config: Mapping[str, Any], ckpt: Checkpoint) -> Reference | None:
    """(ids [B, S], mask [B, S] or None) -> logits of transformers' model with the same weights; None without one."""
    import torch
    import transformers

    config = dict(architecture.reference_config(config)) if architecture.reference_config else dict(config)
    names = [n for n in config.pop("architectures", ()) if hasattr(transformers, n)]
    if "rope_parameters" in config and transformers.__version__.startswith("4."):
        return None  # it would take its defaults for what it does not know
    if config.get("model_type") not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        return None
    with _quiet(transformers.utils.logging):
        theirs_config = transformers.AutoConfig.for_model(**config)
    auto = transformers.AutoModelForCausalLM._model_mapping
    made = getattr(transformers, names[0]) if names else auto.get(type(theirs_config), None)
    if made is None:
        return None
    with _quiet(transformers.utils.logging):
        # As it reads files: in memory it has other names for some tensors.
        model, report = made.from_pretrained(
            None,
            config=theirs_config,
            state_dict={n: t.load() for n, t in ckpt.tensors.items()},
            attn_implementation=architecture.reference_attention,
            dtype=torch.float32,
            output_loading_info=True,
        )
    left = [m for m in report["missing_keys"] if m not in (model._tied_weights_keys or ())]
    unexpected = list(report["unexpected_keys"])
    if left or unexpected:
        raise ValueError(f"transformers has other names: it lacks {unexpected[:2]}, we lack {left[:2]}")
    model.eval()
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def logits(ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        more: dict[str, torch.Tensor] = {}
        if mask is not None:
            more["attention_mask"] = mask
            if takes_positions:  # a model left to itself counts padding, too
                more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.inference_mode(), _quiet(transformers.utils.logging):
            found: torch.Tensor = model(ids, **more).logits.float()
        return found

    return logits


@contextmanager
def _quiet(logs: Any) -> Iterator[None]:
    """Without transformers' progress bars, and what it says about old configs."""
    is_shown, verbosity = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity_error()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if is_shown:
            logs.enable_progress_bar()
