"""TencentPretrain's checkpoints (Chinese-ChatLLaMA): one .bin and a JSON of sizes; rotary pairs interleaved.

Source: Tencent/TencentPretrain (scripts/convert_*), ydli-ai/Chinese-ChatLLaMA (its script of conversion).
"""

from __future__ import annotations

from typing import Any

from llmkit.architecture.names import Names
from llmkit.errors import InputError, listing
from llmkit.formats.json_text import read_json
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.described import assumed_config, with_config_beside
from llmkit.layouts.layout import Layout, Opened, Spelling, commonest_dtype, to_hf

__all__ = ["LAYOUT", "NAME", "find"]

NAME = "tencentpretrain"
_EMBEDDINGS = ("embedding.word.embedding", "embedding.word_embedding")
_MARK = "encoder.transformer.0.self_attn.linear_layers.0.weight"
_KEYS = ("heads_num", "layers_num", "emb_size")


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


def find(candidate: Candidate) -> Opened | None:
    """What a file of TencentPretrain holds; None for anything else.

    Raises:
        InputError: the JSON beside it is of another model, or there are several.
    """
    if candidate.main is None or _MARK not in candidate.tensors:
        return None
    tensors, where = candidate.tensors, str(candidate.main)
    embed = next((name for name in _EMBEDDINGS if f"{name}.weight" in tensors), _EMBEDDINGS[0])
    notes = [f"read from TencentPretrain's layout ({candidate.main.name})"]
    name, stated = _description(candidate)
    config, assumed = assumed_config(
        where, tensors, embed=f"{embed}.weight", gate="encoder.transformer.0.feed_forward.linear_gate.weight",
        block=r"encoder\.transformer\.(\d+)\.", dtype=commonest_dtype(tensors),
        heads=stated.get("heads_num") or _heads_beside(candidate),
    )  # fmt: skip
    _check(f"{candidate.folder / name}" if name else where, config, stated)
    config["max_position_embeddings"] = stated.get("max_seq_length") or config["max_position_embeddings"]
    beside = with_config_beside(candidate, where, config, is_stated=False)
    if beside is None:
        notes += assumed
    found = beside if beside is not None else config
    own = (name,) if name else ()
    return Opened(NAME, to_hf(where, tensors, found, _spelling(embed)), found, own=own, notes=tuple(notes))


def _description(candidate: Candidate) -> tuple[str, dict[str, Any]]:
    """The JSON of the layout among those in the folder, whatever its name; empty where there is none."""
    found = {}
    for name in candidate.names:
        if name.endswith(".json"):
            data = read_json(candidate.folder / name)
            if isinstance(data, dict) and all(key in data for key in _KEYS):
                found[name] = data
    if len(found) > 1:
        raise InputError(
            f"{candidate.folder} holds {len(found)} descriptions of TencentPretrain: {listing(found)}",
            hint="leave the one of this model there",
        )
    return next(iter(found.items()), ("", {}))


def _heads_beside(candidate: Candidate) -> int | None:
    found = candidate.json("config.json").get("num_attention_heads") if "config.json" in candidate.names else None
    return found if isinstance(found, int) else None


def _check(where: str, config: dict[str, Any], stated: dict[str, Any]) -> None:
    pairs = {"emb_size": "hidden_size", "layers_num": "num_hidden_layers", "feedforward_size": "intermediate_size"}
    for theirs, ours in pairs.items():
        if theirs in stated and stated[theirs] != config[ours]:
            raise InputError(
                f"{where}: {theirs} is {stated[theirs]}, the tensors have {config[ours]}",
                hint="give the JSON of this model",
            )


LAYOUT = Layout(NAME, find, spellings=tuple(map(_spelling, _EMBEDDINGS)))
