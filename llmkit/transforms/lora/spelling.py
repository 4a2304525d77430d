"""Adapters that name modules as another layout does, renamed as the base.

A base opens under transformers' names, whatever its layout; the adapters of lit-llama, litgpt and LLaMA-Adapter keep
those of their own. The layouts' tables say which weights a module holds, and in which rows and which order of rotary
pairs: what belongs to rows of its output (B of a pair, biases, scales of the output) is taken apart as the weight
would be; what belongs to its input (A, scales of the input) is the same for all of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llmkit.architecture.model import Model
from llmkit.architecture.slots import Slot
from llmkit.architecture.storage import parts_of, rotary_pairs, stored
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import PluginError, RequirementError
from llmkit.formats.adapter import Adapter
from llmkit.formats.adapter_other import FOLDED
from llmkit.layouts.layout import Spelling, rotary_order
from llmkit.layouts.opening import layouts
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.moving import Concat
from llmkit.tensors.rearrange import place_in_zeros, zeros
from llmkit.tensors.spec import TensorSpec

_OF_ROWS = ("lora_B", "new_bias", "scale_out", "inner_bias")


def in_base_names(adapter: Adapter, ckpt: Checkpoint) -> Adapter:
    """The adapter by the names of the base; as it is where the base has them, or where no layout knows them.

    Raises:
        RequirementError: names of another layout, which cannot be said in the base's.
    """
    if adapter.layout == "hf":
        return adapter
    paths = [*(f"{m}.weight" for m in adapter.modules), *adapter.replacements]
    if all(path in ckpt.tensors for path in paths):
        return adapter
    model = ckpt.model
    for spelling in (s for layout in layouts() for s in layout.spellings):
        slots = _slots(model, spelling) if model is not None else {}
        if model is not None and all(path in slots for path in paths):
            return _translated(adapter, model, spelling, slots)
    if adapter.kind == FOLDED:
        raise RequirementError(
            f"{adapter.label} names modules such as {next(iter(adapter.modules))}, which {ckpt.label} does not have",
            hint="merge it into a base of the family that it was trained on",
        )
    return adapter


def _slots(model: Model, spelling: Spelling) -> Mapping[str, Slot]:
    try:
        return model.spelled(spelling.names).tensors()
    except PluginError:  # a model of kinds that the layout has no names for
        return {}


def _translated(adapter: Adapter, model: Model, spelling: Spelling, slots: Mapping[str, Slot]) -> Adapter:
    rotary = rotary_order(model)

    def weights_in(lazy: Lazy, slot: Slot) -> dict[str, Lazy]:
        weights = parts_of(lazy, slot)
        is_other = rotary is not None and spelling.pairs not in (None, rotary)
        return rotary_pairs(weights, model, to=str(rotary)) if is_other else weights

    parts: dict[str, dict[str, Lazy]] = {}  # by the id of a weight
    scaling: dict[str, float] = {}
    for module, stored_parts in adapter.modules.items():
        slot = slots[f"{module}.weight"]
        for part, lazy in stored_parts.items():
            of_each = weights_in(lazy, slot) if part in _OF_ROWS else {p.id: lazy for p in slot.parts}
            for weight, moved in of_each.items():
                parts.setdefault(weight, {})[part] = moved
        if module in adapter.scaling:
            scaling |= {p.id: adapter.scaling[module] for p in slot.parts}
    matrices: dict[str, Lazy] = {}
    for name, lazy in adapter.replacements.items():
        matrices |= weights_in(lazy, slots[name])
    modules: dict[str, Mapping[str, Lazy]] = {}
    factors: dict[str, float] = {}
    replacements: dict[str, Lazy] = {}
    for slot in model.slots.values():
        path = slot.name.removesuffix(".weight")
        changed = {p.id: parts[p.id] for p in slot.parts if p.id in parts}
        if changed:
            modules[path] = _joined(adapter.label, slot, changed)
            scales = [scaling[weight] for weight in changed if weight in scaling]
            factors.update({path: scales[0]} if scales else {})
        if all(p.id in matrices for p in slot.parts):
            replacements[slot.name] = stored(matrices, slot)
    return replace(adapter, modules=modules, scaling=factors, replacements=replacements)


def _joined(label: str, slot: Slot, changed: Mapping[str, Mapping[str, Lazy]]) -> Mapping[str, Lazy]:
    """What happens to one tensor of the base, which may hold several of the weights that are changed."""
    if len(slot.parts) == 1:
        return changed[slot.parts[0].id]
    if any(set(parts) != {"lora_A", "lora_B"} for parts in changed.values()):
        raise RequirementError(
            f"{label}: {slot.name} of the base holds several weights, which this adapter scales one by one",
            hint="merge it into its own checkpoint, then convert",
        )
    inputs = {id(parts["lora_A"].node): parts["lora_A"] for parts in changed.values()}
    starts, rank = {}, 0
    for key, lazy in inputs.items():
        starts[key] = rank
        rank += lazy.shape[0]
    dtype = next(iter(changed.values()))["lora_B"].dtype
    columns = {}
    for part in slot.parts:
        shape, parts = (part.shape[0], rank), changed.get(part.id)
        if parts is None:
            columns[part.id] = zeros(TensorSpec(dtype, shape))
        else:
            columns[part.id] = place_in_zeros(
                parts["lora_B"], shape, [(range(shape[0]), starts[id(parts["lora_A"].node)])]
            )
    left = stored(columns, slot.upright)
    return {"lora_A": Concat(list(inputs.values())).output(), "lora_B": left}
