"""Weights quantized with statistics of their inputs from a file, which an earlier pass measured."""

from __future__ import annotations

from typing import Any

from llmkit.calibration.samples import Samples
from llmkit.calibration.texts import CalibrationText
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.statistics import StoredStatistics
from llmkit.errors import RequirementError
from llmkit.quantization.matrix import QuantizedMatrix
from llmkit.quantization.method import BlockMethod, Method, ScalingMethod, Task, outside_blocks, quantized
from llmkit.tensors.lazy import Lazy


class StoredQuantizer:
    """Takes the place of `quantized`: each weight with what is known of its inputs in the float model.

    Args:
        ckpt: float tensors.
        statistics: of its weights.
        outside: as of `CalibratedQuantizer`.
    """

    def __init__(self, ckpt: Checkpoint, statistics: StoredStatistics, *, outside: Method | None = None) -> None:
        self._slots, self.statistics, self._outside = ckpt.require_model().tensors(), statistics, outside
        self._unknown: dict[str, None] = {}  # matrices in the blocks, quantized without statistics

    @property
    def default_method(self) -> str:
        """The best method that the statistics suffice for."""
        fields = next(iter(self.statistics.parts.values()))
        return "gptq" if "second_moments" in fields else "mse"

    def read_of(self, text: CalibrationText | None) -> Samples | None:
        """What was read of a text, where the file tells it."""
        about = self.statistics.about
        numbers = [number for key in ("samples", "length", "seed") if isinstance(number := about.get(key), int)]
        is_told = len(numbers) == 3 and text is not None and about.get("sha256") == text.digest
        return Samples(text, *numbers) if is_told else None

    def attrs(self) -> dict[str, Any]:
        """Plain data, for the history."""
        return {**self.statistics.about, "statistics": self.statistics.label}

    def words(self) -> str:
        """The file, and which of the matrices so far it does not tell of, for the plan."""
        gap = self.statistics.gap(list(self._unknown))
        return f"with the statistics of {self.statistics.label}" + (f", which {gap}" if gap else "")

    def changed(self) -> dict[str, Lazy]:
        """No other tensor changes."""
        return {}

    def findings(self) -> dict[str, Any]:
        """Counts of the run, for the manifest: none."""
        return {}

    def notes(self) -> list[str]:
        """Notes for the user after the run: none."""
        return []

    def refuse_unfit(self, method: Method) -> None:
        """Refuse a method that statistics of single weights do not suffice for.

        Raises:
            RequirementError: it reads the text itself.
        """
        reasons = {
            BlockMethod: "learns from the outputs of whole blocks, which no statistics tell",
            ScalingMethod: "takes scales off in the layers before, each chosen while its block reads the text",
        }
        for kind, reason in reasons.items():
            if isinstance(method, kind):
                raise RequirementError(
                    f"--method {method.name} {reason}",
                    hint="--calibration FILE instead of --statistics; or leave --method out, which uses them",
                )

    def __call__(self, task: Task) -> QuantizedMatrix:
        """As `llmkit.quantization.method.quantized`.

        Raises:
            RequirementError: the method needs what the file does not tell.
        """
        slot, method = self._slots[task.name], task.method
        self.refuse_unfit(method)
        known = self.statistics.known(slot)
        missing = sorted(method.needs - set(known))
        if missing and slot.layer is None:
            task = outside_blocks(task, self._outside)
            method = task.method
        elif missing:
            words = " and ".join(name.replace("_", " ") for name in missing)
            raise RequirementError(
                f"{self.statistics.label} does not tell the {words} of the inputs of {task.name}, which --method "
                f"{method.name} needs",
                hint="llmkit quantize observe MODEL --moments -o FILE.safetensors measures them; or take --method mse",
            )
        if not known and slot.layer is not None:
            self._unknown[task.name] = None
        used = {name: lazy for name, lazy in known.items() if name in method.needs | method.uses}
        return quantized(task, used or None, self.statistics.tokens(slot))
