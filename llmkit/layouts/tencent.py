"""TencentPretrain's checkpoints (Chinese-ChatLLaMA): one .bin and a JSON of sizes; rotary pairs interleaved.

Source: Tencent/TencentPretrain (scripts/convert_*), ydli-ai/Chinese-ChatLLaMA (its script of conversion).
"""

from __future__ import annotations

from typing import Any

from llmkit.architecture.names import Names
from llmkit.errors import InputError, listing
from llmkit.formats.json_text import read_json
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.described import opened_by_names
from llmkit.layouts.layout import Layout, OpenedLayout, Spelling

NAME = "tencentpretrain"
_EMBEDDINGS = ("embedding.word.embedding", "embedding.word_embedding")
_MARK = "encoder.transformer.0.self_attn.linear_layers.0.weight"
_KEYS = ("heads_num", "layers_num", "emb_size")
_SIZES = {"emb_size": "hidden_size", "layers_num": "num_hidden_layers", "feedforward_size": "intermediate_size"}


def _spelling(embed: str) -> Spelling:
    return Spelling(
        Names(
            embed=embed,
            final_norm="encoder.layer_norm",
            head="target.lm.output_layer",
            block="encoder.transformer.{i}.",
            slots={
                "attn_norm": "layer_norm_1",
                "attn.q": "self_attn.linear_layers.0",
                "attn.k": "self_attn.linear_layers.1",
                "attn.v": "self_attn.linear_layers.2",
                "attn.o": "self_attn.final_linear",
                "mlp_norm": "layer_norm_2",
                "mlp.gate": "feed_forward.linear_gate",
                "mlp.up": "feed_forward.linear_1",
                "mlp.down": "feed_forward.linear_2",
            },
        ),
        "interleaved",
    )


def find(candidate: Candidate) -> OpenedLayout | None:
    """What a file of TencentPretrain holds; None for anything else.

    Raises:
        InputError: the JSON beside it is of another model, or there are several.
    """
    if candidate.main is None or _MARK not in candidate.tensors:
        return None
    tensors = candidate.tensors
    embed = next((name for name in _EMBEDDINGS if f"{name}.weight" in tensors), _EMBEDDINGS[0])
    name, stated = _description(candidate)
    context = {"max_position_embeddings": stated["max_seq_length"]} if stated.get("max_seq_length") else {}
    opened = opened_by_names(
        NAME, candidate, candidate.main, tensors, _spelling(embed), heads=stated.get("heads_num"), stated=context,
        file_names=(name,) if name else (),
    )  # fmt: skip
    for theirs, ours in _SIZES.items():
        if theirs in stated and stated[theirs] != opened.config[ours]:
            raise InputError(
                f"{candidate.folder / name}: {theirs} is {stated[theirs]}, the tensors have {opened.config[ours]}",
                hint="give the JSON of this model",
            )
    return opened


def _description(candidate: Candidate) -> tuple[str, dict[str, Any]]:
    """The JSON of the layout among those in the folder, whatever its name; empty where there is none."""
    config = {}
    for name in candidate.names:
        if name.endswith(".json"):
            data = read_json(candidate.folder / name)
            if isinstance(data, dict) and all(key in data for key in _KEYS):
                config[name] = data
    if len(config) > 1:
        raise InputError(
            f"{candidate.folder} holds {len(config)} descriptions of TencentPretrain: {listing(config)}",
            hint="leave the one of this model there",
        )
    return next(iter(config.items()), ("", {}))


LAYOUT = Layout(NAME, find, spellings=tuple(map(_spelling, _EMBEDDINGS)))
