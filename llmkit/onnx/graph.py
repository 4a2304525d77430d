"""A graph under construction: nodes in order, named by where they are made, constants shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

__all__ = ["CONTRIB", "IR_VERSION", "OPSET", "Graph"]

OPSET = 23  # the first with RotaryEmbedding, RMSNormalization and Attention
IR_VERSION = 10
CONTRIB = "com.microsoft"


class Graph:
    """Collects inputs, nodes, initializers and outputs; `model()` is the finished ONNX model.

    Args:
        name: of the graph.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._scope: list[str] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._taken: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes made inside are named below `name`."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        """A graph input; names in `shape` are free dimensions, the same where the name is."""
        value = self._typed(name, dtype, shape)
        self.inputs.append(value)
        return value

    def output(
        self, value: ir.Value, name: str, dtype: str, shape: Sequence[int | str], *, is_first: bool = False
    ) -> None:
        """Make `value` an output."""
        typed = self._typed(name, dtype, shape)
        value.name, value.type, value.shape = typed.name, typed.type, typed.shape
        self.outputs.insert(0 if is_first else len(self.outputs), value)

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", n: int = 1, **attributes: Any) -> Any:
        """A node; its output, or a tuple of `n`. Inputs left out in the middle are None."""
        import onnx_ir as ir

        base = "/".join(["", *self._scope, op_type])
        count = self._taken.get(base, 0)
        self._taken[base] = count + 1
        name = f"{base}_{count}" if count else base
        given = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items() if v is not None]
        node = ir.Node(domain, op_type, inputs=list(inputs), attributes=given, num_outputs=n, name=name)
        for i, out in enumerate(node.outputs):
            out.name = f"{name}/output_{i}"
        self.nodes.append(node)
        return node.outputs[0] if n == 1 else tuple(node.outputs)

    def constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        """A small constant as an initializer; equal ones are one."""
        import onnx_ir as ir

        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = f"/constants/{array.dtype}_{len(self._constants)}"
            self._constants[key] = self.initializer(name, ir.tensor(array, name=name))
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A constant vector of int64."""
        import numpy as np

        return self.constant(np.array(values, dtype=np.int64))

    def number(self, value: float) -> ir.Value:
        """A constant scalar of float32."""
        import numpy as np

        return self.constant(np.array(value, dtype=np.float32))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A weight, by its name in the checkpoint."""
        import onnx_ir as ir

        if name not in self.initializers:
            self.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return self.initializers[name]

    def model(self, metadata: dict[str, str] | None = None) -> ir.Model:
        """The finished model."""
        import onnx_ir as ir

        from llmkit.version import __version__

        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, CONTRIB: 1},
            name=self.name,
        )
        made = ir.Model(graph, ir_version=IR_VERSION, producer_name="llmkit", producer_version=__version__)
        made.metadata_props.update(metadata or {})
        return made

    @staticmethod
    def _typed(name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        import onnx_ir as ir

        return ir.Value(name=name, type=ir.TensorType(ir.DataType[dtype]), shape=ir.Shape(list(shape)))
