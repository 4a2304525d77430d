"""The weights of a graph: initializers that hold what the checkpoint stores, as it stores it, or on integer grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmkit.architecture.model import Model
from llmkit.architecture.slots import Slot
from llmkit.errors import RequirementError
from llmkit.onnx.graph import CONTRIB, ELEMENTS, Graph, Value
from llmkit.onnx.integer_matrices import IntegerMatrices
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.rearrange import transpose
from llmkit.tensors.spec import DType

# (name, lazy tensor) -> the bytes of an initializer, or None: they lie in a file.
DataOf = Callable[[str, Lazy], bytes | None]


@dataclass(eq=False)
class GraphWeights:
    """Values of weights by slot, and the products with them.

    Attributes:
        graph: where nodes go.
        model: what slots there are.
        tensors: the checkpoint's tensors by name.
        data_of: the data of an initializer.
        dtype: the compute dtype, in ONNX's words; what is stored in another is cast once, when a session starts.
        grids: matrices that are computed from integers.
        stem: what the names of weights begin with.
        casts: names of initializers, and their values in the compute dtype.
        sums: of blocks of an input, by it and the block.
    """

    graph: Graph
    model: Model
    tensors: Mapping[str, Lazy]
    data_of: DataOf
    dtype: str
    grids: IntegerMatrices = field(default_factory=IntegerMatrices)
    stem: str = ""
    casts: dict[str, Value] = field(default_factory=dict)
    sums: dict[tuple[Value, int], Value] = field(default_factory=dict)

    def under(self, stem: str) -> GraphWeights:
        """The weights below `stem`."""
        return replace(self, stem=f"{self.stem}{stem}.")

    def has(self, leaf: str) -> bool:
        """True when the model has that weight."""
        return self.stem + leaf in self.model.stored_in

    def slot(self, leaf: str) -> Slot:
        """The slot that holds a weight."""
        return self.model.slots[self.model.stored_in[self.stem + leaf]]

    def lazy(self, slot: Slot) -> Lazy:
        """A slot's tensor."""
        return self.tensors[slot.name]

    def restored(self, slot: Slot) -> Lazy:
        """A slot's tensor in floats; of one that is on a grid what its integers stand for."""
        if slot.name not in self.grids.matrices:
            return self.lazy(slot)
        floats = self.grids.matrices[slot.name].matrix.dequantized(DType.F32)
        return transpose(floats) if slot.is_transposed else floats

    def value(self, leaf: str) -> Value:
        """The tensor of a weight that has a slot to itself, in the compute dtype."""
        return self._value(self.slot(leaf))

    def rows(self, leaf: str, at: Value) -> Any:
        """Rows of a table, [..., width] in the compute dtype. The table itself stays as it is stored, in the file."""
        slot = self.slot(leaf)
        if slot.name in self.grids.matrices:
            return self.grids.rows(self, slot.name, at)
        rows = self.graph.op("Gather", self._stored(slot), at)
        return rows if self._is_computed(self.tensors[slot.name]) else self._to(rows, self.dtype)

    def is_on_grid(self, slot: Slot) -> bool:
        """Whether a slot's matrix is computed from integers."""
        return slot.name in self.grids.matrices

    def number(self, value: float) -> Value:
        """A constant scalar in the compute dtype."""
        return self.computed(self.graph.number(value))

    def computed(self, value: Value) -> Value:
        """A float32 value in the compute dtype."""
        return value if self.dtype == "FLOAT" else self._to(value, self.dtype)

    def single(self, value: Value) -> Value:
        """A value of the compute dtype in float32."""
        return value if self.dtype == "FLOAT" else self._to(value, "FLOAT")

    def _to(self, value: Value, dtype: str) -> Value:
        converted: Value = self.graph.cast(value, dtype)
        return converted

    def block_sums(self, x: Value, block: int, n_blocks: int) -> Value:
        """The sums of blocks of x [B, S, K]: [B, S, blocks]; made once for all products with it."""
        key = (x, block)
        if key not in self.sums:
            blocks = self.graph.op("Reshape", x, self.graph.ints(0, 0, n_blocks, block))
            self.sums[key] = self.graph.op("ReduceSum", blocks, self.graph.ints(-1), keepdims=0)
        return self.sums[key]

    def derived(self, name: str, lazy: Lazy) -> Value:
        """A weight that the checkpoint does not hold as it is needed."""
        return self._as_computed(self.initializer(name, lazy), lazy)

    def initializer(self, name: str, lazy: Lazy) -> Value:
        """A tensor as it is.

        Raises:
            RequirementError: its dtype is none that graphs are computed from.
        """
        if lazy.dtype.name not in ELEMENTS:
            raise RequirementError(
                f"{name}: the ONNX export has no {lazy.dtype.name} weights; expected F32, F16 or BF16",
                hint="llmkit convert MODEL --to hf --dtype float32 -o OUT",
            )
        return self.graph.initializer(name, ELEMENTS[lazy.dtype.name], lazy.shape, self.data_of(name, lazy))

    def _stored(self, slot: Slot) -> Value:
        return self.initializer(slot.name, self.tensors[slot.name])

    def _value(self, slot: Slot) -> Value:
        return self._as_computed(self._stored(slot), self.tensors[slot.name])

    def _as_computed(self, value: Value, lazy: Lazy) -> Value:
        if self._is_computed(lazy):
            return value
        name = str(value.name)
        if name not in self.casts:
            self.casts[name] = self._to(value, self.dtype)
        return self.casts[name]

    def _is_computed(self, lazy: Lazy) -> bool:
        return ELEMENTS.get(lazy.dtype.name) == self.dtype

    def project(self, x: Value, names: Sequence[str]) -> list[Value]:
        """The linear layers `names` of x [B, S, in]: [B, S, out] each; fused ones are one product."""
        outputs: dict[str, Any] = {}
        for name in names:
            slot = self.slot(f"{name}.weight")
            if self.stem + name not in outputs:
                outputs |= self._outputs(x, slot)
        return [outputs[self.stem + name] for name in names]

    def linear(self, x: Value, name: str) -> Value:
        """One linear layer."""
        return self.project(x, [name])[0]

    def _outputs(self, x: Value, slot: Slot) -> dict[str, Any]:
        bias = self.model.slots.get(slot.id.removesuffix("weight") + "bias")
        y = self.product(x, slot, self._value(bias) if bias is not None else None)
        parts = [part.id.removesuffix(".weight") for part in slot.parts]
        if len(parts) == 1:
            return {parts[0]: y}
        sizes = [part.rows for part in slot.parts]
        if slot.groups > 1:
            y = self.graph.op("Reshape", y, self.graph.ints(0, 0, slot.groups, sum(sizes)))
        pieces = self.graph.op("Split", y, self.graph.ints(*sizes), n=len(sizes), axis=-1)
        if slot.groups > 1:
            shape = [self.graph.ints(0, 0, slot.groups * size) for size in sizes]
            pieces = [self.graph.op("Reshape", p, s) for p, s in zip(pieces, shape, strict=True)]
        return dict(zip(parts, pieces, strict=True))

    def product(self, x: Value, slot: Slot, bias: Value | None = None) -> Any:
        """X [B, S, in] with a stored matrix: [B, S, out]. ONNX Runtime takes [out, in] as it is."""
        if slot.name in self.grids.matrices:
            return self.grids.product(self, x, slot.name, bias)
        if slot.is_transposed:
            y = self.graph.op("MatMul", x, self._value(slot))
        else:
            y = self.graph.op("FusedMatMul", x, self._value(slot), domain=CONTRIB, transB=1)
        return y if bias is None else self.graph.op("Add", y, bias)
