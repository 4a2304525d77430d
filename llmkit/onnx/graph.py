"""A graph under construction: nodes in order, named by where they are made, constants shared.

Written as ONNX's own messages: onnx-ir, which has more to offer, takes 0.4 s to import (it imports sympy), as long as
all else that a linked export does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmkit.lazy_imports import np, onnx
from llmkit.version import __version__

OPSET = 23  # the first with RotaryEmbedding, RMSNormalization and Attention
IR_VERSION = 10
CONTRIB = "com.microsoft"
ELEMENTS = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "U8": "UINT8"}
"""What ONNX calls the element types of weights, by our names."""

Shape = Sequence[int | str]  # names are free dimensions, the same where the name is


def element_type(name: str) -> int:
    """The number of an element type, such as FLOAT."""
    return int(onnx.TensorProto.DataType.Value(name))


@dataclass(eq=False, slots=True)
class Value:
    """An input, an initializer, or an output of a node.

    Attributes:
        name: "" for an output that nothing reads.
        dtype, shape: None where they follow from the node.
        data: of an initializer: its bytes; None where they lie in a file.
    """

    name: str
    dtype: str | None = None
    shape: Shape | None = None
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Node:
    domain: str
    op_type: str
    name: str
    inputs: list[Value | None]
    outputs: tuple[Value, ...]
    attributes: dict[str, Any]

    def proto(self) -> onnx.NodeProto:
        from onnx import helper

        operands = list(self.inputs)
        while operands and operands[-1] is None:
            operands.pop()
        inputs = [value.name if value is not None else "" for value in operands]
        attributes = {k: v.proto() if isinstance(v, Graph) else v for k, v in self.attributes.items()}
        outputs = [value.name for value in self.outputs]
        return helper.make_node(self.op_type, inputs, outputs, self.name, domain=self.domain or None, **attributes)


class Graph:
    """Collects inputs, nodes, initializers and outputs; `model()` is the finished ONNX model.

    Args:
        name: of the graph.
        outer: the graph that it is a part of, as the body of a loop: constants and weights go there.
    """

    def __init__(self, name: str, outer: Graph | None = None) -> None:
        self.name = name
        self._outer = outer
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.nodes: list[_Node] = []
        self.initializers: dict[str, Value] = {}
        self._scope: list[str] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._taken: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes made inside are named below `name`."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, dtype: str, shape: Shape) -> Value:
        """A graph input."""
        self.inputs.append(Value(name, dtype, shape))
        return self.inputs[-1]

    def output(self, value: Value, name: str, dtype: str, shape: Shape, *, is_first: bool = False) -> None:
        """Make `value` an output."""
        value.name, value.dtype, value.shape = name, dtype, shape
        self.outputs.insert(0 if is_first else len(self.outputs), value)

    def op(self, op_type: str, *inputs: Value | None, domain: str = "", n: int = 1, **attributes: Any) -> Any:
        """A node; its output, or a tuple of `n`. Inputs left out are None, and attributes too; one may be a graph."""
        base = "/".join(["", *self._scope, op_type])
        count = self._taken.get(base, 0)
        self._taken[base] = count + 1
        name = f"{base}_{count}" if count else base
        outputs = tuple(Value(f"{name}/output_{i}") for i in range(n))
        stated = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(_Node(domain, op_type, name, list(inputs), outputs, stated))
        return outputs[0] if n == 1 else outputs

    def cast(self, value: Value, dtype: str) -> Any:
        """A value in another element type."""
        return self.op("Cast", value, to=element_type(dtype))

    def constant(self, array: np.ndarray[Any, Any]) -> Value:
        """A small constant as an initializer; equal ones are one."""
        from onnx import TensorProto, helper

        if self._outer is not None:
            return self._outer.constant(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            dtype = TensorProto.DataType.Name(helper.np_dtype_to_tensor_dtype(array.dtype))
            name = f"/constants/{array.dtype}_{len(self._constants)}"
            self._constants[key] = self.initializer(name, dtype, array.shape, key[2])
        return self._constants[key]

    def ints(self, *values: int) -> Value:
        """A constant vector of int64."""
        return self.constant(np.array(values, dtype=np.int64))

    def number(self, value: float) -> Value:
        """A constant scalar of float32."""
        return self.constant(np.array(value, dtype=np.float32))

    def initializer(self, name: str, dtype: str, shape: Shape, data: bytes | None) -> Value:
        """A constant or a weight (by its name in the checkpoint): little-endian bytes, or None for those of a file."""
        if self._outer is not None:
            return self._outer.initializer(name, dtype, shape, data)
        if name not in self.initializers:
            self.initializers[name] = Value(name, dtype, shape, data)
        return self.initializers[name]

    def proto(self) -> onnx.GraphProto:
        """The graph as a message. Initializers without data have neither data nor a place yet."""
        held = []
        for value in self.initializers.values():
            kind, dims = element_type(value.dtype or ""), [int(n) for n in value.shape or ()]
            held.append(onnx.TensorProto(name=value.name, data_type=kind, dims=dims, raw_data=value.data))
        nodes = [node.proto() for node in self.nodes]
        inputs, outputs = ([_typed(value) for value in values] for values in (self.inputs, self.outputs))
        return onnx.GraphProto(name=self.name, node=nodes, initializer=held, input=inputs, output=outputs)

    def model(self, metadata: dict[str, str] | None = None, about: str = "") -> onnx.ModelProto:
        """The finished model.

        Args:
            about: its `doc_string`: what a user of the graph has to know.
        """
        proto = onnx.ModelProto(
            ir_version=IR_VERSION,
            producer_name="llmkit",
            producer_version=__version__,
            graph=self.proto(),
            doc_string=about or None,
        )
        for domain, version in (("", OPSET), (CONTRIB, 1)):
            proto.opset_import.add(domain=domain, version=version)
        for key, value in sorted((metadata or {}).items()):
            proto.metadata_props.add(key=key, value=value)
        return proto


def _typed(value: Value) -> onnx.ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(value.name, element_type(value.dtype or ""), value.shape)
