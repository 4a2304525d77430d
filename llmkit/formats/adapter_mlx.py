"""LoRA and DoRA adapters of MLX (mlx-lm): `adapters.safetensors`, an adapter_config.json of its own, names of the base.

With `lora_a` [in, r] and `lora_b` [r, out] the update is scale * (lora_a @ lora_b)', where `scale` is the factor itself
and not alpha / r; of an embedding `lora_a` is [V, r] and `lora_b` [r, dim], and the update scale * lora_a @ lora_b.
DoRA has the lengths `m` besides. Source: ml-explore/mlx-lm, mlx_lm/tuner/{lora,dora}.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, RequirementError, listing
from llmkit.formats.adapter import Adapter
from llmkit.formats.adapter_config import number
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.rearrange import transpose

_PARTS = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"}


def is_mlx(config: Mapping[str, Any], tensors: Mapping[str, Lazy]) -> bool:
    """Whether the names, and the config where there is one, are MLX's."""
    return any(n.endswith(".lora_a") for n in tensors) and "peft_type" not in config


def from_mlx(label: str, config: Mapping[str, Any], tensors: Mapping[str, Lazy], *, folder: Path) -> Adapter:
    """An adapter from MLX's config and tensors.

    Raises:
        InputError: no scale, half a pair, or tensors that are none of an adapter.
        RequirementError: updates of stacked experts.
    """
    settings = config.get("lora_parameters")
    scale = number(settings.get("scale")) if isinstance(settings, Mapping) else None
    if scale is None:
        raise InputError(
            f"{label}: an adapter of MLX without lora_parameters.scale in adapter_config.json: how far it moves the "
            "weights is not known",
            hint="copy adapter_config.json from the training run",
        )
    modules: dict[str, dict[str, Lazy]] = {}
    strange = []
    for name, lazy in tensors.items():
        module, _, part = name.rpartition(".")
        if part not in _PARTS:
            strange.append(name)
            continue
        if part != "m" and len(lazy.shape) != 2:
            raise RequirementError(
                f"{label}: {name} is {list(lazy.shape)}: updates of stacked experts in MLX's layout are not merged",
                hint="merge it with mlx_lm.fuse, then use the merged folder",
            )
        is_embedding = module.endswith(("embed_tokens", "wte", "word_embeddings"))
        peft_name = f"lora_embedding_{part[-1].upper()}" if is_embedding and part != "m" else _PARTS[part]
        modules.setdefault(module, {})[peft_name] = lazy if part == "m" else transpose(lazy)
    if strange:
        raise InputError(f"{label}: tensors that are not known in an adapter of MLX: {listing(strange, 3)}")
    stated = {"peft_type": "LORA", **config}
    scaling = dict.fromkeys(modules, scale)
    notes = (f"{label} is an adapter of MLX: scale {scale:g}",)
    return Adapter(label, "LORA", stated, modules, scaling, folder=folder, notes=notes)
