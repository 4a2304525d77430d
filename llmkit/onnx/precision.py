"""The options for the weights of a graph: what they are stored and multiplied in, and their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.errors import InputError
from llmkit.transforms.layers import GroupSize

# What MatMulNBits computes products in. With 0 and 1 the CPU's kernel for 8 bits restores the whole matrix in each call
# (350 times the time of level 4, measured at one token), and that for 4 bits takes 4 times as long.
ACCURACY_LEVELS = {0: "the dtype of activations", 1: "float32", 4: "int8 activations"}
_FLOAT_BITS = 16


@dataclass(frozen=True, slots=True)
class Precision:
    """The options of weights.

    Attributes:
        bits: 4 or 8: quantize the linear layers; None: only keep what the checkpoint has on grids already.
        group_size, symmetric, keep, only: as of `llmkit.transforms.quantize.quantize`.
        method: the name of an entry point in `llmkit.methods`; None: round to nearest on the grid with the least error.
        embedding_bits: of the embedding and the head: 4, 8, or 16 for floats as they are. None: 8 where `bits` is
            given and products are fast in 8 bits.
        accuracy_level: of MatMulNBits (`ACCURACY_LEVELS`); None: 4 for the CPU.
        is_qdq: DequantizeLinear and MatMul, of which ONNX Runtime makes MatMulNBits when it loads them.
    """

    bits: int | None = None
    group_size: GroupSize = "auto"
    symmetric: bool | None = None
    keep: Sequence[str] = ()
    only: Sequence[str] = ()
    embedding_bits: int | None = None
    accuracy_level: int | None = None
    is_qdq: bool = False
    method: str | None = None

    def attrs(self) -> dict[str, Any]:
        """What was given, for the history; empty for nothing."""
        attrs: dict[str, Any] = {name: list(globs) for name in ("keep", "only") if (globs := getattr(self, name))}
        if self.bits is not None:
            names = ("bits", "group_size", "symmetric", "method", "embedding_bits")
            attrs |= {name: getattr(self, name) for name in names} | {"qdq": self.is_qdq}
        return attrs

    def level(self, provider: str) -> int:
        """The accuracy level on a provider."""
        return self.accuracy_level if self.accuracy_level is not None else 4 if provider == "cpu" else 0

    def bits_of_embedding(self, provider: str) -> int | None:
        """Bits of the embedding and the head; None for floats.

        Eight by default: on SmolLM2-135M perplexity does not notice them (18.35 for 18.38; four make it 21.04), and a
        head in float32 is 113 of the 174 MB that a token reads when the layers are int4. Floats where every product in
        8 bits would restore the head, and where the operators shall be the standard's.
        """
        if self.bits is None or self.why_float_embedding(provider) is not None:
            return None
        return 8 if self.embedding_bits is None else self.embedding_bits

    def why_float_embedding(self, provider: str) -> str | None:
        """Why embedding and head stay in floats; None where they do not."""
        if self.embedding_bits is not None:
            return f"--embedding-bits {_FLOAT_BITS}" if self.embedding_bits == _FLOAT_BITS else None
        if self.is_qdq:
            return "the standard has no operator for rows of integers"
        level = self.level(provider)
        return f"8 bits are slow at accuracy level {level}" if provider == "cpu" and level != 4 else None

    def refuse_unknown(self) -> None:
        """Refuse what the kernels do not have.

        Raises:
            InputError: bits of the embedding or an accuracy level that there is not; options that apply to nothing.
        """
        if self.embedding_bits not in (None, 4, 8, _FLOAT_BITS):
            what = f"--embedding-bits {self.embedding_bits}: expected 4, 8, or {_FLOAT_BITS} for floats"
            raise InputError(what, hint="--embedding-bits 8")
        if self.accuracy_level not in (None, *ACCURACY_LEVELS):
            levels = ", ".join(f"{level} ({what})" for level, what in ACCURACY_LEVELS.items())
            raise InputError(f"--accuracy-level {self.accuracy_level}: expected {levels}", hint="--accuracy-level 4")
        if self.bits is None and (self.embedding_bits is not None or self.group_size != "auto"):
            what = "--embedding-bits" if self.embedding_bits is not None else "--group-size"
            raise InputError(f"{what} says nothing without --bits", hint="give --bits 4 or --bits 8, too")
