"""Which way round a weight is stored, where no plugin tells: by the shapes of the updates, not by the config's flag.

`fan_in_fan_out` is what PEFT was told, and PEFT corrects it by the class of the layer when it loads an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmkit.formats.adapter import Adapter
from llmkit.tensors.lazy import Lazy

__all__ = ["stored_flipped"]


def stored_flipped(adapter: Adapter, module: str, weight_of: Callable[[str], Lazy | None]) -> bool:
    """Whether the weight of a module is [in, out]: by its own shape, if it is square by the most of its like, else
    by the config.

    Args:
        weight_of: the weight of a module path; None where there is none.
    """
    own = _by_shape(adapter.modules[module], weight_of(module))
    if own is not None:
        return own
    votes = [v for m, parts in adapter.modules.items() if (v := _by_shape(parts, weight_of(m))) is not None]
    return 2 * sum(votes) > len(votes) if votes else adapter.is_transposed


def _by_shape(parts: Mapping[str, Lazy], weight: Lazy | None) -> bool | None:
    if "lora_A" not in parts or "lora_B" not in parts or weight is None:
        return None
    update = (parts["lora_B"].shape[0], parts["lora_A"].shape[1])
    if update[0] == update[1] or weight.shape not in (update, update[::-1]):
        return None
    return weight.shape != update
