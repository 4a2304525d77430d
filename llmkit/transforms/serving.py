"""What servers ask of quantized layers besides their layout: they fuse some of them, and cut others among GPUs.

vLLM multiplies by q, k and v at once, and by gate and up, which have to be quantized alike then; and it splits the rows
of o and down for tensor parallelism, where every GPU needs whole groups of columns.

Source: compressed_tensors/utils.py and utils/marlin_utils.py in vllm/model_executor/layers/quantization of vLLM.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from llmkit.architecture.model import Model
from llmkit.errors import counted, listing
from llmkit.quantization.matrix import Grid, QuantizedMatrix

# The last part of a slot's id, and what names the layers that are one for the server.
_FUSED = {"q": "q, k and v", "k": "q, k and v", "v": "q, k and v", "gate": "gate and up", "up": "gate and up"}
_ROW_PARALLEL = ("o", "down")
_USUAL_GPUS = 8


def serving_notes(model: Model, matrices: Mapping[str, QuantizedMatrix]) -> list[str]:
    """What a server would refuse of quantized layers, in words; nothing for most.

    Args:
        matrices: by the names of the weights; linear layers that are not there stay in floats.
    """
    kinds: dict[tuple[str, str], dict[str, Grid | str]] = defaultdict(dict)
    cut: dict[str, int] = {}
    for slot in model.slots.values():
        place, _, part = slot.id.removesuffix(".weight").rpartition(".")
        matrix = matrices.get(slot.name)
        if slot.kind != "linear":
            continue
        if part in _FUSED:
            kinds[place, _FUSED[part]][slot.name] = matrix.grid if matrix is not None else "floats"
        if part in _ROW_PARALLEL and matrix is not None and matrix.n_groups > 1 and matrix.n_groups % _USUAL_GPUS:
            cut[slot.name] = matrix.n_groups
    notes = []
    several = [(parts, grids) for (_, parts), grids in kinds.items() if len(set(map(id, grids.values()))) > 1]
    unlike = [(parts, grids) for parts, grids in several if len(set(grids.values())) > 1]
    if unlike:
        parts, grids = unlike[0]
        notes.append(
            f"vLLM fuses {parts}, which have to be quantized alike: "
            f"{listing([f'{name} is {kind}' for name, kind in grids.items()], 3)}"
            f"{f' ({len(unlike)} such places)' if len(unlike) > 1 else ''}"
        )
    if cut:
        name = min(cut, key=lambda name: _most(cut[name]))
        most = counted(_most(cut[name]), "GPU")
        notes.append(
            f"vLLM cannot split rows among more than {most}: {name} has {cut[name]} groups in a row, which stay whole"
        )
    return notes


def _most(n_groups: int) -> int:
    """The largest power of two that divides a number of groups: so many GPUs get whole ones."""
    return n_groups & -n_groups
