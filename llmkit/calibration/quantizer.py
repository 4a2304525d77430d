"""Weights quantized one block after the other: each for the inputs it has once the layers before it are quantized.

All matrices are planned at once. When the runner asks for the parts of one, every block up to its own is computed, in
order, and kept in the run's workspace (`llmkit.pipeline.stage`), from where those of the others are read. An
interrupted run goes on behind the last whole block.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from llmkit.architecture.slots import Slot
from llmkit.architecture.storage import parts_of
from llmkit.calibration.blocks import CHUNK_NBYTES, Blocks
from llmkit.calibration.observers import Observer
from llmkit.calibration.texts import CalibrationText, token_ids, windows
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError, RequirementError
from llmkit.pipeline.pool import all_cores
from llmkit.pipeline.stage import Block, Computed, Stage
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.method import Method, Observe, QuantizedRows, Specs, matrix_from, part_specs
from llmkit.tensors.lazy import Apply, Context, Lazy, Node, Rows
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.tensors.stopped import Stopped

if TYPE_CHECKING:
    import torch

__all__ = ["CalibratedQuantizer", "Samples"]


@dataclass(frozen=True, slots=True)
class Samples:
    """The windows of a text that a model is calibrated on.

    Attributes:
        n: how many; all there are, where the text is shorter.
        length: of each, in tokens.
        seed: of the choice among all windows of the text.
    """

    text: CalibrationText
    n: int = 128
    length: int = 512
    seed: int = 0

    def attrs(self) -> dict[str, Any]:
        """Plain data, for the plan, the history and `explain`."""
        return {
            "calibration": self.text.label, "sha256": self.text.digest, "samples": self.n, "length": self.length,
            "seed": self.seed,
        }  # fmt: skip

    def rows(self, tokenized: Checkpoint, ends: Sequence[int], context: int | None) -> list[list[int]]:
        """Token ids, all rows of one length.

        Raises:
            InputError: the text has fewer tokens than one sample.
        """
        from llmkit.checkpoint.tokenizer import load_tokenizer

        ids = token_ids(self.text, load_tokenizer(tokenized))
        length = min(self.length, context or self.length)
        if len(ids) + len(ends) < length:
            raise InputError(
                f"{self.text.label} has {len(ids)} tokens, fewer than one sample of {length}",
                hint=f"give a longer text, or --length {max(len(ids) // 2, 1)}",
            )
        return windows(ids, length, samples=self.n, seed=self.seed, ends=ends)


@dataclass(frozen=True, eq=False)
class _Job:
    weight: Lazy
    slot: Slot
    method: Method
    grid: Grid
    scale_dtype: DType
    observe: Observe | None
    specs: Specs


class CalibratedQuantizer:
    """Makes quantized matrices of the linear layers of one model; takes the place of `quantized`.

    Args:
        ckpt: float tensors, and the tokenizer.
        samples: what it is calibrated on.

    Raises:
        RequirementError: no plugin describes the model.
    """

    def __init__(self, ckpt: Checkpoint, samples: Samples) -> None:
        self._ckpt, self._samples = ckpt, samples
        self._slots = ckpt.require_model().tensors()
        self._heights = {part.id: part.shape[0] for slot in self._slots.values() for part in slot.parts if part.shape}
        self._jobs: dict[str, _Job] = {}
        self._guard = threading.Lock()
        self._run: Iterator[Block] | None = None
        self._done: list[Block] = []
        self._blocks: Blocks | None = None

    def attrs(self) -> dict[str, Any]:
        """Plain data, for the history."""
        return self._samples.attrs()

    def __call__(
        self,
        weight: Lazy,
        method: Method,
        grid: Grid,
        scale_dtype: DType,
        *,
        name: str = "",
        observe: Observe | None = None,
    ) -> QuantizedMatrix:
        """As `llmkit.quantization.method.quantized`.

        Raises:
            RequirementError: the weight is in no block, and the method cannot do without statistics.
        """
        slot = self._slots[name]
        if slot.layer is None and method.needs:
            raise RequirementError(
                f"{name} is in no layer that is calibrated, and --method {method.name} needs to see its inputs",
                hint=f"leave it in floats (--keep {name.removesuffix('.weight')}), or take --method mse",
            )
        specs = part_specs(weight.shape, method, grid, scale_dtype)
        self._jobs[name] = _Job(weight, slot, method, grid, scale_dtype, observe, specs)
        made = dict(zip(specs, _Calibrated(self, name, self._jobs[name]).outputs(), strict=True))
        return matrix_from(made, grid, weight.shape)

    def parts(self, name: str, context: Context) -> dict[str, torch.Tensor]:
        """The parts of one matrix; computes the blocks up to its own where that is not done."""
        with self._guard, all_cores():
            job = self._jobs[name]
            if job.slot.layer is None:
                return _parts(job, job.method.quantize(job.weight.load(), job.grid, job.scale_dtype.torch))
            block = self._block(job.slot.layer, context)
            if job.observe is not None:
                error, norm = block.result[name]
                job.observe(error, norm, job.weight.shape[0])
            return {part: block.kept[f"{name}.{part}"].load() for part in job.specs}

    def peak_nbytes(self, name: str) -> int:
        """Memory for all of the work, which the first matrix is charged with: one is computed at a time.

        In float32 a block and its widest matrix four times over (the weight, its second moments, their factors), and
        the hidden states of all samples before and after it.
        """
        if name != next(iter(self._jobs)):
            return 0
        dims = self._ckpt.require_model().dims
        block = sum(slot.numel for slot in self._slots.values() if slot.layer == 0)
        widest = max(max(job.weight.spec.numel, job.weight.shape[1] ** 2) for job in self._jobs.values())
        hidden = self._samples.n * self._samples.length * dims.hidden
        return 4 * (block + 4 * widest + 2 * hidden) + min(CHUNK_NBYTES, 16 * hidden * (2 + dims.ffn // dims.hidden))

    def _digest(self) -> str:
        body: list[Any] = [self._samples.attrs(), {n: t.node.fingerprint() for n, t in self._ckpt.tensors.items()}]
        body += [[n, j.method.name, j.grid.attrs(), j.scale_dtype.name] for n, j in self._jobs.items()]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def _block(self, index: int, context: Context) -> Block:
        """A layer, computed after those before it where that is not done."""
        if self._run is None:
            path = context.workspace / "layers" if context.workspace is not None else None
            stage = Stage(path, self._digest(), in_workspace=path is not None)
            n_layers = 1 + max(job.slot.layer for job in self._jobs.values() if job.slot.layer is not None)
            self._run = stage.run([str(i) for i in range(n_layers)], partial(self._computed, context))
        while len(self._done) <= index:
            block = next(self._run, None)
            if block is None:  # the layer failed, or the run was stopped in it, for whoever asked first
                raise Stopped
            self._done.append(block)
        return self._done[index]

    def _computed(self, context: Context, name: str, state: Mapping[str, Lazy]) -> Computed:
        """One layer quantized: its parts are kept, its hidden states go on to the next."""
        index, blocks = int(name), self._begin()
        hidden = state["hidden"].load() if state else blocks.embedded()
        jobs = {n: j for n, j in self._jobs.items() if j.slot.layer == index}
        onlooker = _Quantizing(jobs, self._heights, context)
        hidden = blocks.run(index, hidden, onlooker)
        onlooker.require_all()
        return Computed(onlooker.errors, [("hidden", hidden)], onlooker.results.items())

    def _begin(self) -> Blocks:
        if self._blocks is None:
            import torch

            from llmkit.decoder.load import load_blocks

            decoder, weights = load_blocks(self._ckpt)
            model = self._ckpt.require_model()
            ends = self._ckpt.architecture.ends_of(self._ckpt.config) if self._ckpt.architecture else ()
            rows = self._samples.rows(self._ckpt, ends, model.dims.context)
            self._blocks = Blocks(decoder, weights, torch.tensor(rows))
        return self._blocks


class _Quantizing:
    """Quantizes the layers of one block as their inputs become complete."""

    def __init__(self, jobs: Mapping[str, _Job], heights: Mapping[str, int], context: Context) -> None:
        self._jobs, self._heights, self._context = jobs, heights, context
        self._of_weight = {part.id: name for name, job in jobs.items() for part in job.slot.parts}
        self._observers: dict[tuple[str, ...], Observer] = {}
        self.results: dict[str, torch.Tensor] = {}
        self.errors: dict[str, tuple[float, float]] = {}

    def _names(self, weights: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(self._of_weight[w] for w in weights if w in self._of_weight))

    def see(self, weights: Sequence[str], x: torch.Tensor) -> None:
        if self._context.is_stopped():
            raise Stopped
        names = self._names(weights)
        if names:
            needs = frozenset[str]().union(*(self._jobs[n].method.needs | {"squares"} for n in names))
            self._observers.setdefault(tuple(weights), Observer(needs)).see(x)

    def settle(self, weights: Sequence[str], values: torch.Tensor) -> torch.Tensor:
        import torch

        names = self._names(weights)
        if not names:
            return values
        statistics = self._observers.pop(tuple(weights)).statistics()
        replaced: dict[str, torch.Tensor] = {}
        for name in names:
            if self._context.is_stopped():
                raise Stopped
            job = self._jobs[name]
            try:
                made = job.method.quantize(job.weight.load(), job.grid, job.scale_dtype.torch, statistics)
            except InputError as error:
                raise InputError(f"{name}: {error.message}", hint=error.hint) from error
            parts = _parts(job, made)
            self.results |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            self.errors[name] = made.squared_error, made.squared_norm
            constant = {part: _constant(tensor) for part, tensor in parts.items()}
            matrix = matrix_from(constant, job.grid, job.weight.shape)
            restored = parts_of(matrix.dequantized(job.scale_dtype), job.slot)
            replaced |= {weight: lazy.load().to(values.dtype) for weight, lazy in restored.items() if weight in weights}
        own = dict(zip(weights, values.split([self._heights[weight] for weight in weights]), strict=True))
        return torch.cat([replaced.get(weight, own[weight]) for weight in weights])

    def require_all(self) -> None:
        """Refuse a layer that the decoder never called.

        Raises:
            RequirementError: naming it.
        """
        missing = [name for name in self._jobs if name not in self.errors]
        if missing:
            raise RequirementError(
                f"{missing[0]} has inputs that calibration does not see",
                hint=f"leave it in floats: --keep {missing[0].removesuffix('.weight')}",
            )


def _parts(job: _Job, made: QuantizedRows) -> dict[str, torch.Tensor]:
    return {part: getattr(made, part) for part in job.specs}


def _constant(tensor: torch.Tensor) -> Lazy:
    spec = TensorSpec(DType.of(tensor.dtype), tuple(tensor.shape))
    return Apply("constant", [], spec, lambda: tensor, row_step=None, output_rows=[0]).output()


class _Calibrated(Node):
    """The parts of one matrix, as `CalibratedQuantizer` computes them."""

    op = "quantize"

    def __init__(self, quantizer: CalibratedQuantizer, name: str, job: _Job) -> None:
        self._quantizer, self._name, self._job = quantizer, name, job
        self.inputs = (job.weight,)
        self.specs = tuple(spec for spec, _ in job.specs.values())
        self.attrs = {"method": job.method.name, **job.grid.attrs(), **quantizer.attrs()}
        self.n_rows, self.row_step = job.weight.spec.n_rows, None

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        return tuple(self._quantizer.parts(self._name, context).values())

    def output_rows(self, index: int, rows: Rows) -> Rows:
        return (0, self.specs[index].n_rows)

    def peak_nbytes(self, n_rows: int) -> int:
        return self.slice_nbytes(n_rows) + self._quantizer.peak_nbytes(self._name)
