"""Parts of LLaMA-Adapter and of lit adapters that can be folded into weights: scales, biases, LoRA pairs, norms.

y = W (scale * x) + bias becomes W' = W * scale[None, :], and the bias is new (OpenGVLab/LLaMA-Adapter, chat65b);
y = scale * (W x + b + bias) becomes W' = scale[:, None] * W, b' = scale * (b + bias) (lit adapter v2).
"""

from __future__ import annotations

from collections.abc import Mapping

from llmkit.architecture import registry
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.rearrange import zeros
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.transforms.lora import arithmetic


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
    if not added or ckpt.model is None:
        return {}, {}
    slots = {name: s.id for name, s in ckpt.model.tensors().items()}
    ids = [slots.get(n.removesuffix("bias") + "weight", "") for n in added]
    keys: dict[str, object] = {}
    if any(".attn." in i for i in ids):
        keys["attention_bias"] = True
    if any(".mlp." in i for i in ids):
        keys["mlp_bias"] = True
    bound = registry.require_model({**ckpt.config, **keys}, ckpt.label)
    dtype = tensors[added[0]].dtype
    return keys, {
        name: zeros(TensorSpec(dtype, slot.shape))
        for name, slot in bound.tensors().items()
        if slot.kind == "bias" and name not in tensors and not slot.is_optional
    }
