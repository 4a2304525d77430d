"""What a method is: from a weight, and what was measured of its inputs, to rows of a matrix on a grid.

Most look at one weight at a time; a `BlockMethod` at all weights of a decoder block, and at what becomes of its output.
A `ScalingMethod` first gives the inputs of a weight a scale, where what comes before it can take that off.
A method is one module with an entry point in the group `llmkit.methods`. It knows no names and no files: which layers
are quantized is decided in `llmkit.transforms.layers`, how the result is stored by a codec.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

from llmkit import entry_points
from llmkit.errors import InputError, RequirementError
from llmkit.lazy_imports import torch
from llmkit.quantization.codec import error_context
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.packing import n_bytes
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.device import CPU, default_device, to_device
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType, TensorSpec

GROUP = "llmkit.methods"
N_WINDOWS = 128
_LOST = 0.999  # the share of the squared weights that is lost where nearly all become 0
# Receives (squared error, squared norm, rows) of what was just quantized.
Observe = Callable[[float, float, int], None]


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Rows of a `QuantizedMatrix`, and how far they are from the weights.

    Attributes:
        codes: uint8 [rows, n_bytes(in)], as of `llmkit.quantization.packing`.
        scales: [rows, groups], in the requested dtype, never 0.
        zeros: uint8 [rows, groups]; None where the grid is symmetric.
        order: int32 [in], the group of each column, from a method that `gives_order`; None elsewhere.
        squared_error: the sum over (w - w')^2, w' as it will be read.
        squared_norm: the sum over w^2.
        note: what the user should know of how it went, in a few words; empty for nothing.
        corrected: float32 [rows, in], the values that the codes are nearest to, where those are not the weights.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    squared_error: float
    squared_norm: float
    order: torch.Tensor | None = None
    note: str = ""
    corrected: torch.Tensor | None = None


class Method(ABC):
    """A way to put a weight on a grid.

    Attributes:
        name: as `--method` spells it.
        words: what it does, for the plan (`rounded to nearest`).
        needs: which fields of `Statistics` it cannot do without.
        uses: which others it looks at where they are there.
        is_row_wise: rows may be quantized in slices; each is computed from itself and the statistics alone.
        needs_zeros: it chooses zero points, and has nothing to choose on a symmetric grid.
        takes_points: weights may be put on what is no integer (`Grid.points`).
        n_windows: of a text that it is calibrated on, unless the user says otherwise.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()
    is_row_wise: ClassVar[bool] = True
    needs_zeros: ClassVar[bool] = False
    takes_points: ClassVar[bool] = False
    n_windows: int = N_WINDOWS

    @property
    def looks_at_inputs(self) -> bool:
        """Whether it uses statistics of the inputs."""
        return bool(self.needs | self.uses)

    def refuses(self, grid: Grid) -> str | None:
        """Why it cannot quantize to a grid; None if it can."""
        if grid.points is not None and not self.takes_points:
            return f"rounds to integers, and codes of {grid.points.name} are none"
        if self.needs_zeros and grid.is_symmetric:
            return "chooses zero points, and a symmetric grid has none"
        return None

    @abstractmethod
    def quantize(
        self, weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, statistics: Statistics | None = None
    ) -> QuantizedRows:
        """Rows of a weight [rows, in], float32, float16 or bfloat16, on `grid`.

        The last group may have fewer columns than the others.

        Raises:
            InputError: the weights hold NaN or infinities, or reach beyond the dtype of the scales.
        """

    def configured(self, *, iterations: int | None = None, act_order: bool | None = None) -> Self:
        """The method with other settings; None keeps the default.

        Args:
            iterations: of one that learns.
            act_order: columns are grouped by how large their inputs are, and the group of each is stored.

        Raises:
            InputError: it has no such setting.
        """
        if iterations is not None:
            raise InputError(f"--method {self.name} does not learn in iterations", hint="leave --iterations out")
        if act_order is not None:
            raise InputError(f"--method {self.name} has no order of columns", hint="--method gptq has; or leave it out")
        return self

    def gives_order(self, grid: Grid) -> bool:
        """Whether groups are not of neighbouring columns: there is an `order` then, and it is not row-wise."""
        return False

    def attrs(self) -> dict[str, Any]:
        """Its name and settings as plain data, for `explain` and the digest."""
        return {"method": self.name}


