"""State space models and gated short convolutions: what stands in a layer where attention stands.

Sizes that they name are in `Dims.extra`: `inner` (the width that they compute in), `state` (N), `kernel` (K), `dt_rank`
and `scan_width` (dt_rank + 2 N) of Mamba; `ssm_heads`, `ssm_groups`, `conv_width` (inner + 2 groups N) and `in_width`
(inner + conv_width + heads) of Mamba 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar, Self

from llmkit.architecture.activations import same_activation
from llmkit.architecture.attention import GroupedQuery
from llmkit.architecture.keys import Computed, Flag, Key, Number, as_bool, as_float, as_text, lookup
from llmkit.architecture.kind import Kind, SlotShape, linear_slots, under
from llmkit.architecture.kinds import Residual, RMSNorm
from llmkit.architecture.sizes import Sizes
from llmkit.errors import SpecError


@dataclass(frozen=True)
class NoMLP(Kind):
    """A layer without an MLP."""


@dataclass(frozen=True)
class MixerOnly(Residual):
    """x + mixer(norm(x)), and no MLP."""

    norms: ClassVar[tuple[str, ...]] = ("attn_norm",)


@dataclass(frozen=True)
class ShortConvolution(Kind):
    """out(c * conv(b * u)) with b, c, u = in(x), conv causal over K tokens (Liquid AI 2025, LFM2).

    Attributes:
        bias: whether all three have biases.
    """

    string_keys = ("bias",)

    bias: Flag = False

    def words(self, dims: Sizes) -> str:
        return f"short convolution {dims.hidden} × {dims.extra['kernel']}"

    def slots(self) -> dict[str, SlotShape]:
        return {
            **linear_slots("in", "3*hidden", "hidden", self.bias),
            **_convolution("hidden", self.bias),
            **linear_slots("out", "hidden", "hidden", self.bias),
        }


@dataclass(frozen=True)
class _StateSpace(Kind):
    """What both state space models have in common.

    Attributes:
        act: the activation after the convolution.
        conv_bias: whether the convolution has a bias.
        in_bias, out_bias: whether the projections have.
    """

    string_keys: ClassVar[tuple[str, ...]] = ("conv_bias", "in_bias", "out_bias")

    act: str | Any = "silu"
    conv_bias: Flag = True
    in_bias: Flag = False
    out_bias: Flag = False

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        return replace(bound, act=same_activation(as_text(bound.act)))


@dataclass(frozen=True)
class SelectiveScan(_StateSpace):
    """Mamba (Gu & Dao 2023, arXiv:2312.00752): out(scan(act(conv(u))) * silu(z)) with u, z = in(x).

    For a token u, dt, B, C = x(u); step = softplus(dt(dt)); the state [inner, N] becomes
    exp(step A) state + step u B, and gives state C + D u, with A = -exp(a_log).

    Attributes:
        norm: of dt, B and C; None for none. Its width is set here.
        weighted: whether these norms have weights.
    """

    norm: RMSNorm | None = None
    weighted: bool = True

    @property
    def norms(self) -> dict[str, RMSNorm]:
        """The norm of each part, by the stem of its weight."""
        widths = {"dt_norm": "dt_rank", "b_norm": "state", "c_norm": "state"}
        return {} if self.norm is None else {name: replace(self.norm, width=width) for name, width in widths.items()}

    def words(self, dims: Sizes) -> str:
        return f"state space {dims.extra['inner']} × {dims.extra['state']}"

    def slots(self) -> dict[str, SlotShape]:
        slots = {
            **linear_slots("in", "2*inner", "hidden", self.in_bias),
            **_convolution("inner", self.conv_bias),
            **linear_slots("x", "scan_width", "inner", False),
            # transformers multiplies by this weight itself, so it is no matrix to quantize
            "dt.weight": SlotShape(("inner", "dt_rank"), "parameter"),
            "dt.bias": SlotShape(("inner",), "bias"),
            "a_log": SlotShape(("inner", "state"), "parameter"),
            "d": SlotShape(("inner",), "parameter"),
            **linear_slots("out", "hidden", "inner", self.out_bias),
        }
        for name, norm in self.norms.items() if self.weighted else ():
            slots |= under(name, norm)
        return slots


@dataclass(frozen=True)
class StateSpaceDuality(_StateSpace):
    """Mamba 2 (Dao & Gu 2024, arXiv:2405.21060): heads with one decay each, keys B and queries C shared by groups.

    z, [u, B, C], dt = in(x), the middle through act(conv(.)); step = softplus(dt + dt_bias) of each head; its state
    [N, inner / heads] becomes exp(step A) state + step B u^T, and gives C^T state + D u, with A = -exp(a_log). Then the
    gate silu(z), and a norm over each group.

    Attributes:
        norm: of what is scanned; None for none.
        norm_before_gate: norm(y) * silu(z) instead of norm(y * silu(z)).
        multipliers: of z, u, B, C and dt; None for 1.
        limit: the least and the largest step.
    """

    string_keys = (*_StateSpace.string_keys, "norm_before_gate")

    norm: RMSNorm | Computed | None = None
    norm_before_gate: Flag = False
    multipliers: Computed | tuple[float, ...] | None = None
    limit: Computed | tuple[float, float] | None = None

    @property
    def gated_norm(self) -> RMSNorm | None:
        """The norm of a bound kind."""
        return self.norm if isinstance(self.norm, RMSNorm) else None

    def words(self, dims: Sizes) -> str:
        inner, heads = dims.extra["inner"], dims.extra["ssm_heads"]
        return f"state space heads {heads} × {inner // heads} × {dims.extra['state']}"

    def slots(self) -> dict[str, SlotShape]:
        slots = {
            **linear_slots("in", "in_width", "hidden", self.in_bias),
            **_convolution("conv_width", self.conv_bias),
            "dt_bias": SlotShape(("ssm_heads",), "bias"),
            "a_log": SlotShape(("ssm_heads",), "parameter"),
            "d": SlotShape(("ssm_heads",), "parameter"),
            **linear_slots("out", "hidden", "inner", self.out_bias),
        }
        return slots if self.gated_norm is None else slots | under("norm", replace(self.gated_norm, width="inner"))


@dataclass(frozen=True)
class ParallelHybrid(Kind):
    """a_out attention(a_in x) + r_out recurrence(r_in x): both in one layer (Falcon-H1, arXiv:2507.22448).

    Attributes:
        attention, recurrence: the two; weights of the recurrence are below `ssm`.
        attention_in, attention_out, recurrence_in, recurrence_out: multipliers.
    """

    attention: GroupedQuery
    recurrence: Kind
    attention_in: Number = 1.0
    attention_out: Number = 1.0
    recurrence_in: Number = 1.0
    recurrence_out: Number = 1.0

    def words(self, dims: Sizes) -> str:
        return f"{self.attention.words(dims)}, {self.recurrence.words(dims)}"

    def widths(self, dims: Sizes) -> tuple[int, int]:
        """As of the attention."""
        return self.attention.widths(dims)

    @property
    def attention_factors(self) -> tuple[float, float]:
        """What multiplies input and output of the attention of a bound kind."""
        return as_float(self.attention_in), as_float(self.attention_out)

    @property
    def recurrence_factors(self) -> tuple[float, float]:
        """The same of the recurrence."""
        return as_float(self.recurrence_in), as_float(self.recurrence_out)

    def slots(self) -> dict[str, SlotShape]:
        return self.attention.slots() | under("ssm", self.recurrence)


def scan_sizes(inner: Computed, *, rank: str, state: Key, kernel: Key) -> dict[str, Key | Computed]:
    """`Dims.extra` of a model with `SelectiveScan`; the key `rank` has the rank of steps, or `auto` for hidden / 16."""

    def dt_rank(config: Mapping[str, Any]) -> Any:
        stated = config.get(rank, "auto")
        return ceil(config["hidden_size"] / 16) if stated == "auto" else stated

    width = Computed(lambda config: dt_rank(config) + 2 * lookup(state, config))
    return {"inner": inner, "state": state, "kernel": kernel, "dt_rank": Computed(dt_rank), "scan_width": width}


def duality_sizes(inner: Computed, *, heads: Key, groups: Key, state: Key, kernel: Key) -> dict[str, Key | Computed]:
    """`Dims.extra` of Mamba 2.

    Raises:
        SpecError: when bound, if heads do not divide the inner width, or groups the heads.
    """

    def convolved(config: Mapping[str, Any]) -> int:
        n, n_groups = lookup(heads, config), lookup(groups, config)
        width: int = lookup(inner, config)
        if width % n or n % n_groups:
            raise SpecError(
                f"config.json: {width} channels are not {n} heads in {n_groups} groups of a state space model"
            )
        return int(width + 2 * n_groups * lookup(state, config))

    return {
        "inner": inner,
        "state": state,
        "kernel": kernel,
        "ssm_heads": heads,
        "ssm_groups": groups,
        "conv_width": Computed(convolved),
        "in_width": Computed(lambda config: lookup(inner, config) + convolved(config) + lookup(heads, config)),
    }


def step_limit(config: Mapping[str, Any]) -> tuple[float, float] | None:
    """The bounds of a step that `time_step_limit` states; None for none.

    Raises:
        SpecError: it is no pair of numbers.
    """
    limit = config.get("time_step_limit")
    if limit is None:
        return None
    if isinstance(limit, list | tuple):  # JSON has no infinities: transformers 5 writes {"__float__": "Infinity"}
        limit = [float("inf") if x == {"__float__": "Infinity"} else x for x in limit]
    if not isinstance(limit, list | tuple) or len(limit) != 2 or not all(type(x) in (int, float) for x in limit):
        raise SpecError(f"config.json: time_step_limit is {limit!r:.60}, expected the least and the largest step")
    low, high = float(limit[0]), float(limit[1])
    return None if low <= 0 and high == float("inf") else (low, high)


def _convolution(channels: str, bias: Flag) -> dict[str, SlotShape]:
    slots = {"conv.weight": SlotShape((channels, "1", "kernel"), "parameter")}
    return slots | ({"conv.bias": SlotShape((channels,), "bias")} if as_bool(bias) else {})
