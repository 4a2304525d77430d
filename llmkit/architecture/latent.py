"""Multi-head latent attention: keys and values of all heads are made of one compressed vector a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.architecture.attention import ScoreRule
from llmkit.architecture.frequencies import yarn_temperature
from llmkit.architecture.keys import Computed, Flag, Key, Number, as_bool, as_float, lookup
from llmkit.architecture.kind import Kind, SlotShape, linear_slots, under
from llmkit.architecture.kinds import RMSNorm
from llmkit.architecture.positions import Rope
from llmkit.architecture.scaling import Yarn
from llmkit.architecture.sizes import Sizes

_RANK_OF_QUERIES = "q_lora_rank"


def latent_sizes(
    *,
    nope: int = 128,
    rope: int = 64,
    kv_rank: int = 512,
    q_rank: int | None = 1536,
    v: int = 128,
    v_width: Key | Computed | None = None,
) -> dict[str, Key | Computed]:
    """`Dims.extra` of latent attention; `Dims.head_dim` is `qk_rope_head_dim`.

    Args:
        nope, rope, kv_rank, q_rank, v: the defaults of the family's config class.
        v_width: of the value of a head, where the class computes it otherwise.
    """
    plain, rotated = Key("qk_nope_head_dim", nope), Key("qk_rope_head_dim", rope)
    latent = Key("kv_lora_rank", kv_rank)
    return {
        "q_rank": Computed(lambda config: config.get(_RANK_OF_QUERIES, q_rank)),
        "kv_rank": latent,
        "nope": plain,
        "v_width": v_width or Key("v_head_dim", v),
        "qk_width": _sum(plain, rotated),
        "cache_width": _sum(latent, rotated),
    }


def _sum(*keys: Key) -> Computed:
    return Computed(lambda config: sum(as_float(lookup(key, config), key.spellings[0]) for key in keys))


def _temperature(config: Mapping[str, Any]) -> float:
    scaling = Rope().bind(config).bound_scaling
    if isinstance(scaling, Yarn) and scaling.mscale_all_dim:
        return yarn_temperature(scaling.factor, scaling.mscale_all_dim)
    return 1.0


_COMPRESSES, _TEMPERATURE = Computed(lambda config: config.get(_RANK_OF_QUERIES, 1) is not None), Computed(_temperature)


@dataclass(frozen=True)
class LatentAttention(Kind):
    """Causal softmax attention over a compressed cache (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

    For a token x, c = norm(kv_a(x)[:kv_rank]) and r = rotated(kv_a(x)[kv_rank:]) are all that later tokens need. Head h
    has the key [k_b_h c, r], the value v_b_h c, and a query of `nope` plain dims before those that are rotated; since
    q . k_b_h c = (k_b_h^T q) . c, all heads can share one key [c, r] and one value c. `head_dim` of such a model is the
    number of rotated dims, as transformers has it.

    Attributes:
        bias: whether q_a, kv_a and o have biases.
        compressed_queries: q_b(norm(q_a(x))) instead of q(x).
        eps: of the norms of what is compressed.
        temperature: multiplies queries and keys, so that scores are temperature^2 q.k / sqrt(nope + head_dim).
    """

    string_keys = ("bias",)

    bias: Flag = False
    compressed_queries: Flag = _COMPRESSES
    eps: Number = 1e-6
    temperature: Number = _TEMPERATURE

    def slots(self) -> dict[str, SlotShape]:
        if self.compresses_queries:
            queries = linear_slots("q_a", "q_rank", "hidden", self.bias)
            queries |= under("q_a_norm", self.norm("q_rank")) | linear_slots("q_b", "heads*qk_width", "q_rank", False)
        else:
            queries = linear_slots("q", "heads*qk_width", "hidden", False)
        return {
            **queries,
            **linear_slots("kv_a", "cache_width", "hidden", self.bias),
            **under("kv_a_norm", self.norm("kv_rank")),
            **linear_slots("k_b", "heads*nope", "kv_rank", False),
            **linear_slots("v_b", "heads*v_width", "kv_rank", False),
            **linear_slots("o", "hidden", "heads*v_width", self.bias),
        }

    @property
    def compresses_queries(self) -> bool:
        """Whether queries of a bound kind are compressed, too."""
        return as_bool(self.compressed_queries)

    @property
    def readers(self) -> tuple[str, ...]:
        """The linear layers of a bound kind that read x."""
        return ("q_a", "kv_a") if self.compresses_queries else ("q", "kv_a")

    def rotary_widths(self, dims: Sizes) -> dict[str, int]:
        """The linear layers whose rows turn, and how many rows are a block, of which the last `head_dim` do."""
        return {"q_b" if self.compresses_queries else "q": dims.extra["qk_width"], "kv_a": dims.extra["cache_width"]}

    def norm(self, width: str) -> RMSNorm:
        """The norm of what is compressed to `width`."""
        return RMSNorm(eps=as_float(self.eps), width=width)

    def words(self, dims: Sizes) -> str:
        sizes = dims.extra
        kept = f"values {sizes['v_width']}, latent {sizes['kv_rank']} + {dims.head_dim}"
        return f"heads {dims.heads} × {sizes['qk_width']} ({dims.head_dim} rotated, {kept})"

    def widths(self, dims: Sizes) -> tuple[int, int]:
        """Numbers of a token: of all its queries, and of what later tokens see of it."""
        return dims.heads * dims.extra["cache_width"], dims.extra["cache_width"]

    def score_rule(self, qk_width: int) -> ScoreRule:
        """How a bound kind makes scores of queries and keys of nope + head_dim numbers."""
        return ScoreRule(qk_width**-0.5 * as_float(self.temperature) ** 2)
