"""The sum over all weights that the Alpaca family publishes to tell whether a delta was applied to the right base.

The published figure was summed in float32 over a state dict that held the rotary tables. Here the sum is taken in
float64, exactly and in no particular order, over what is written; a figure with and one without the tables count.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Lazy
from llmkit.transforms.delta.base_structure import Finding
from llmkit.transforms.delta.detect import model_sum
from llmkit.transforms.delta.profiles import is_buffer

# Alpaca 7B: the sum its script asserts, and the number of its weights (vocabulary of 32,001).
_ALPACA_SUM, _ALPACA_NUMEL = 50637.1836, 6_738_423_808
_ALPACA_WITHOUT_TABLES = 50398.4651
# A base rounded to bfloat16 shifts the sum of 6.7e9 weights by about 2.8 (standard deviation, simulated).
_ROUNDED_MISS = 15.0


@dataclass(frozen=True, slots=True)
class ExpectedSum:
    """A published sum, and how near to it counts."""

    label: str
    value: float
    tolerance: float


def inv_freq_sum(config: Mapping[str, Any]) -> float | None:
    """The sum of all rotary tables, as early checkpoints stored them; None when the config lacks sizes."""
    try:
        head_dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
        layers = int(config["num_hidden_layers"])
        theta = float(config.get("rope_theta") or 10_000.0)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return layers * math.fsum(theta ** (-i / head_dim) for i in range(0, head_dim, 2))


def expected_sums(
    profile: str, delta: Checkpoint, tensors: Mapping[str, Lazy], stated: float | None = None
) -> tuple[ExpectedSum, ...]:
    """The sums that the result may have: given by the user, carried by the delta, or published for its profile."""
    carried = model_sum(delta.files)
    if stated is not None or carried is not None:
        value = stated if stated is not None else carried or 0.0
        # AlpacaFarm compares with numpy's isclose (relative 1e-5), Alpaca with an absolute 1e-2.
        tolerance = 1e-2 if stated is not None else 1e-5 * abs(value)
        sums = [ExpectedSum("as stated, with the rotary tables", value, tolerance)]
        tables = inv_freq_sum(delta.config)
        if tables is not None:
            sums.append(ExpectedSum("as stated, without the rotary tables", value - tables, max(tolerance, 2e-2)))
        return tuple(sums)
    if profile == "alpaca" and sum(t.spec.numel for t in tensors.values()) == _ALPACA_NUMEL:
        return (
            ExpectedSum("Alpaca 7B, with the rotary tables", _ALPACA_SUM, 1e-2),
            ExpectedSum("Alpaca 7B, without the rotary tables", _ALPACA_WITHOUT_TABLES, 2e-2),
        )
    return ()


class ChecksumMeter:
    """Adds up everything that is written. Slices may come from any thread, in any order and number."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], float] = {}
        self._guard = threading.Lock()

    def update(self, name: str, start: int, data: torch.Tensor) -> None:
        """Rows from `start` of tensor `name` are `data` [rows, ...]; a slice seen twice counts once."""
        if not data.is_floating_point() or is_buffer(name):
            return
        rows = data.reshape(data.shape[0], -1) if data.dim() > 1 else data.reshape(1, -1)
        # One sum a row: its bits do not depend on the number of threads, as those of a full sum may.
        total = math.fsum(rows.double().sum(dim=1).tolist())
        with self._guard:
            self._sums[name, start] = total

    @property
    def total(self) -> float:
        """The sum, rounded once."""
        return math.fsum(self._sums.values())


def judge_sum(total: float, expected: Sequence[ExpectedSum]) -> Finding:
    """Which published sum the total matches, or by how much it misses the nearest."""
    for candidate in expected:
        if abs(total - candidate.value) <= candidate.tolerance:
            message = f"sum of all weights {total:.4f} matches {candidate.value:.4f} ({candidate.label})"
            return Finding("note", "checksum", message, None, total, candidate.value)
    nearest = min(expected, key=lambda e: abs(total - e.value))
    miss = total - nearest.value
    message = f"sum of all weights {total:.4f} misses {nearest.value:.4f} ({nearest.label}) by {miss:+.4f}"
    if abs(miss) < _ROUNDED_MISS:
        message += ": a base rounded to bfloat16 is suspected"
        hint = "convert the original float16 files again; newer converters round them"
        return Finding("warn", "checksum", message, hint, total, nearest.value)
    hint = "the base or the delta is another one than the release's: compare their hashes"
    return Finding("warn", "checksum", message, hint, total, nearest.value)