class BlockError(Protocol):
    """How far the outputs of a decoder block are from given ones, and which way its weights move them."""

    @property
    def n_samples(self) -> int:
        """Sequences whose outputs are compared."""

    def draw(self, n: int) -> list[int]:
        """So many of them at random, all drawn equally often; which ones depends on the run's seed alone."""

    def value(self, weights: Mapping[str, torch.Tensor], samples: Sequence[int]) -> list[float]:
        """The mean squared error over the outputs of each sample, with these weights [out, in] in place, by name."""

    def gradient(
        self, weights: Mapping[str, torch.Tensor], samples: Sequence[int]
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """The mean of these errors, and its gradient by each weight, float32 [out, in]."""

    def report(self, done: float, text: str) -> None:
        """Say in a few words what was reached with this share (0 to 1) of the block's work; raises where it stopped."""


@dataclass(frozen=True, eq=False)
class BlockWeight:
    """One weight of a block, for a `BlockMethod`.

    Attributes:
        weight: [out, in], float32, float16 or bfloat16.
        grid, scale_dtype, statistics: as of `Method.quantize`.
        start: what `quantize` made of it, of a method that `starts_in_order`.
    """

    weight: torch.Tensor
    grid: Grid
    scale_dtype: torch.dtype
    statistics: Statistics | None
    start: QuantizedRows | None = None


class BlockMethod(Method):
    """A way to put all weights of a decoder block on their grids together.

    `quantize` is what it begins with, from each weight alone.

    Attributes:
        starts_in_order: `quantize` comes before, each weight for the inputs that those before it give; otherwise all
            inputs are those of the block in floats.
    """

    is_row_wise = False
    starts_in_order: ClassVar[bool] = False

    @abstractmethod
    def quantize_block(self, weights: Mapping[str, BlockWeight], error: BlockError) -> dict[str, QuantizedRows]:
        """All of the weights, whole.

        Raises:
            InputError: as of `quantize`.
        """

    @abstractmethod
    def n_passes(self, n_samples: int, grid: Grid) -> float:
        """Work for a block, for the time that a plan tells: how often a sample goes forward, or (twice that) back."""


class ScalingMethod(Method):
    """A way that multiplies the columns of weights by a scale before they are put on a grid: x W^T = (x / s) (W s)^T.

    It is chosen from the inputs in the float block, for all weights that read x together; what makes x is divided by
    it. `quantize` gets the multiplied weights, and those of which nobody takes a scale off as they are.
    """

    @abstractmethod
    def input_scales(self, weights: Sequence[BlockWeight], source: torch.Tensor) -> torch.Tensor:
        """The scale of each output of what makes the inputs, float32 [outputs], all above 0.

        Args:
            weights: all that read the same inputs, [out, in] each, with the same statistics.
            source: int64 [in], the output that makes each column.

        Raises:
            InputError: as of `quantize`.
        """


def method_named(name: str, *, is_calibrated: bool | None = False) -> Method:
    """The method that `--method NAME` means.

    Args:
        is_calibrated: the inputs of layers are measured; None: that is not decided yet.

    Raises:
        InputError: there is none of that name, or it has no use for what is measured.
        RequirementError: it needs to know the inputs of layers, and they are not measured.
    """
    method = entry_points.by_name(GROUP, name, "--method", Method)  # type: ignore[type-abstract]
    if method.needs and is_calibrated is False:
        raise RequirementError(
            f"--method {name} needs {' and '.join(sorted(method.needs)).replace('_', ' ')} of the inputs of each layer",
            hint=f"llmkit quantize MODEL --bits 4 --method {name} --calibration FILE -o OUT measures them",
        )
    if is_calibrated and not method.looks_at_inputs:
        raise InputError(
            f"--method {name} does not look at the inputs of layers, which --calibration and --statistics tell",
            hint="leave --method out; or take --calibration none, and no --statistics",
        )
    return method


@dataclass(frozen=True, eq=False)
class Task:
    """One weight to be quantized.

    Attributes:
        weight: floats [out, in].
        method, grid: how, and on which points.
        scale_dtype: of the scales.
        name: of the weight, for messages.
        observe: told of the error of each slice.
        device: where the method computes, as `llmkit.tensors.device` names it.
    """

    weight: Lazy
    method: Method
    grid: Grid
    scale_dtype: DType
    name: str = ""
    observe: Observe | None = None
    device: str = CPU

    @cached_property
    def specs(self) -> dict[str, tuple[TensorSpec, int]]:
        """The parts of the matrix: name -> spec, and rows of the weight for one of its own (0: whole)."""
        n_out, n_in = self.weight.shape
        n_groups = self.grid.n_groups(n_in)
        specs = {
            "codes": (TensorSpec(DType.U8, (n_out, n_bytes(n_in, self.grid.bits))), 1),
            "scales": (TensorSpec(self.scale_dtype, (n_out, n_groups)), 1),
        }
        if not self.grid.is_symmetric:
            specs["zeros"] = (TensorSpec(DType.U8, (n_out, n_groups)), 1)
        if self.method.gives_order(self.grid):
            specs["order"] = (TensorSpec(DType.I32, (n_in,)), 0)
        return specs

    def attrs(self) -> dict[str, Any]:
        """Plain data, for `explain` and the digest."""
        where = {"device": self.device} if self.device != CPU else {}
        return {**self.method.attrs(), **self.grid.attrs(), **where}

    def quantize(self, rows: torch.Tensor, statistics: Statistics | None = None) -> QuantizedRows:
        """Rows [rows, in] of the weight on the grid; tensors of any device, and the result in memory.

        Raises:
            InputError: as of `Method.quantize`, or inputs that were no numbers, or weights that are all too small for
                the dtype of scales; naming the weight.
        """
        inputs = self.block_weight(rows, statistics)
        with error_context(self.name), default_device(self.device):
            result = self.method.quantize(inputs.weight, self.grid, inputs.scale_dtype, inputs.statistics)
            if 0 < _LOST * result.squared_norm < result.squared_error:
                self._require_held(rows)
            return to_device(result, CPU)

    def _require_held(self, rows: torch.Tensor) -> None:
        """Refuse weights that became zeros because no scale is as small as they are."""
        largest = float(rows.abs().max())
        if largest < torch.finfo(self.scale_dtype.torch).tiny:
            raise InputError(
                f"the weights reach {largest:.3g} only: with scales in {self.scale_dtype.torch_name} all would be 0",
                hint="leave this matrix in floats: quantize --keep",
            )

    def block_weight(
        self, weight: torch.Tensor, statistics: Statistics | None, start: QuantizedRows | None = None
    ) -> BlockWeight:
        """The whole weight [out, in], for a `BlockMethod`, on the task's device.

        Raises:
            InputError: inputs that were no numbers; naming the weight.
        """
        with error_context(self.name):
            if statistics is not None:
                statistics = to_device(statistics, self.device)
                statistics.require_finite()
            start = to_device(start, self.device) if start is not None else None
            return BlockWeight(weight.to(self.device), self.grid, self.scale_dtype.torch, statistics, start)

    def parts(self, rows: QuantizedRows) -> dict[str, torch.Tensor]:
        """The parts of rows by their names, in the dtypes and shapes of `specs`."""
        return {part: getattr(rows, part) for part in self.specs}

    def matrix(self, parts: Iterable[Lazy]) -> QuantizedMatrix:
        """The matrix of its parts, which are in the order of `specs`."""
        n_out, n_in = self.weight.shape
        by_name = dict(zip(self.specs, parts, strict=True))
        zeros, order = by_name.get("zeros"), by_name.get("order")
        codes, scales, dtype = by_name["codes"], by_name["scales"], self.weight.dtype
        return QuantizedMatrix(self.grid, (n_out, n_in), codes, scales, zeros, order=order, dtype=dtype)


class Quantizer(Protocol):
    """Makes the matrix of a task, knowing the inputs of each weight; `quantized` takes its place where nobody does."""

    @property
    def default_method(self) -> str:
        """The name of the best method that what is known suffices for, and that takes minutes."""

    def __call__(self, task: Task) -> QuantizedMatrix:
        """As of `quantized`."""

    def attrs(self) -> Mapping[str, Any]:
        """The source of the statistics, as plain data for the history."""

    def words(self) -> str:
        """The same for the plan (`calibrated on my.txt`)."""

    def changed(self) -> Mapping[str, Lazy]:
        """Other tensors that change together with the matrices, by name."""


def outside_blocks(task: Task, method: Method | None) -> Task:
    """The task of a weight in no block, whose inputs nothing measures, by a method that can do without.

    Raises:
        RequirementError: `method` is None: the task's own was asked for.
    """
    if method is not None:
        return replace(task, method=method)
    raise RequirementError(
        f"{task.name} is in no layer that is calibrated, and --method {task.method.name} needs to see its inputs",
        hint="leave --method out, and it is rounded by mse; or leave it in floats",
    )


def quantized(task: Task, measured: Mapping[str, Lazy] | None = None, n_tokens: float = 0) -> QuantizedMatrix:
    """A float matrix [out, in] as it is on the grid; computed when its parts are.

    Args:
        measured: fields of `Statistics` of its inputs; None where nothing is known.
        n_tokens: as of `Statistics`.
    """
    fields = measured or {}

    def fn(rows: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        known = None if measured is None else Statistics(n_tokens, **dict(zip(fields, values, strict=True)))
        quantized_rows = task.quantize(rows, known)
        if task.observe is not None:
            task.observe(quantized_rows.squared_error, quantized_rows.squared_norm, len(rows))
        return tuple(task.parts(quantized_rows).values())

    node = Apply(
        "quantize",
        [task.weight, *fields.values()],
        [spec for spec, _ in task.specs.values()],
        fn,
        task.attrs(),
        input_rows=[1, *[0] * len(fields)],
        row_step=1 if task.method.is_row_wise else None,
        output_rows=[per for _, per in task.specs.values()],
        scratch=1.0,
    )
    return task.matrix(node.outputs())
