"""What GGUF files of Gemma 3n and Gemma 4 have alike: inputs of layers, layers that take keys of others, windows."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.gguf import Metadata
from llmkit.architecture.kinds import Block, Rope
from llmkit.architecture.layer_inputs import LayerInputs, SharedKeys
from llmkit.architecture.model import Model

from .gemma2 import has_window, usual_windows

INPUT_SLOTS = {"input.gate": "inp_gate", "input.out": "proj", "input.norm": "post_norm"}
TABLES = {
    "beside.table": "per_layer_token_embd",
    "beside.project": "per_layer_model_proj",
    "beside.norm": "per_layer_proj_norm",
}
KEYS = {
    "feed_forward_length": "",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "vocab_size": "vocab_size_per_layer_input",
}
OWN = tuple(f"attn_{part}.weight" for part in ("k", "v", "k_norm"))
"""What a layer has that takes no keys of another; files may have it in the others, too."""
IN_ANY = tuple(f"blk.*.{leaf}" for leaf in OWN)
SORTS = ("full_attention", "sliding_attention")


def shared(model: Model) -> dict[int, int]:
    """The layers that take keys and values of others, and of which."""
    attentions = enumerate(block.attention for block in model.blocks if isinstance(block, Block))
    return {i: attention.source for i, attention in attentions if isinstance(attention, SharedKeys)}


def inputs_of(model: Model) -> LayerInputs:
    """What goes beside the hidden states."""
    inputs = model.embedding.beside
    assert isinstance(inputs, LayerInputs)  # noqa: S101
    return inputs


def types_of(metadata: Metadata, period: int | None = None) -> list[str]:
    """`layer_types`; where files have none, the last of each `period` layers has no window."""
    pattern = metadata.get("attention.sliding_window_pattern", period)
    windows = pattern if isinstance(pattern, list) else usual_windows(metadata["block_count"], pattern)
    return [SORTS[bool(window)] for window in windows]


def metadata(model: Model) -> dict[str, Any]:
    """Metadata of the inputs, the layers that share, the windows, and the base of rotary positions where one is."""
    windows = [has_window(block) for block in model.blocks]
    local = [block.position for block in model.blocks if isinstance(block, Block) and has_window(block)]
    return {
        "embedding_length_per_layer_input": inputs_of(model).width,
        "attention.shared_kv_layers": len(shared(model)),
        "attention.sliding_window_pattern": windows,
        "rope.freq_base_swa": next((rope.base for rope in local if isinstance(rope, Rope)), None),
    }


def needs_sources(model: Model) -> str | None:
    """Why llama.cpp cannot run a model: the window, or whose keys a layer takes, are not as it has them."""
    windows, taken = [has_window(block) for block in model.blocks], shared(model)
    if not any(windows):
        return "no layer has a window"
    first = len(windows) - len(taken)
    if any(source != first - (2 if windows[i] else 1) for i, source in taken.items()):
        return "it takes keys of the last two layers that have some, one with a window and one without"
    return None


def needs_rows(model: Model) -> str | None:
    """Why llama.cpp cannot run a model with more rows in the table of inputs than in the embedding."""
    inputs = inputs_of(model)
    return "its inputs have more rows than its embedding" if inputs.width and inputs.rows > model.dims.vocab else None
