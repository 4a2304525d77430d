"""The blocks of a decoder while it reads a text: computed once, in order, and kept for later requests.

What is kept lies in the workspace of the run that asks first (`llmkit.pipeline.stage`); an interrupted run goes on
behind the last whole block.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from llmkit.architecture.hooks import Weights
from llmkit.calibration.blocks import Blocks, require_single_blocks
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.decoder.load import load_blocks
from llmkit.decoder.model import Decoder
from llmkit.lazy_imports import torch
from llmkit.pipeline.pool import all_cores
from llmkit.pipeline.progress import time_left
from llmkit.pipeline.stage import Block, BlockResult, Stage
from llmkit.tensors.device import CPU
from llmkit.tensors.lazy import Context, Lazy
from llmkit.tensors.stopped import raise_if_stopped

Compute = Callable[[Blocks, int, Mapping[str, Lazy], Context], BlockResult]
"""Gets the blocks, the number of one, the state of the block before it, in which `hidden` are the hidden states that go
into this one, [B, S, hidden]; and the run's context. Its own state has them for the next one."""
Windows = Callable[[int | None], list[list[int]]]
"""The longest sequence that the decoder takes -> token ids, all rows of one length."""


class BlockStage:
    """Work on the blocks of one decoder.

    Args:
        ckpt: float tensors.
        windows: what the decoder reads; asked once, when work begins.
        plan: asked when work begins: how many blocks are wanted, and plain data that tells this work from other work.
        compute: does one block.
        device: where blocks compute; what is kept, and what goes from one to the next, is in memory.

    Attributes:
        done: blocks that are computed.
        n_windows: how many there are, as soon as the text was read; None before.

    Raises:
        RequirementError: a layer takes more of those before it than what comes out of the last.
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        windows: Windows,
        plan: Callable[[], tuple[int, Any]],
        compute: Compute,
        device: str = CPU,
    ) -> None:
        if ckpt.model is not None:
            require_single_blocks(ckpt.model, ckpt.label)
        self.device = device
        self._ckpt, self._windows, self._plan, self._compute = ckpt, windows, plan, compute
        self._guard = threading.Lock()
        self._path: Path | None = None
        self._run: Iterator[Block] | None = None
        self._is_stopped: Callable[[], bool] = lambda: False  # of the run that computes blocks
        self._first: tuple[int, float] | None = None  # the first block that it computes, and when it began
        self.done: list[Block] = []
        self.n_windows: int | None = None

    def block(self, index: int, context: Context) -> Block:
        """A block, computed after those before it where that is not done."""
        with self._guard, all_cores():
            raise_if_stopped()
            path = context.workspace / "layers" if context.workspace is not None else None
            is_other = path != self._path or (path is not None and not path.exists())
            if is_other or self._is_stopped():  # another run than the one that computes blocks
                self._run, self.done = None, []
            try:
                if self._run is None:
                    self._path, self._is_stopped = path, context.is_stopped
                    self._run = self._started(path, context)
                    self.n_windows = next(self._run).result["windows"]
                while len(self.done) <= index:
                    self.done.append(next(self._run))
            except BaseException:  # who asks next, perhaps another run, begins behind the last block that is whole
                self._run, self.done = None, []
                raise
            return self.done[index]

    def _started(self, path: Path | None, context: Context) -> Iterator[Block]:
        n_blocks, work = self._plan()
        self._first = None
        digest = hashlib.sha256(json.dumps([self._ckpt.fingerprints(), work], sort_keys=True).encode()).hexdigest()
        names = ["text", *(str(i) for i in range(n_blocks))]
        return Stage(path, digest, in_workspace=path is not None).run(names, partial(self._computed, context, n_blocks))

    def _computed(self, context: Context, n_blocks: int, name: str, state: Mapping[str, Lazy]) -> BlockResult:
        if name == "text":
            rows = self._windows(self.loaded[0].context)
            ids = torch.tensor(rows)
            return BlockResult({"windows": len(rows)}, [("ids", ids), ("hidden", Blocks(*self.loaded, ids).embedded())])
        context.report(f"block {int(name) + 1}/{n_blocks}{self._time_left(int(name), n_blocks)}")
        ids = state["ids"].load()
        computed = self._compute(Blocks(*self.loaded, ids), int(name), state, context)
        return BlockResult(computed.result, [("ids", ids), *computed.state], computed.kept)

    def _time_left(self, index: int, n_blocks: int) -> str:
        """Words for how long the blocks from this one on will take, as those did that this run computed before it."""
        if self._first is None:
            self._first = index, time.monotonic()
        first, began = self._first
        return time_left(time.monotonic() - began, index - first, n_blocks - index)

    @cached_property
    def loaded(self) -> tuple[Decoder, Weights]:
        """The decoder without its layers, and the weights to make them of."""
        return load_blocks(self._ckpt, device=self.device)
