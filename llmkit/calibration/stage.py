"""The blocks of a decoder while it reads sequences: each computed once, in order, and kept for who asks later.

What is kept lies in the workspace of the run that asks first (`llmkit.pipeline.stage`); an interrupted run goes on
behind the last whole block.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llmkit.calibration.blocks import Blocks
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.pipeline.pool import all_cores
from llmkit.pipeline.stage import Block, Computed, Stage
from llmkit.tensors.lazy import Context, Lazy
from llmkit.tensors.stopped import Stopped

__all__ = ["BlockStage", "Compute"]

Compute = Callable[[Blocks, int, Mapping[str, Lazy], Context], Computed]
"""Gets the blocks, the number of one, the state of the block before it (empty for the first), and the run's context."""


class BlockStage:
    """Work on the blocks of one decoder.

    Args:
        ckpt: float tensors.
        rows: token ids of the sequences, all of one length.
        work: plain data that tells this work from other work on the same sequences.
        compute: does one block.
    """

    def __init__(self, ckpt: Checkpoint, rows: Sequence[Sequence[int]], work: Any, compute: Compute) -> None:
        self._ckpt, self._rows, self._compute = ckpt, rows, compute
        self._n_blocks = len(ckpt.require_model().blocks)
        body = json.dumps([ckpt.fingerprints(), [list(row) for row in rows], work], sort_keys=True)
        self._digest = hashlib.sha256(body.encode()).hexdigest()
        self._guard = threading.Lock()
        self._path: Path | None = None
        self._run: Iterator[Block] | None = None
        self._done: list[Block] = []
        self._blocks: Blocks | None = None

    def block(self, index: int, context: Context) -> Block:
        """A block, computed after those before it where that is not done."""
        with self._guard, all_cores():
            if context.is_stopped():
                raise Stopped
            path = context.workspace / "layers" if context.workspace is not None else None
            if path != self._path or (path is not None and not path.exists()):  # another run, with its own workspace
                self._run, self._done = None, []
            if self._run is None:
                self._path = path
                stage = Stage(path, self._digest, in_workspace=path is not None)
                self._run = stage.run([str(i) for i in range(self._n_blocks)], partial(self._computed, context))
            try:
                while len(self._done) <= index:
                    self._done.append(next(self._run))
            except BaseException:  # who asks next, perhaps another run, begins behind the last block that is whole
                self._run, self._done = None, []
                raise
            return self._done[index]

    def _computed(self, context: Context, name: str, state: Mapping[str, Lazy]) -> Computed:
        context.report(f"block {int(name) + 1}/{self._n_blocks}")
        return self._compute(self._begin(), int(name), state, context)

    def _begin(self) -> Blocks:
        if self._blocks is None:
            import torch

            from llmkit.decoder.load import load_blocks

            self._blocks = Blocks(*load_blocks(self._ckpt), torch.tensor(self._rows))
        return self._blocks
