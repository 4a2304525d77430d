"""Several lazy tensors as outputs of one node, so that what they have in common is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmkit.tensors.lazy import Apply, Lazy, Node, Read


def siblings(lazies: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The same tensors; those that depend on a node of several outputs are computed and written together,
    and constants with them.

    Without it each would be a step of its own, and the node computed in all of them.
    """
    if sum(_has_group(lazy.node) for lazy in lazies.values()) < 2:
        return dict(lazies)
    together = [name for name, lazy in lazies.items() if _has_group(lazy.node) or _is_constant(lazy)]
    return dict(lazies) | dict(zip(together, _Siblings([lazies[name] for name in together]).outputs(), strict=True))


def without_siblings(lazy: Lazy) -> Lazy:
    """The same tensor, computed without its siblings."""
    return lazy.node.inputs[lazy.index] if isinstance(lazy.node, _Siblings) else lazy


def _has_group(node: Node) -> bool:
    return len(node.specs) > 1 or any(_has_group(lazy.node) for lazy in node.inputs)


def _is_constant(lazy: Lazy) -> bool:
    return not lazy.node.inputs and not isinstance(lazy.node, Read)


class _Siblings(Apply):
    def __init__(self, lazies: Sequence[Lazy]) -> None:
        super().__init__(
            "together",
            lazies,
            [lazy.spec for lazy in lazies],
            lambda *parts: parts,
            input_rows=[0 if _is_constant(lazy) else 1 for lazy in lazies],
            output_rows=[0 if _is_constant(lazy) else _rows_in_one(lazy) for lazy in lazies],
        )

    def widest_inputs(self) -> list[Lazy]:
        widest, pending = [], list(self.inputs)
        while pending:
            lazy = pending.pop()
            widest.append(lazy)
            pending.extend(lazy.node.inputs)
        return widest


def _rows_in_one(lazy: Lazy) -> int:
    """Rows of the node's row space that one row of the tensor covers."""
    node = lazy.node
    if node.row_step is None:
        return 1
    start, stop = node.output_rows(lazy.index, (0, node.row_step))
    return node.row_step // max(stop - start, 1)
