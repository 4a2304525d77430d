"""Weights quantized one block after the other: each for the inputs it has once the layers before it are quantized.

All matrices are planned at once. When the runner asks for the parts of one, every block up to its own is computed, in
order, and kept in the run's workspace (`llmkit.pipeline.stage`), from where those of the others are read. An
interrupted run goes on behind the last whole block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from llmkit.architecture.slots import Slot
from llmkit.architecture.storage import parts_of
from llmkit.calibration.blocks import CHUNK_NBYTES, Blocks, Unchanged
from llmkit.calibration.learning import OutputError, product_dtype
from llmkit.calibration.observers import Observer
from llmkit.calibration.self_written import written_by
from llmkit.calibration.stage import BlockStage
from llmkit.calibration.texts import CalibrationText, token_ids, windows
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError, RequirementError, listing
from llmkit.pipeline.pool import all_cores, n_cores
from llmkit.pipeline.stage import Computed
from llmkit.quantization.matrix import QuantizedMatrix
from llmkit.quantization.method import BlockMethod, BlockWeight, Method, QuantizedRows, Task, quantized
from llmkit.tensors.constant import constant
from llmkit.tensors.lazy import Context, Lazy, Node, Rows
from llmkit.tensors.stopped import Stopped

if TYPE_CHECKING:
    import torch


__all__ = ["CalibratedQuantizer", "Samples"]

_FLOP_PER_S = 1.5e11  # of a core in SignRound, all that is no product included: SmolLM2 on a Xeon with AMX


@dataclass(frozen=True, slots=True)
class Samples:
    """The windows of a text that a model is calibrated on.

    Attributes:
        text: None for what the model itself writes.
        n: how many; all there are, where the text is shorter.
        length: of each, in tokens.
        seed: of the choice among all windows of the text, or of what the model writes.
    """

    text: CalibrationText | None
    n: int = 128
    length: int = 512
    seed: int = 0

    def attrs(self) -> dict[str, Any]:
        """Plain data, for the plan, the history and `explain`."""
        text = {"sha256": self.text.digest} if self.text is not None else {}
        return {"calibration": self.label, **text, "samples": self.n, "length": self.length, "seed": self.seed}

    @property
    def label(self) -> str:
        """How notes call the text."""
        return self.text.label if self.text is not None else "what the model itself writes"

    def rows(
        self,
        tokenized: Checkpoint,
        suffix: Sequence[int],
        context: int | None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> list[list[int]]:
        """Token ids, all rows of one length.

        Raises:
            InputError: the text has fewer tokens than one sample.
        """
        from llmkit.checkpoint.tokenizer import load_tokenizer
        from llmkit.tokenization.chat import prompt_of

        length = min(self.length, context or self.length)
        if self.text is None:
            return written_by(tokenized, self.n, length, seed=self.seed, suffix=suffix, is_stopped=is_stopped)
        tokenizer = load_tokenizer(tokenized)
        prompt = prompt_of(tokenized, tokenizer) if self.text.has_conversations else None
        ids = token_ids(self.text, tokenizer, prompt)
        if len(ids) + len(suffix) < length:
            raise InputError(
                f"{self.text.label} has {len(ids)} tokens, fewer than one sample of {length}",
                hint=f"give a longer text, or --length {max(len(ids) // 2, 1)}",
            )
        return windows(ids, length, samples=self.n, seed=self.seed, suffix=suffix)


class CalibratedQuantizer:
    """Makes quantized matrices of the linear layers of one model; takes the place of `quantized`.

    Args:
        ckpt: float tensors, and the tokenizer.
        samples: what it is calibrated on.
        outside: the method for weights in no block, whose inputs are not measured, where the task's own method needs
            them; None refuses those.
    """

    def __init__(self, ckpt: Checkpoint, samples: Samples, *, outside: Method | None = None) -> None:
        self._ckpt, self.samples, self._outside = ckpt, samples, outside
        self._tasks: dict[str, Task] = {}
        self._stage = BlockStage(ckpt, partial(samples.rows, ckpt, ckpt.prompt_suffix()), self._plan, self._computed)

    @cached_property
    def _slots(self) -> Mapping[str, Slot]:
        return self._ckpt.require_model().tensors()

    default_method = "gptq"

    def attrs(self) -> dict[str, Any]:
        """Plain data, for the history."""
        return self.samples.attrs()

    def words(self) -> str:
        """The text and its windows, for the plan, and the time of what is learnt."""
        text = f"calibrated on {self.samples.label}: {self.samples.n} windows of {self.samples.length} tokens"
        seconds = self._learning_flop() / (n_cores() * _FLOP_PER_S)
        if not seconds:
            return text
        took = f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
        return f"{text}; learning takes about {took} on {n_cores()} cores with bfloat16 products, else three times that"

    def _learning_flop(self) -> float:
        """Multiplications and additions in the linear layers of all passes of methods that learn."""
        return sum(
            2.0 * task.weight.spec.numel * self.samples.length * task.method.n_passes(self.samples.n, task.grid)
            for task in self._tasks.values()
            if isinstance(task.method, BlockMethod)
        )

    def findings(self) -> dict[str, Any]:
        """What was counted in the run, for the manifest; nothing before the text was read."""
        n = self._stage.n_windows
        return {} if n is None else {"calibration": {"windows": n, "notes": self.notes()}}

    def notes(self) -> list[str]:
        """What the user should know of the run that is done."""
        notes, said = [], dict[str, list[str]]()
        n = self._stage.n_windows
        if n is not None and n < self.samples.n:
            notes.append(f"{self.samples.label} gave {n} windows, {self.samples.n} were asked for")
        for block in self._stage.done:
            for name, note in block.result["notes"].items():
                said.setdefault(note, []).append(name)
        return notes + [f"{listing(names)}: {note}" for note, names in said.items()]

    def read_of(self, text: CalibrationText | None) -> Samples | None:
        """What it reads of a text."""
        known = self.samples.text
        is_same = known is not None and text is not None and known.digest == text.digest
        return self.samples if is_same else None

    def __call__(self, task: Task) -> QuantizedMatrix:
        """As `llmkit.quantization.method.quantized`.

        Raises:
            RequirementError: no plugin describes the model; or the weight is in no block, and the method cannot do
                without statistics.
        """
        if self._slots[task.name].layer is None and task.method.needs:
            if self._outside is not None:
                return quantized(replace(task, method=self._outside))
            raise RequirementError(
                f"{task.name} is in no layer that is calibrated, and --method {task.method.name} needs to see its "
                "inputs",
                hint=f"leave it in floats (--keep {task.name.removesuffix('.weight')}), or take --method mse",
            )
        self._tasks[task.name] = task
        return task.matrix(_Calibrated(self, task).outputs())

    def parts(self, task: Task, context: Context) -> dict[str, torch.Tensor]:
        """The parts of one matrix; computes the blocks up to its own where that is not done."""
        layer = self._slots[task.name].layer
        if layer is None:
            with all_cores():
                return task.parts(task.quantize(task.weight.load()))
        block = self._stage.block(layer, context)
        if task.observe is not None:
            error, norm = block.result["errors"][task.name]
            task.observe(error, norm, task.weight.shape[0])
        return {part: block.kept[f"{task.name}.{part}"].load() for part in task.specs}

    def peak_nbytes(self, task: Task) -> int:
        """Memory for all of the work, which the first matrix is charged with: one is computed at a time.

        In float32 a block and its widest matrix four times over (the weight, its second moments, their factors), and
        the hidden states of all samples before and after it. Where a block is learnt, the hidden states in floats too,
        and for each weight what it is restored to, its gradient, what is learnt and the best of it.
        """
        if task is not next(iter(self._tasks.values())):
            return 0
        dims = self._ckpt.require_model().dims
        block = sum(slot.numel for slot in self._slots.values() if slot.layer == 0)
        widest = max(max(each.weight.spec.numel, each.weight.shape[1] ** 2) for each in self._tasks.values())
        hidden = self.samples.n * self.samples.length * dims.hidden
        n_copies, n_states = (7, 4) if self._learns else (1, 2)
        return 4 * (n_copies * block + 4 * widest + n_states * hidden) + min(
            CHUNK_NBYTES, 16 * hidden * (2 + dims.ffn // dims.hidden)
        )

    def _plan(self) -> tuple[int, Any]:
        tasks = [[name, task.attrs(), task.scale_dtype.name] for name, task in self._tasks.items()]
        return self._n_blocks, [self.samples.attrs(), tasks]

    @property
    def _n_blocks(self) -> int:
        return 1 + max(layer for name in self._tasks if (layer := self._slots[name].layer) is not None)

    def _computed(self, blocks: Blocks, index: int, state: Mapping[str, Lazy], context: Context) -> Computed:
        """One layer quantized: its parts are kept, what comes out goes on to the next."""
        tasks = {name: task for name, task in self._tasks.items() if self._slots[name].layer == index}
        onlooker = _Quantizing(tasks, self._slots, context)
        hidden = state["hidden"].load()
        after = blocks.run(index, hidden, onlooker)
        onlooker.require_all()
        passed_on = []
        if self._learns:
            floats = state["floats"].load() if "floats" in state else hidden
            targets = blocks.run(index, floats, Unchanged())
            if onlooker.learnt:
                compute = partial(blocks.outputs, index, hidden)
                seed, report = f"{self.samples.seed} {index}", self._reporter(index, context)
                error = OutputError(compute, blocks.weights, targets, self._slots, seed, report, product_dtype())
                onlooker.learn(error)
                after = blocks.run(index, hidden, onlooker)
            passed_on.append(("floats", targets))
        result = {"errors": onlooker.errors, "notes": onlooker.notes}
        return Computed(result, [*passed_on, ("hidden", after)], onlooker.results.items())

    @property
    def _learns(self) -> bool:
        """Whether outputs in floats have to be known."""
        return any(isinstance(task.method, BlockMethod) for task in self._tasks.values())

    def _reporter(self, index: int, context: Context) -> Callable[[float, str], None]:
        """Says what is done of a block, and for how long the blocks to come will take at this rate."""
        n_blocks, begun = self._n_blocks, time.monotonic()

        def report(done: float, text: str) -> None:
            if context.is_stopped():
                raise Stopped
            left = (n_blocks - index - done) * (time.monotonic() - begun) / done if done else None
            after = f", {left / 60:.0f} min left" if left is not None else ""
            context.report(f"block {index + 1}/{n_blocks}, {text}{after}")

        return report


class _Quantizing:
    """Quantizes the layers of one block: as their inputs become complete, or all together once those were seen.

    Attributes:
        results, errors: the parts of each matrix, and its squared error and norm.
        learnt: the weights for a `BlockMethod`, until `learn` has quantized them.
    """

    def __init__(self, tasks: Mapping[str, Task], slots: Mapping[str, Slot], context: Context) -> None:
        self._tasks, self._slots, self._context = tasks, slots, context
        self._of_weight = {part.id: name for name in tasks for part in slots[name].parts}
        self._n_rows = {part.id: part.shape[0] for slot in slots.values() for part in slot.parts if part.shape}
        self._observers: dict[tuple[str, ...], Observer] = {}
        self.results: dict[str, torch.Tensor] = {}
        self.errors: dict[str, tuple[float, float]] = {}
        self.notes: dict[str, str] = {}
        self.learnt: dict[str, BlockWeight] = {}
        self._restored: dict[str, torch.Tensor] = {}

    def _named(self, weights: Sequence[str]) -> list[Task]:
        names = dict.fromkeys(self._of_weight[weight] for weight in weights if weight in self._of_weight)
        return [self._tasks[name] for name in names]

    def see(self, weights: Sequence[str], x: torch.Tensor) -> None:
        if self._context.is_stopped():
            raise Stopped
        tasks = [task for task in self._named(weights) if task.name not in self.errors]
        if tasks:
            measured = frozenset[str]().union(*(task.method.needs | task.method.uses for task in tasks))
            self._observers.setdefault(tuple(weights), Observer(measured)).see(x)

    def settle(self, weights: Sequence[str], values: torch.Tensor) -> torch.Tensor:
        import torch

        tasks = self._named(weights)
        if not tasks:
            return values
        observer = self._observers.pop(tuple(weights), None)
        statistics = observer.statistics() if observer is not None else None
        for task in tasks:
            if self._context.is_stopped():
                raise Stopped
            if task.name in self.errors:
                continue
            weight = task.weight.load()
            if isinstance(task.method, BlockMethod):
                self.learnt[task.name] = BlockWeight(weight, task.grid, task.scale_dtype.torch, statistics)
            else:
                self._take(task, task.quantize(weight, statistics))
        own = values.split([self._n_rows[weight] for weight in weights])
        given = [self._restored.get(weight, rows) for weight, rows in zip(weights, own, strict=True)]
        return torch.cat([rows.to(values.dtype) for rows in given])

    def learn(self, error: OutputError) -> None:
        """Quantize the weights that are learnt together; those that are settled by now are in their places."""
        methods = {self._tasks[name].method: None for name in self.learnt}
        for method in methods:
            names = [name for name in self.learnt if self._tasks[name].method is method]
            if isinstance(method, BlockMethod):
                given = {name: self.learnt.pop(name) for name in names}
                for name, made in method.quantize_block(given, error.beside(self._restored)).items():
                    self._take(self._tasks[name], made)

    def _take(self, task: Task, made: QuantizedRows) -> None:
        """Keep the parts of a matrix, and compute with it from now on."""
        parts = task.parts(made)
        self.results |= {f"{task.name}.{part}": tensor for part, tensor in parts.items()}
        self.errors[task.name] = made.squared_error, made.squared_norm
        if made.note:
            self.notes[task.name] = made.note
        restored = task.matrix(map(constant, parts.values())).dequantized(task.scale_dtype)
        slot = replace(self._slots[task.name], is_transposed=False)  # a task's weight is [out, in]
        self._restored |= {w: lazy.load() for w, lazy in parts_of(restored, slot).items()}

    def require_all(self) -> None:
        """Refuse a layer that the decoder never called.

        Raises:
            RequirementError: naming it.
        """
        missing = [name for name in self._tasks if name not in self.errors and name not in self.learnt]
        if missing:
            raise RequirementError(
                f"{missing[0]} has inputs that calibration does not see",
                hint=f"leave it in floats: --keep {missing[0].removesuffix('.weight')}",
            )


class _Calibrated(Node):
    """The parts of one matrix, as `CalibratedQuantizer` computes them."""

    op = "quantize"

    def __init__(self, quantizer: CalibratedQuantizer, task: Task) -> None:
        self._quantizer, self._task = quantizer, task
        self.inputs = (task.weight,)
        self.specs = tuple(spec for spec, _ in task.specs.values())
        self.attrs = {**task.attrs(), **quantizer.attrs()}
        self.n_rows, self.row_step = task.weight.spec.n_rows, None

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        return tuple(self._quantizer.parts(self._task, context).values())

    def output_rows(self, index: int, rows: Rows) -> Rows:
        return (0, self.specs[index].n_rows)

    def peak_nbytes(self, n_rows: int) -> int:
        return self.slice_nbytes(n_rows) + self._quantizer.peak_nbytes(self._task)
