"""Tensors that are computed alike: one expression for each pattern, and the others made when they are asked for.

The weights of a layer's experts differ by where they lie, a hundred thousand times in the largest models. A plan needs
to know of each only where it is read and written; slices, memory and what is computed are those of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from typing import Any

from llmkit.errors import SpecError
from llmkit.tensors.lazy import Lazy, Node, Origin, Read, reads_below
from llmkit.tensors.spec import TensorSpec

Make = Callable[..., Mapping[str, Lazy]]


class Alike:
    """Makes tensors of stored ones; those of one pattern after the first two are made when their node is asked for.

    Args:
        make: gets the inputs, and what else it is called with; gives tensors by name. What it makes depends on the
            dtypes and shapes of the inputs and on the kind. By what else it gets, values may be counted or errors
            named; that is not part of the expression.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._first: dict[Hashable, tuple[dict[str, Lazy], tuple[Lazy, ...]]] = {}
        self._patterns: dict[Hashable, _Pattern | None] = {}  # None: two of the kind have not the same form

    def __call__(self, kind: Hashable, inputs: tuple[Lazy, ...], *others: Any) -> dict[str, Lazy]:
        """The tensors made of `inputs` in the way that `kind` tells."""
        forms = [lazy.origin.form() for lazy in inputs if isinstance(lazy.origin, Read)]
        if len(forms) < len(inputs):
            return dict(self._make(*inputs, *others))
        key = (kind, *forms)
        if (pattern := self._patterns.get(key)) is not None:
            return pattern.like(inputs, others)
        made = dict(self._make(*inputs, *others))
        if key not in self._first:
            self._first[key] = made, inputs
        elif key not in self._patterns:
            first, its = self._first[key]
            are_alike = all(lazy.origin.form() == made[name].origin.form() for name, lazy in first.items())
            self._patterns[key] = _Pattern(self._make, first, its) if are_alike else None
        return made


class _Pattern:
    """What all of one kind have in common.

    Args:
        made: the tensors of the first.
        inputs: what those were made of.
    """

    def __init__(self, make: Make, made: Mapping[str, Lazy], inputs: tuple[Lazy, ...]) -> None:
        self.make, self._inputs = make, inputs
        given = {id(lazy): i for i, lazy in enumerate(inputs)}
        # For each tensor which input it is, or of which node it is which output.
        self._passed = {name: given[id(lazy)] for name, lazy in made.items() if id(lazy) in given}
        samples: dict[Origin, _Sample] = {}
        for name, lazy in made.items():
            if name not in self._passed and lazy.origin not in samples:
                samples[lazy.origin] = _Sample(self, name, lazy.node)
        self._samples = tuple(samples.values())
        numbers = {origin: i for i, origin in enumerate(samples)}
        self._outputs = {n: (numbers[x.origin], x.index) for n, x in made.items() if n not in self._passed}

    def like(self, inputs: tuple[Lazy, ...], others: tuple[Any, ...]) -> dict[str, Lazy]:
        """The same of other inputs."""
        deferred = [Deferred(sample, inputs, others) for sample in self._samples]
        tensors = {name: Lazy(deferred[number], index) for name, (number, index) in self._outputs.items()}
        return tensors | {name: inputs[place] for name, place in self._passed.items()} if self._passed else tensors

    def digest(self, node: Node) -> str:
        """Of how a node is made, of whatever inputs."""
        contents = {lazy.node: f"input {i}" for i, lazy in enumerate(self._inputs)}
        contents |= {read: read.fingerprint() for read in reads_below([node]) if read not in contents}
        return node.content_fingerprint(contents)


class _Sample:
    """A node of the first of a pattern, and what it has in common with those of the others.

    Attributes:
        name: a tensor that is an output of it.
    """

    def __init__(self, pattern: _Pattern, name: str, node: Node) -> None:
        self.pattern, self.name, self.node, self.specs, self.form = pattern, name, node, node.specs, node.form()

    @cached_property
    def digest(self) -> str:
        return self.pattern.digest(self.node)


class Deferred:
    """A node that is made when it is asked for."""

    __slots__ = ("_node", "_others", "_sample", "inputs")

    def __init__(self, sample: _Sample, inputs: tuple[Lazy, ...], others: tuple[Any, ...]) -> None:
        self._sample, self.inputs, self._others = sample, inputs, others
        self._node: Node | None = None

    @property
    def sample(self) -> Node:
        """The node of the first of its pattern, which has the same form."""
        return self._sample.node

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Dtype and shape of each output."""
        return self._sample.specs

    @property
    def node(self) -> Node:
        """The node itself, which is made now."""
        if self._node is None:
            name = self._sample.name
            node = self._sample.pattern.make(*self.inputs, *self._others)[name].node
            if node.form() != self._sample.form:
                raise SpecError(f"{name} of {self.inputs} is not made as the first of its pattern: a bug")
            self._node = node
        return self._node

    def form(self) -> object:
        """As of the node."""
        return self._sample.form

    def fingerprint(self) -> str:
        """Identifies the expression, as that of a node does."""
        places = [read.place for lazy in self.inputs if isinstance(read := lazy.origin, Read)]
        return f"{self._sample.digest}({', '.join(places)})"
