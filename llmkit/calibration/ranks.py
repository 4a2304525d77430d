"""Processes that calibrate one model together, as `torchrun` starts them: each computes a share of the samples.

Rank 0 has the run. It reads the text, holds the hidden states of all samples between blocks, writes and speaks; so what
is kept, and how an interrupted run goes on, is as with one process, whatever the number of processes. For every block
it deals the hidden states out. What each rank sums up of the inputs of a layer goes to the owner of the weight, who
quantizes it and hands it to the others. The sums differ in their last bits from those of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Protocol, TypeVar

from llmkit.calibration.blocks import BlockHook, Blocks
from llmkit.calibration.products import narrow_products
from llmkit.errors import InputError, LlmkitError
from llmkit.lazy_imports import torch
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.device import CPU, torchrun_number

T = TypeVar("T")


class TracingHook(BlockHook, Protocol):
    """Sees also how the output of a block comes about."""

    def trace(self, blocks: Blocks, index: int, hidden: torch.Tensor, samples: Sequence[int]) -> None:
        """Before the block is computed: its inputs in the float model, [B, S, hidden], and which samples to look at."""


@dataclass(frozen=True, eq=False)
class Share:
    """What one rank computes of a block: the number of the block, tokens [B, S], hidden states [B, S, hidden].

    Attributes:
        floats: the hidden states in the float model, where they are compared.
        traced: samples of which the hook sees how the output of the block comes about, too, where they are.
    """

    block: int
    ids: torch.Tensor
    hidden: torch.Tensor
    floats: torch.Tensor | None
    traced: Sequence[int] = ()

    def of(self, cut: slice) -> Share:
        """That of some samples."""
        floats = self.floats[cut] if self.floats is not None else None
        traced = [i - cut.start for i in self.traced if cut.start <= i < cut.stop]
        return Share(self.block, self.ids[cut], self.hidden[cut], floats, traced)

    def passed(self, blocks: Blocks, hook: TracingHook) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The hidden states [B, S, hidden] after the block, in the place of those before it, and in the float model."""
        with narrow_products():
            if self.floats is None:
                return blocks.run(self.block, self.hidden, hook), None
            hook.trace(blocks, self.block, self.floats, self.traced)
            targets, inputs = blocks.recorded(self.block, self.floats)
            return blocks.run(self.block, self.hidden, hook, inputs), targets


class Ranks:
    """The processes that work together; one alone does everything itself.

    Args:
        index: of this process.
        n: how many there are.
    """

    def __init__(self, index: int = 0, n: int = 1) -> None:
        self.index, self.n = index, n

    def run(self, blocks: Blocks, share: Share, hook: TracingHook) -> tuple[torch.Tensor, torch.Tensor | None]:
        """On rank 0: a block for all samples, as of `Share.passed`.

        Raises:
            InputError: there are fewer samples than processes.
        """
        if self.n == 1:
            return share.passed(blocks, hook)
        n_samples = len(share.ids)
        if n_samples < self.n:
            hint = f"torchrun --nproc-per-node {n_samples}; or a longer text"
            raise InputError(f"{n_samples} windows of text for {self.n} processes", hint=hint)
        cuts = [slice(i * n_samples // self.n, (i + 1) * n_samples // self.n) for i in range(self.n)]
        mine = self._dealt([share.of(cut) for cut in cuts])
        gathered = self._collected((mine or share).passed(blocks.of(mine.ids if mine else share.ids), hook))
        floats = [part for _, part in gathered if part is not None]
        return torch.cat([after for after, _ in gathered]), torch.cat(floats) if floats else None

    def serve(self, compute: Callable[[Share], tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        """On the other ranks: compute shares until rank 0 has all that it wants.

        Raises:
            LlmkitError: what rank 0 says, too; or it has ended.
        """
        try:
            while (share := self._dealt(None)) is not None:
                self._collected(compute(share))
        except RuntimeError as error:  # what gloo raises
            raise LlmkitError(f"rank {self.index}: the other processes have ended ({str(error)[:80]})") from error

    def end(self) -> None:
        """On rank 0: let the other ranks return from `serve`."""
        if self.n > 1:
            self._dealt([None] * self.n)

    def _dealt(self, shares: list[Any] | None) -> Share | None:
        from torch import distributed

        mine: list[Any] = [None]
        distributed.scatter_object_list(mine, shares)
        return mine[0] if isinstance(mine[0], Share) else None

    def _collected(self, gathered: T) -> list[T]:
        from torch import distributed

        every: list[Any] | None = [None] * self.n if self.index == 0 else None
        distributed.gather_object(gathered, every)
        return every or []

    def summed(self, statistics: Statistics, owners: Collection[int]) -> Statistics:
        """The statistics summed over all ranks; defined on the owners only."""
        from torch import distributed

        if self.n == 1:
            return statistics
        sums: dict[str, Any] = {}
        for name in (field.name for field in fields(Statistics)):
            value = getattr(statistics, name)
            if value is None:
                continue
            tensor = torch.tensor(value, dtype=torch.float64) if name == "n_tokens" else value.to(CPU).contiguous()
            if name == "inputs":
                parts: list[Any] = [None] * self.n
                distributed.all_gather_object(parts, tensor)
                sums[name] = torch.cat(parts)
                continue
            how = distributed.ReduceOp.MAX if name == "maxima" else distributed.ReduceOp.SUM
            if len(owners) == 1:
                distributed.reduce(tensor, next(iter(owners)), how)
            else:
                distributed.all_reduce(tensor, how)
            sums[name] = float(tensor) if name == "n_tokens" else tensor
        return Statistics(**sums)

    def by(self, owner: int, compute: Callable[[], T]) -> T:
        """Broadcast what `compute` returns on rank `owner`.

        Raises:
            LlmkitError: what it raises.
        """
        from torch import distributed

        if self.n == 1:
            return compute()
        box: list[Any] = [None, None]
        if self.index == owner:
            try:
                box = [compute(), None]
            except LlmkitError as error:
                box = [None, (type(error), error.message, error.hint)]
        distributed.broadcast_object_list(box, owner)
        if box[1] is not None:
            kind, message, hint = box[1]
            raise kind(message, hint=hint)
        result: T = box[0]
        return result


def rank() -> int:
    """The rank of this process under torchrun; 0 without it."""
    return torchrun_number("RANK") if _n_ranks() > 1 else 0


def _n_ranks() -> int:
    is_started = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} <= os.environ.keys()
    return torchrun_number("WORLD_SIZE") if is_started else 1


@cache
def joined() -> Ranks:
    """The processes of this run; the cores are divided among them."""
    if _n_ranks() == 1:
        return Ranks()
    from torch import distributed

    local, n_local = torchrun_number("LOCAL_RANK", "0"), torchrun_number("LOCAL_WORLD_SIZE", "1")
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[local::n_local] or cores)
    if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun says so where nobody has
        del os.environ["OMP_NUM_THREADS"]
    distributed.init_process_group("gloo")
    return Ranks(distributed.get_rank(), distributed.get_world_size())
