"""How a family looks in GGUF files: names, rotary order, and which metadata are which keys of config.json.

A GGUF file is one more spelling of a model (`Names`), whose config is a table of typed values under
`<architecture>.<key>`. What is alike for all families stands here; a plugin states what differs.

Source of names and keys: ggml-org/llama.cpp (gguf-py/gguf/constants.py, conversion/, src/models/).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmkit.architecture.attention import GroupedQuery
from llmkit.architecture.experts import Experts
from llmkit.architecture.kind import Kind
from llmkit.architecture.latent import LatentAttention
from llmkit.architecture.model import Model
from llmkit.architecture.names import Entry, Fused, Names, Stacked, stem_of
from llmkit.architecture.parallel_experts import ParallelExperts
from llmkit.architecture.positions import NoPositions

Metadata = Mapping[str, Any]
"""Metadata of a file; in a family's functions without the prefix `<architecture>.`."""


def _experts(name: str, part: str) -> Stacked:
    return Stacked(name, (part,), weight=".weight", bias=".bias")


_SLOTS: Mapping[str, Entry] = {
    "attn_norm": "attn_norm", "attn_post_norm": "post_attention_norm",
    "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm", "mlp_post_norm": "post_ffw_norm",
    "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down",
    "mlp.router": "ffn_gate_inp", "mlp.router.correction": "exp_probs_b.bias",
    "mlp.experts.gate": _experts("ffn_gate_exps", "gate"), "mlp.experts.up": _experts("ffn_up_exps", "up"),
    "mlp.experts.down": _experts("ffn_down_exps", "down"), "mlp.shared_gate": "ffn_gate_inp_shexp",
    "mlp.shared.gate": "ffn_gate_shexp", "mlp.shared.up": "ffn_up_shexp", "mlp.shared.down": "ffn_down_shexp",
}  # fmt: skip
_OUTER: Mapping[str, str] = {"embed_norm": "token_embd_norm", "positions": "position_embd"}
QKV = Fused("attn_qkv", ("q", "k", "v"))
"""q, k and v as one tensor, one below the other whatever the original's order."""
# Tensors that follow from the config: factors of the rotary frequencies.
CONSTANT_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
CONFIG_KEYS: Mapping[str, str] = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.key_length": "head_dim", "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How files have a weight that the family's checkpoints have otherwise.

    Attributes:
        shape: as formulas of dims, "" for what is left; () for the same, without an axis of 1 between two others.
        is_transposed: the last two axes of it are swapped.
        value: `-exp` for minus the exponential of it.
        rows, columns: the number of groups, and of blocks in all: blocks that lie group by group in checkpoints are one
            of each group in turn in files.
        halved_after: how many layers (a formula): values are halved once more in files after so many, as llama.cpp then
            halves what goes through them; 0 for never.
        rows_in_all: a formula: how many rows files have; those that checkpoints lack are copies of the first.
    """

    shape: tuple[str, ...] = ()
    is_transposed: bool = False
    value: Literal["", "-exp"] = ""
    rows: tuple[str, str] | None = None
    columns: tuple[str, str] | None = None
    halved_after: str = ""
    rows_in_all: str = ""


DECAY = Form(value="-exp")
"""A of a state space: files have it, checkpoints the logarithm of -A."""


@dataclass(frozen=True)
class GgufFamily:
    """A family, or one of its releases, in GGUF files.

    Attributes:
        arch: the value of `general.architecture`.
        pairs: how the rotary rows of q and k lie in files (`Rope.pairs` says how they lie in the original).
        slots: names that differ from the usual ones, and fusions: stem of the slot -> name.
        outer: the same for what lies outside the blocks.
        stacked: names of tensors of which files have one [n, …] for the original's n, `attn_q_norm.0` and so on.
        ignored: patterns of tensors that files may have and nothing needs.
        repeats: tensors that files must have and nothing reads: name -> the tensor that is written there; or what gives
            them for a model.
        norm_offset: what files add to the weight of every norm (Gemma's original stores weight - 1), but for those in
            `unshifted`, by their leaves (`attn.out_norm.weight`).
        forms: leaf of a weight (`attn.a_log`) -> how files have it, where that is not as it is.
        fold: the model without factors that files have in their weights, and these: leaf of a weight -> the factor of
            each stretch of its rows (a formula of their number, "" for what is left).
        in_metadata: tensors of one value, of which metadata have a list with an entry for each layer: name after
            `blk.N.` -> metadata key, without a prefix.
        keys: metadata key -> key of config.json, where it is not the usual one: dots go into objects, "" is for a key
            that config.json lacks.
        scaling: the object of config.json that has the scaling of rotary positions.
        config: values of config.json that no metadata say.
        flags: keys of config.json that are true where a tensor is there: key -> its name in files.
        read: more values of config.json, from all metadata.
        read_names: more of them, from all metadata and the names of the tensors.
        write: more metadata, from the model and config.json; it wins over the usual ones, and None takes one away.
        noted: keys of config.json that no metadata say and that llama.cpp goes without (which GELU it is); where they
            are not what is read from a file by itself, they are noted in it.
        refuses: why llama.cpp cannot run a model of the family, of which metadata would say nothing; None if it can.
        claims: which files of this architecture are the family's, from their metadata and tensor names; None for all,
            where no other family claims them.
        older: how earlier writers had it, in files that its `claims` takes; only read.
        has_own_head: llama.cpp does not take the embedding for the head: of a tied one files have the matrix twice.
        has_pairs_without_rope: q and k are reordered like rotary rows though the model has no rotary positions.
        has_windows: llama.cpp applies `attention.sliding_window` to this architecture.
        is_robust: llama.cpp's presets give its layers fewer bits than those of other families, and its head more.
        tokenizer_pre: `tokenizer.ggml.pre` where the tokenizer alone does not tell.
    """

    arch: str
    pairs: Literal["half", "interleaved"] = "half"
    slots: Mapping[str, Entry] = field(default_factory=dict)
    outer: Mapping[str, str] = field(default_factory=dict)
    stacked: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    repeats: Mapping[str, str] | Callable[[Model], Mapping[str, str]] = field(default_factory=dict)
    norm_offset: float = 0.0
    unshifted: tuple[str, ...] = ()
    forms: Mapping[str, Form] = field(default_factory=dict)
    fold: Callable[[Model], tuple[Model, Mapping[str, Sequence[tuple[str, float]]]]] | None = None
    in_metadata: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    scaling: str = "rope_scaling"
    config: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Metadata], Mapping[str, Any]] | None = None
    read_names: Callable[[Metadata, Collection[str]], Mapping[str, Any]] | None = None
    write: Callable[[Model, Mapping[str, Any]], Mapping[str, Any]] | None = None
    noted: tuple[str, ...] = ()
    refuses: Callable[[Model], str | None] | None = None
    claims: Callable[[Metadata, Collection[str]], bool] | None = None
    older: GgufFamily | None = None
    has_windows: bool = False
    has_own_head: bool = False
    has_pairs_without_rope: bool = False
    is_robust: bool = False
    tokenizer_pre: str | None = None

    def of_file(self, metadata: Metadata, names: Collection[str]) -> GgufFamily:
        """The form that a file has, from its metadata and the names of its tensors."""
        older = self.older
        return older if older is not None and older.claims is not None and older.claims(metadata, names) else self

    @property
    def names(self) -> Names:
        """The spelling of the family's tensors in GGUF files."""
        fused = {
            f"{slot.rpartition('.')[0]}.{part}"
            for slot, entry in self.slots.items()
            if isinstance(entry, Fused | Stacked)
            for part in entry.parts
        }
        taken = {stem_of(entry) for entry in self.slots.values()}
        usual = {k: v for k, v in _SLOTS.items() if k not in fused and v not in taken}
        return Names(
            embed="token_embd",
            final_norm="output_norm",
            head="output",
            block="blk.{i}.",
            slots={**usual, **self.slots},
            outer={**{k: v for k, v in _OUTER.items() if v not in self.outer.values()}, **self.outer},
            ignored=(*CONSTANT_TENSORS, *self.ignored),
        )


def rotary_share(metadata: Metadata) -> float:
    """The part of each head's dims that is rotated, so that int(head_dim * share) is what the file says."""
    head_dim = metadata.get("attention.key_length") or metadata["embedding_length"] // metadata["attention.head_count"]
    rotated = metadata.get("rope.dimension_count", head_dim)
    share = rotated / head_dim
    return float(share if int(head_dim * share) == rotated else (rotated + 0.5) / head_dim)


def main_block(model: Model) -> Kind:
    """The layer that stands for the model's: the first with positions, of those that see everything where there are."""

    def lacks(block: Kind) -> tuple[bool, bool]:
        has_window = getattr(getattr(block, "attention", None), "window", None) is not None
        return isinstance(getattr(block, "position", None), NoPositions), has_window

    return min(model.blocks, key=lacks)


def mixture_of(block: Kind) -> Experts | None:
    """The experts of a layer, which may stand beside a dense MLP; None for a layer without."""
    mlp = getattr(block, "mlp", None)
    mlp = mlp.experts if isinstance(mlp, ParallelExperts) else mlp
    return mlp if isinstance(mlp, Experts) else None


def have_attention(model: Model) -> list[bool]:
    """Whether each layer keeps keys and values, or what they are made of."""
    return [isinstance(getattr(block, "attention", None), GroupedQuery | LatentAttention) for block in model.blocks]


def heads_of_layers(model: Model) -> list[int]:
    """The number of key heads of each layer, 0 for one without attention."""
    return [model.dims.kv_heads * has for has in have_attention(model)]


def needs_all_heads(model: Model) -> str | None:
    """Why llama.cpp cannot run a model of a family whose query heads never share a key head."""
    return None if model.dims.heads == model.dims.kv_heads else "it reads a key head for each query head"


def needs_both_sorts(model: Model) -> str | None:
    """Why llama.cpp cannot run a hybrid of one sort of layers: it has no buffer for the state of the other."""
    has = have_attention(model)
    if any(has) and not all(has):
        return None
    return "all its layers have attention" if all(has) else "none of its layers has attention"


def needs_experts(model: Model) -> str | None:
    """Why llama.cpp cannot run a model of a family whose files always have experts."""
    return None if any(map(mixture_of, model.blocks)) else "all its layers are dense"


def needs_tied_head(model: Model) -> str | None:
    """Why llama.cpp cannot run a model of a family whose head it always takes from the embedding."""
    return None if model.is_tied else "its head is not tied to the embedding"
