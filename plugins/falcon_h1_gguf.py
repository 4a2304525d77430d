"""Falcon-H1 in GGUF files, whose weights have the multipliers of config.json in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.architecture.gguf import GgufFamily, Metadata
from llmkit.architecture.kinds import Block, GatedMLP
from llmkit.architecture.mamba import ParallelHybrid, StateSpaceDuality
from llmkit.architecture.model import Model

from . import ssm_gguf

_ONES = (1.0, 1.0, 1.0, 1.0, 1.0)


def _fold(model: Model) -> tuple[Model, Mapping[str, Sequence[tuple[str, float]]]]:
    """The scale of queries and keys that is not of their width goes into the keys; a tied head may get its own rows."""
    block = model.block
    assert isinstance(block, Block) and isinstance(block.attention, ParallelHybrid)  # noqa: S101, PT018
    both, mlp = block.attention, block.mlp
    assert isinstance(both.recurrence, StateSpaceDuality) and isinstance(mlp, GatedMLP)  # noqa: S101, PT018
    usual = model.dims.head_dim**-0.5
    before, after = both.attention_factors
    into, out = both.recurrence_factors
    z, u, b, c, dt = both.recurrence.multipliers or _ONES  # type: ignore[misc]
    gate, down = mlp.multipliers or (1.0, 1.0)  # type: ignore[misc]
    embed, head = model.embedding.multiplier or 1.0, model.head.multiplier or 1.0
    factors = {
        "embed.weight": [("", embed)],
        "head.weight": [("", head)],
        "attn.q.weight": [("", before)],
        "attn.k.weight": [("", before * both.attention.scale / usual)],  # type: ignore[operator]
        "attn.v.weight": [("", before)],
        "attn.o.weight": [("", after)],
        "attn.ssm.in.weight": [
            *(("inner", into * z), ("inner", into * u)),
            *(("ssm_groups*state", into * b), ("ssm_groups*state", into * c), ("ssm_heads", into * dt)),
        ],
        "attn.ssm.out.weight": [("", out)],
        "mlp.gate.weight": [("", gate)],
        "mlp.down.weight": [("", down)],
    }
    norm = both.recurrence.gated_norm
    recurrence = replace(both.recurrence, multipliers=None)
    if norm is None:  # no matter where
        recurrence = replace(recurrence, norm_before_gate=False)
    plain = ParallelHybrid(replace(both.attention, scale=usual), recurrence)
    return (
        replace(
            model,
            embedding=replace(model.embedding, scale=1.0),
            blocks=(replace(block, attention=plain, mlp=replace(mlp, multipliers=None)),) * len(model.blocks),
            head=replace(model.head, scale=1.0, tied=model.is_tied and embed == head),
        ),
        factors,
    )


def _read(metadata: Metadata) -> dict[str, Any]:
    return {
        "mamba_d_head": metadata["ssm.inner_size"] // metadata["ssm.time_step_rank"],
        "mamba_norm_before_gate": False,
    }


def _refuses(model: Model) -> str | None:
    block = model.block
    attention = block.attention if isinstance(block, Block) else None
    if isinstance(attention, ParallelHybrid) and any(leaf.endswith(".bias") for leaf in attention.attention.slots()):
        return "its attention has biases"
    return None


GGUF = GgufFamily(
    "falcon-h1",
    slots={**ssm_gguf.under("attn.ssm", ssm_gguf.DUALITY), "mlp_norm.weight": "ffn_norm"},
    forms=ssm_gguf.duality_forms("attn.ssm"),
    fold=_fold,
    keys={
        "ssm.conv_kernel": "mamba_d_conv",
        "ssm.state_size": "mamba_d_state",
        "ssm.inner_size": "mamba_d_ssm",
        "ssm.time_step_rank": "mamba_n_heads",
        "ssm.group_count": "mamba_n_groups",
    },
    config={"hidden_act": "silu"},
    flags={"mamba_rms_norm": "blk.0.ssm_norm.weight"},
    read=_read,
    write=lambda model, _: ssm_gguf.sizes(model),
    refuses=_refuses,
)
