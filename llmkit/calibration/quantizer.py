"""Weights quantized one block after the other: each for the inputs it has once the layers before it are quantized.

All matrices are planned at once. When the runner asks for the parts of one, every block up to its own is computed, in
order, and kept in the run's workspace (`llmkit.pipeline.stage`), from where those of the others are read. An
interrupted run goes on behind the last whole block.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

from llmkit.architecture.slots import Slot
from llmkit.calibration.block_quantizer import BlockQuantizer, traced_parts
from llmkit.calibration.blocks import CHUNK_NBYTES, EXPERTS_NBYTES, Blocks
from llmkit.calibration.learning import BlockOutputError
from llmkit.calibration.ranks import Ranks, Share
from llmkit.calibration.samples import Samples
from llmkit.calibration.scaling import BlockScaling
from llmkit.calibration.stage import BlockStage
from llmkit.calibration.texts import CalibrationText
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import listing
from llmkit.lazy_imports import torch
from llmkit.pipeline.cores import n_threads
from llmkit.pipeline.pool import all_cores
from llmkit.pipeline.progress import time_left
from llmkit.pipeline.stage import BlockResult
from llmkit.quantization.matrix import QuantizedMatrix
from llmkit.quantization.method import BlockMethod, Method, Task, outside_blocks, quantized
from llmkit.tensors.device import product_dtype
from llmkit.tensors.lazy import Context, Lazy
from llmkit.tensors.stopped import raise_if_stopped
from llmkit.tensors.whole import Whole

_N_TRACED = 16
_FLOP_PER_S = 1.5e11  # of a core in SignRound, all that is no product included: SmolLM2 on a Xeon with AMX


class CalibratedQuantizer:
    """Makes quantized matrices of the linear layers of one model; takes the place of `quantized`.

    Args:
        ckpt: float tensors, and the tokenizer.
        samples: what it is calibrated on.
        outside: the method for weights in no block, whose inputs are not measured, where the task's own method needs
            them; None refuses those.
        ranks: the processes that share the work; rank 0 has the matrices, the others `serve`.
    """

    def __init__(
        self, ckpt: Checkpoint, samples: Samples, *, outside: Method | None = None, ranks: Ranks | None = None
    ) -> None:
        self._ckpt, self.samples, self._outside, self.ranks = ckpt, samples, outside, ranks or Ranks()
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
        text = self.samples.words()
        unscaled = [name for layer in range(self._n_blocks) for name in self._scaling(layer).unscaled]
        if unscaled:
            text += f"; without a scale, as nothing before them takes it off: {listing(unscaled)}"
        if self.ranks.n > 1:
            text += f"; {self.ranks.n} processes share the windows" + self._words_of_first_rank()
        seconds = self._learning_flop() / (n_threads() * _FLOP_PER_S)
        if not seconds:
            return text
        took = f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
        return (
            f"{text}; learning takes about {took} on {n_threads()} cores with bfloat16 products, else three times that"
        )

    def _words_of_first_rank(self) -> str:
        """Words for the plan about work of the first process alone."""
        parts = {
            "blocks with scaled inputs": any(self._scaling(i).folds for i in range(self._n_blocks)),
            "what is learnt": self._learns,
        }
        alone = [part for part, is_there in parts.items() if is_there]
        return f", but the first alone computes {' and '.join(alone)}" if alone else ""

    def _learning_flop(self) -> float:
        """Multiplications and additions in the linear layers of all passes of methods that learn."""
        return sum(
            2.0 * task.weight.spec.numel * self.samples.length * task.method.n_passes(self.samples.n, task.grid)
            for task in self._tasks.values()
            if isinstance(task.method, BlockMethod)
        )

    def findings(self) -> dict[str, Any]:
        """Counts of the run, for the manifest; empty before the text was read."""
        n = self._stage.n_windows
        return {} if n is None else {"calibration": {"windows": n, "notes": self.notes()}}

    def notes(self) -> list[str]:
        """Notes for the user after the run."""
        notes, said = self.samples.shortfall(self._stage.n_windows), dict[str, list[str]]()
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
            return quantized(outside_blocks(task, self._outside))
        self._tasks[task.name] = task
        self._stage.device = task.device
        node = Whole(
            "quantize",
            [task.weight],
            [spec for spec, _ in task.specs.values()],
            lambda context: list(self.parts(task, context).values()),
            {**task.attrs(), **self.attrs()},
            peak_nbytes=lambda: self.peak_nbytes(task),
        )
        return task.matrix(node.outputs())

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

        In float32 the largest block and its widest matrix six times over (the weight, its moments, their factors),
        the moments of the experts that are seen beside each other, and the hidden states of all samples. Where it is
        compared with the float model, a block, the hidden states and, in bfloat16, the inputs of layers of that, too,
        until each is quantized: all with the moments of the first layers, those of few layers with the widest; where it
        is learnt, the hidden states before it, and for each weight what it is restored to, its gradient, what
        is learnt and the best of it. Where its inputs are scaled, another block and hidden states. Output moments are
        measured, in another block, before there are moments of inputs.
        """
        if task is not next(iter(self._tasks.values())):
            return 0
        dims = self._ckpt.require_model().dims
        of_layer, of_experts, of_outputs = Counter[int](), Counter[int](), Counter[int]()
        for slot in self._slots.values():
            if slot.layer is not None:
                of_layer[slot.layer] += slot.numel
        for name, each in self._tasks.items():
            if (layer := self._slots[name].layer) is not None and self._slots[name].is_of_expert:
                of_experts[layer] += 4 * each.weight.shape[1] ** 2
            elif layer is not None and "output_moments" in each.method.uses:
                of_outputs[layer] += sum(part.shape[0] ** 2 for part in traced_parts(self._slots[name]))
        block, moments = max(of_layer.values(), default=0), min(EXPERTS_NBYTES, max(of_experts.values(), default=0))
        widest = max(max(each.weight.spec.numel, each.weight.shape[1] ** 2) for each in self._tasks.values())
        hidden = self.samples.n * self.samples.length * dims.hidden
        n_copies, n_states = (7, 3) if self._learns else (3, 2) if self._changes or self._compares else (1, 1)
        widening = dims.ffn // dims.hidden
        activations = min(CHUNK_NBYTES, 4 * hidden * (5 + 3 * widening))
        traced = max(of_outputs.values(), default=0)
        largest = 6 * widest
        if self._compares:  # two numbers of bfloat16 in the place of one
            largest = max(largest + hidden, 5 * dims.hidden**2 + hidden * (3 + widening) // 2)
        largest = max(largest, block if traced else 0) + traced
        return 4 * (n_copies * block + largest + n_states * hidden) + moments + activations

    def _plan(self) -> tuple[int, Any]:
        tasks = [[name, task.attrs(), task.scale_dtype.name] for name, task in self._tasks.items()]
        return self._n_blocks, [self.samples.attrs(), tasks]

    @property
    def _n_blocks(self) -> int:
        return max((1 + layer for name in self._tasks if (layer := self._slots[name].layer) is not None), default=0)

    def _computed(self, blocks: Blocks, index: int, state: Mapping[str, Lazy], context: Context) -> BlockResult:
        """One layer quantized: its parts are kept, what comes out goes on to the next."""
        hidden = state["hidden"].load()
        floats = state.get("floats", state["hidden"]).load() if self._compares else None
        scaled = self._scaling(index).applied(blocks, hidden)
        # Other ranks know nothing of scales.
        ranks = self.ranks if scaled.blocks is blocks else Ranks()
        blocks, hook = scaled.blocks, BlockQuantizer(scaled.tasks, self._slots, ranks)
        after, targets = ranks.run(blocks, Share(index, blocks.ids, hidden, floats, self._traced(len(hidden))), hook)
        hook.require_all()
        passed_on = []
        if targets is not None:
            if hook.learnt:
                before = state["hidden"].load()
                compute = partial(blocks.outputs, index, before)
                seed, report = f"{self.samples.seed} {index}", self._reporter(index, context)
                error = BlockOutputError(
                    compute, blocks.weights, targets, self._slots, seed, report, product_dtype(self._stage.device)
                )
                hook.learn(error)
                after = blocks.run(index, before, hook)
            passed_on.append(("floats", targets))
        result = {"errors": hook.errors, "notes": hook.notes}
        return BlockResult(result, [*passed_on, ("hidden", after)], {**hook.results, **scaled.changed}.items())

    def _traced(self, n: int) -> range:
        """The samples of which it is measured how the output of a block comes about; each rank has one of them."""
        return range(0, n, max(min(n // _N_TRACED, n // self.ranks.n), 1))

    def serve(self) -> None:
        """On other ranks than 0: compute a share of the samples of each block.

        Raises:
            LlmkitError: as rank 0 does; or it has ended.
        """

        def compute(share: Share) -> tuple[torch.Tensor, torch.Tensor | None]:
            tasks = {name: task for name, task in self._tasks.items() if self._slots[name].layer == share.block}
            hook = BlockQuantizer(tasks, self._slots, self.ranks)
            return share.passed(Blocks(*self._stage.loaded, share.ids), hook)

        with all_cores():
            self.ranks.serve(compute)

    def _scaling(self, layer: int) -> BlockScaling:
        """What methods that scale inputs do in one layer."""
        tasks = {name: task for name, task in self._tasks.items() if self._slots[name].layer == layer}
        return BlockScaling(self._ckpt.require_model(), layer, self._ckpt.tensors, tasks)

    def changed(self) -> dict[str, Lazy]:
        """Norms and biases with the inverse input scales folded in, by name."""

        def divided(layer: int, name: str) -> Lazy:
            def compute(context: Context) -> list[torch.Tensor]:
                return [self._stage.block(layer, context).kept[name].load()]

            tensor = self._ckpt.tensors[name]
            return Whole("divide by the scale", [tensor], [tensor.spec], compute, self.attrs()).output()

        changed = {slot.name: layer for layer in range(self._n_blocks) for slot in self._scaling(layer).changed}
        return {name: divided(layer, name) for name, layer in changed.items()}

    @property
    def _changes(self) -> bool:
        """Whether other tensors than matrices change."""
        return any(self._scaling(layer).changed for layer in range(self._n_blocks))

    @property
    def _learns(self) -> bool:
        """Whether weights are learnt from the outputs of their block."""
        return any(isinstance(task.method, BlockMethod) for task in self._tasks.values())

    @property
    def _compares(self) -> bool:
        """Whether the hidden states of the float model are needed."""
        return self._learns or any("cross_moments" in task.method.uses for task in self._tasks.values())

    def _reporter(self, index: int, context: Context) -> Callable[[float, str], None]:
        """Says what is done of a block, and for how long the blocks to come will take at this rate."""
        n_blocks, begun = self._n_blocks, time.monotonic()

        def report(done: float, text: str) -> None:
            raise_if_stopped()
            left = time_left(time.monotonic() - begun, done, n_blocks - index - done)
            context.report(f"block {index + 1}/{n_blocks}, {text}{left}")

        return report
