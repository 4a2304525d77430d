"""The table of nodes: expressions as plain data, each node once, its inputs named by their places in the table."""

from __future__ import annotations

import json
from typing import Any

from llmkit.tensors.lazy import Lazy, Node


class NodeTable:
    """Nodes of many expressions; equal ones (op, parameters, spec, inputs) share an id.

    Attributes:
        nodes: `{"op": …, parameters, "spec": …, "inputs": [ids]}`; an id is a place in this list, and inputs come
            before what is made of them.
    """

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self._ids: dict[str, int] = {}
        self._seen: dict[tuple[int, int], tuple[Node, int]] = {}  # holds the node, so that its address stays its own

    def add(self, lazy: Lazy) -> int:
        """The id of an expression, which is added where it is new."""
        key = (id(lazy.node), lazy.index)
        if key not in self._seen:
            node: dict[str, Any] = {"op": lazy.node.op, **lazy.node.attrs, "spec": str(lazy.spec)}
            if lazy.node.inputs:
                node["inputs"] = [self.add(each) for each in lazy.node.inputs]
            number = self._ids.setdefault(json.dumps(node, sort_keys=True), len(self.nodes))
            if number == len(self.nodes):
                self.nodes.append(node)
            self._seen[key] = lazy.node, number
        return self._seen[key][1]
