"""The config.json of a plain gated decoder, from the few sizes that foreign layouts state or that shapes show.

All layouts here hold models of one computation: RMS norms, rotary positions over whole heads, a gated SiLU MLP, no
biases. What a layout does not state is taken from a config.json beside it, or is as in the first releases of the family
(heads of 128 dims, epsilon 1e-6, 2048 tokens of context), and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.architecture.names import Names, NameTable, Transposed
from llmkit.errors import InputError
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.layout import OpenedLayout, Spelling, commonest_dtype, same_sizes, to_hf
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.source import AGAIN
from llmkit.tensors.spec import DType

_HEAD_DIM, _EPS, _CONTEXT = 128, 1e-6, 2048


def decoder_config(
    *,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    vocab: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    eps: float = _EPS,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    context: int = _CONTEXT,
    is_tied: bool = False,
    dtype: DType = DType.F32,
    bos: int = 1,
    eos: int = 2,
) -> dict[str, Any]:
    """The contents of config.json."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "hidden_act": "silu",
        "tie_word_embeddings": is_tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype.torch_name,
    }
    if head_dim is not None and head_dim * heads != hidden:
        config["head_dim"] = head_dim
    if scaling is not None:
        config["rope_scaling"] = dict(scaling)
    return config


def opened_by_names(
    layout: str,
    candidate: Candidate,
    path: Path,
    tensors: Mapping[str, Lazy],
    spelling: Spelling,
    *,
    heads: int | None = None,
    stated: Mapping[str, Any] | None = None,
    file_names: tuple[str, ...] = (),
) -> OpenedLayout:
    """A layout whose files describe the model by little but its tensors; a config.json beside them takes precedence.

    Args:
        layout: its name.
        path: the file with the weights.
        tensors: by the names of `spelling`.
        heads: their number where it is stated; otherwise heads of 128 dims.
        stated: keys of config.json that the files state.
        file_names: small files of the layout.

    Raises:
        InputError: the tensors are not those of one model, or the size of the heads cannot be told.
    """
    notes: tuple[str, ...] = (f"read from the layout {layout} ({path.name})",)
    config = with_config_beside(candidate, str(path))
    if config is None:
        config, assumed = _assumed(str(path), tensors, spelling.names, heads)
        config |= stated or {}
        notes += assumed
    return OpenedLayout(layout, to_hf(str(path), tensors, config, spelling), config, own=file_names, notes=notes)


def _assumed(
    where: str, tensors: Mapping[str, Lazy], names: Names, heads: int | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A config from shapes alone, and a note that says what was assumed."""
    table = NameTable(names)
    embed, gate = table.name("embed.weight"), table.name("layers.0.mlp.gate.weight")
    absent = [name for name in (embed, gate) if name not in tensors or len(tensors[name].shape) != 2]
    if absent:
        raise InputError(f"{where}: no matrix {absent[0]}: not a whole model", hint=AGAIN)
    vocab, hidden = tensors[embed].shape
    if heads is None and hidden % _HEAD_DIM:
        raise InputError(
            f"{where}: the number of heads is not stated, and hidden size {hidden} is no multiple of {_HEAD_DIM}",
            hint="put the config.json of this model beside the file",
        )
    layers = {slot.split(".")[1] for name in tensors if (slot := table.slot(name) or "").startswith("layers.")}
    is_transposed = isinstance(names.slots["mlp.gate"], Transposed)
    config = decoder_config(
        hidden=hidden,
        ffn=tensors[gate].shape[1 if is_transposed else 0],
        layers=max(map(int, layers), default=-1) + 1,
        heads=heads or hidden // _HEAD_DIM,
        vocab=vocab,
        dtype=commonest_dtype(tensors),
    )
    assumed = f"epsilon {_EPS}, {_CONTEXT} tokens of context" + (f", heads of {_HEAD_DIM} dims" if not heads else "")
    return config, (f"not stated in the file, as in the first releases: {assumed} (a config.json beside it wins)",)


def with_config_beside(
    candidate: Candidate, where: str, ours: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """A config.json of transformers beside the file; None where there is none.

    Args:
        ours: what the layout states; the two must be the same model.

    Raises:
        InputError: it gives another model than the layout's own description.
    """
    if "config.json" not in candidate.names:
        return None
    beside = candidate.json("config.json")
    if not beside.get("architectures") and not beside.get("model_type"):
        return None
    if ours is not None:
        same_sizes(where, ours, beside)
    return beside
