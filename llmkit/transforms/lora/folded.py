"""Parts of LLaMA-Adapter and of lit adapters that can be folded into weights: scales, biases, LoRA pairs, norms.

y = W (scale * x) + bias becomes W' = W * scale[None, :], and the bias is new (OpenGVLab/LLaMA-Adapter, chat65b);
y = scale * (W x + b + bias) becomes W' = scale[:, None] * W, b' = scale * (b + bias) (lit adapter v2). The files have
Meta's names and its order of rotary pairs: for a base with transformers' names, rows of q and k change places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from llmkit.architecture import registry
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import RequirementError
from llmkit.formats.adapter import Adapter
from llmkit.formats.adapter_other import FOLDED
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import permute_blocks
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.transforms.lora import arithmetic

if TYPE_CHECKING:
    import torch

__all__ = ["fold_bias", "fold_scale", "in_base_names", "missing_biases"]

_SLOTS = {
    "attention.wq": "attn.q", "attention.wk": "attn.k", "attention.wv": "attn.v", "attention.wo": "attn.o",
    "feed_forward.w1": "mlp.gate", "feed_forward.w2": "mlp.down", "feed_forward.w3": "mlp.up",
    "attention_norm": "attn_norm", "ffn_norm": "mlp_norm",
}  # fmt: skip
_META = re.compile(r"^layers\.(\d+)\.(.+)$")


def in_base_names(adapter: Adapter, ckpt: Checkpoint) -> Adapter:
    """A folded adapter by the names of the base: as they are where the base has them, else through the slots."""
    if adapter.kind != FOLDED or f"{next(iter(adapter.modules), '')}.weight" in ckpt.tensors:
        return adapter
    architecture = registry.find(ckpt.config) if ckpt.config else None
    if architecture is None or not all(_META.match(m) for m in adapter.modules):
        raise RequirementError(
            f"{adapter.label} names modules such as {next(iter(adapter.modules))}, which {ckpt.label} does not have",
            hint="merge it into a base with the same names",
        )
    model = architecture.bind(ckpt.config)

    def renamed(module: str) -> str:
        found = _META.match(module)
        if found is None or found[2] not in _SLOTS:
            return model.name_of("final_norm.weight").removesuffix(".weight")
        return model.name_of(f"layers.{found[1]}.{_SLOTS[found[2]]}.weight").removesuffix(".weight")

    modules: dict[str, Mapping[str, Lazy]] = {}
    for module, parts in adapter.modules.items():
        heads = {"wq": model.dims.heads, "wk": model.dims.kv_heads}.get(module.rpartition(".")[2])
        modules[renamed(module)] = {
            p: _half_split(t, heads) if heads and p in ("lora_B", "new_bias") else t for p, t in parts.items()
        }
    replacements = {f"{renamed(n.removesuffix('.weight'))}.weight": t for n, t in adapter.replacements.items()}
    scaling = {renamed(m): s for m, s in adapter.scaling.items()}
    return replace(adapter, modules=modules, replacements=replacements, scaling=scaling)


def _half_split(lazy: Lazy, heads: int) -> Lazy:
    """Rows of interleaved rotary pairs in the order that has the first halves of all pairs, then the second."""
    size = lazy.spec.n_rows // heads
    return permute_blocks(lazy, [*range(0, size, 2), *range(1, size, 2)], op="half split")


def fold_scale(weight: Lazy, parts: Mapping[str, Lazy], dtype: DType, name: str) -> Lazy:
    """The weight with the scale of its input or output folded in; the weight itself where there is none."""
    if "scale_in" in parts:
        return arithmetic.scale_columns(weight, parts["scale_in"], dtype, name=name)
    if "scale_out" in parts:
        return arithmetic.scale_rows(weight, parts["scale_out"], dtype, name=name)
    return weight


def fold_bias(bias: Lazy | None, parts: Mapping[str, Lazy], dtype: DType, name: str) -> Lazy | None:
    """The bias after folding; None where there was none and there is none to be."""
    if "new_bias" in parts:
        new = parts["new_bias"]
        return new.cast(dtype) if bias is None else arithmetic.add_vector(bias, new, 1.0, dtype, name=name)
    if "scale_out" not in parts:
        return bias
    inner = parts.get("inner_bias")
    if inner is not None:
        bias = inner if bias is None else arithmetic.add_vector(bias, inner, 1.0, DType.F32, name=name)
    return None if bias is None else arithmetic.scale_rows(bias, parts["scale_out"], dtype, name=name)


def missing_biases(ckpt: Checkpoint, tensors: Mapping[str, Lazy]) -> tuple[dict[str, object], dict[str, Lazy]]:
    """Config keys and zero biases that a base without biases needs, once some of its layers have one."""
    added = [n for n in tensors if n.endswith(".bias") and n not in ckpt.tensors]
    architecture = registry.find(ckpt.config) if ckpt.config and added else None
    if architecture is None:
        return {}, {}
    slots = {name: s.id for name, s in architecture.bind(dict(ckpt.config)).tensors().items()}
    ids = [slots.get(n.removesuffix("bias") + "weight", "") for n in added]
    keys: dict[str, object] = {}
    if any(".attn." in i for i in ids):
        keys["attention_bias"] = True
    if any(".mlp." in i for i in ids):
        keys["mlp_bias"] = True
    bound = architecture.bind({**ckpt.config, **keys})
    zeros: dict[str, Lazy] = {}
    for name, slot in bound.tensors().items():
        if slot.kind == "bias" and name not in tensors and not slot.is_optional:
            spec = TensorSpec(tensors[added[0]].dtype, slot.shape)
            zeros[name] = _zeros(spec)
    return keys, zeros


def _zeros(spec: TensorSpec) -> Lazy:
    def fn() -> torch.Tensor:
        import torch

        return torch.zeros(spec.shape, dtype=spec.dtype.torch)

    return Apply("zeros", [], spec, fn, row_step=None).output()
