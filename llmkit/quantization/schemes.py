"""Quantization schemes: bits, groups and symmetry, and how compressed-tensors writes them in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.errors import SpecError

__all__ = ["GROUP_SIZES", "METHOD", "PACKED_FORMAT", "Scheme"]

METHOD = "compressed-tensors"
PACKED_FORMAT = "pack-quantized"
# What the int4/int8 kernels of inference servers (vLLM's Marlin) read, besides one group a row.
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weight of a linear layer is put on an integer grid.

    Attributes:
        bits: 4 or 8.
        group_size: input columns that share a scale; None for one scale an output row ("per channel").
        is_symmetric: the grid is centred on zero; otherwise each group has a zero point.

    Raises:
        SpecError: bits or group size that the layout cannot hold.
    """

    bits: int
    group_size: int | None = None
    is_symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise SpecError(
                f"weights of {self.bits} bits are not supported; expected 4 or 8", hint="--bits 4 or --bits 8"
            )
        if self.group_size is not None and self.group_size < 1:
            raise SpecError(f"group size {self.group_size} is not a positive number of columns")

    @property
    def per_word(self) -> int:
        """Values in one int32 word."""
        return 32 // self.bits

    @property
    def q_min(self) -> int:
        """Smallest grid point."""
        return -(1 << (self.bits - 1))

    @property
    def q_max(self) -> int:
        """Largest grid point."""
        return (1 << (self.bits - 1)) - 1

    def n_groups(self, n_columns: int) -> int:
        """Scales in a row of `n_columns` weights (which the group size divides)."""
        return 1 if self.group_size is None else n_columns // self.group_size

    def divides(self, n_columns: int) -> bool:
        """Whether rows of this length fall into whole groups."""
        return self.group_size is None or n_columns % self.group_size == 0

    def bits_per_weight(self, shape: tuple[int, int], scale_bits: int = 16) -> float:
        """Stored bits for each weight of a matrix [out, in], scales, zero points and padding included."""
        n_out, n_in = shape
        words = n_out * -(-n_in // self.per_word)
        if not self.is_symmetric:
            words += -(-n_out // self.per_word) * self.n_groups(n_in)
        shape_bits = 2 * 64  # weight_shape
        return (32 * words + scale_bits * n_out * self.n_groups(n_in) + shape_bits) / (n_out * n_in)

    def __str__(self) -> str:
        groups = "per channel" if self.group_size is None else f"group {self.group_size}"
        return f"int{self.bits} {groups} {'symmetric' if self.is_symmetric else 'asymmetric'}"

    def attrs(self) -> dict[str, Any]:
        """The scheme as plain data, for `explain`, the digest and the history."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.is_symmetric}

    def quantization_config(
        self, *, targets: Sequence[str] = ("Linear",), ignore: Sequence[str] = ()
    ) -> dict[str, Any]:
        """`quantization_config` of config.json, as compressed-tensors writes it for weights only.

        Eight bits are packed too (`pack-quantized`, four values a word): it is what compressed-tensors infers for
        weight-only integers, and what servers read as W8A16. `int-quantized` means quantized activations there.

        Args:
            targets: classes or exact names of the modules that are quantized.
            ignore: exact names of modules of those classes that are left alone.
        """
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.is_symmetric,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "block_structure": None,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        # transformers 5 decompresses while it loads. Left packed, modules have no `weight`, which the classes of some
        # families read (Falcon's forward, RWKV's initialization), and compressed-tensors 0.18 to 0.20 expects zero
        # points of another shape than it writes. 4.57 loads zero points with compressed-tensors 0.14 to 0.17.
        group = {"targets": list(targets), "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": METHOD,
            "format": PACKED_FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "run_compressed": False,
        }

    @classmethod
    def from_weights(cls, weights: Mapping[str, Any]) -> Scheme:
        """The scheme of the `weights` entry of a config group.

        Raises:
            SpecError: floats, dynamic grids, or strategies other than group and channel.
        """
        if not isinstance(weights, Mapping):
            raise SpecError(f"compressed-tensors weights are {str(weights)[:60]!r}, expected an object")
        kind, strategy = weights.get("type", "int"), weights.get("strategy")
        group_size, bits = weights.get("group_size"), weights.get("num_bits")
        if type(bits) is not int or type(group_size) not in (int, type(None)):
            raise SpecError(
                f"compressed-tensors weights of num_bits {str(bits)[:60]!r}, group_size {str(group_size)[:60]!r}"
            )
        if strategy is None:  # as compressed-tensors infers it
            strategy = "group" if group_size and group_size > 0 else "channel" if group_size == -1 else "tensor"
        if kind != "int" or strategy not in ("group", "channel") or weights.get("dynamic"):
            raise SpecError(
                f"compressed-tensors weights of type {kind!r}, strategy {strategy!r}"
                f"{', dynamic' if weights.get('dynamic') else ''} are not read; expected int, group or channel, static"
            )
        if strategy == "group" and (group_size is None or group_size < 1):
            raise SpecError(f"compressed-tensors weights of strategy 'group' with group_size {group_size!r}")
        return cls(
            bits,
            group_size if strategy == "group" else None,
            bool(weights.get("symmetric", True)),
        )
