"""What each step of a pipeline changed: size, bits, speed, perplexity and accuracy, checkpoint after checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.evaluation.report_inputs import ReportInputs, checkpoint_key, steps_of
from llmkit.evaluation.statistics import Mean
from llmkit.report.setting import number, percent, with_interval
from llmkit.report.table import Table
from llmkit.tensors.spec import format_bytes

_SIDE_BY_SIDE = 5  # checkpoints; more of them stand below each other


@dataclass
class Stage:
    """A checkpoint on the way, and what is known of it from all inputs.

    Attributes:
        history: the steps that made it; the checkpoint whose history is the beginning of it came before.
        bits: per weight, of the whole model.
        perplexities: by text.
        evaluation: what `quantize --evaluate` or `perplexity --reference` measured beside the checkpoint before.
        scores, speeds: accuracy, and tokens per second, by benchmark.
    """

    label: str
    history: Sequence[Mapping[str, Any]] = ()
    nbytes: int | None = None
    bits: str = ""
    perplexities: dict[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Mean] = field(default_factory=dict)


def stages(inputs: ReportInputs) -> list[Stage]:
    """The checkpoints of all inputs, each once, those with fewer steps first."""
    found: dict[str, Stage] = {}

    def stage(model: Mapping[str, Any]) -> Stage:
        key = checkpoint_key(model)
        known = found.setdefault(key, Stage(str(model.get("label") or key)))
        known.history = known.history or steps_of(model)
        known.nbytes = known.nbytes or model.get("nbytes")
        return known

    for record in inputs.records:
        known = stage(record.model)
        for bench in record.benches.values():
            known.scores[bench.title] = bench.reported
            tokens = bench.tokens.get("tokens", 0)
            if tokens and bench.elapsed_s > 0:
                known.speeds[bench.title] = tokens / bench.elapsed_s
    for text in inputs.texts:
        known = stage(text.model)
        known.perplexities[text.label] = text.perplexity
        known.evaluation = text.reference or known.evaluation
    for facts in inputs.checkpoints:
        known = stage({"path": facts.path, "label": facts.label, "history": facts.recipe, "nbytes": facts.nbytes})
        known.bits = _bits(facts.sizes) or known.bits
        known.evaluation = facts.evaluation or known.evaluation
    return sorted(found.values(), key=lambda s: len(s.history))


def step_table(found: Sequence[Stage]) -> Table:
    """A row for each checkpoint; a column that nobody fills is left out."""
    columns: dict[str, list[str]] = {"checkpoint": [s.label for s in found], "step": _steps(found)}
    columns["size"] = [format_bytes(s.nbytes) if s.nbytes else "" for s in found]
    columns["bits per weight"] = [s.bits for s in found]
    for text in dict.fromkeys(t for s in found for t in s.perplexities):
        columns[f"perplexity of {text}"] = [number(s.perplexities.get(text, ""), 4) for s in found]
    columns["perplexity before → after"] = [_before_after(s.evaluation) for s in found]
    columns["divergence, nats"] = [number(s.evaluation.get("kl_divergence", "")) for s in found]
    columns["other top tokens"] = [_percent(s.evaluation.get("flipped")) for s in found]
    for bench in dict.fromkeys(b for s in found for b in s.scores):
        columns[f"{bench} accuracy"] = [with_interval(s.scores[bench]) if bench in s.scores else "" for s in found]
        columns[f"{bench} tokens/s"] = [number(round(s.speeds[bench])) if bench in s.speeds else "" for s in found]
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    caption = "Checkpoints in the order in which they were made; a step is what was done since the one before."
    if len(found) > _SIDE_BY_SIDE:
        return Table(caption, list(kept), list(zip(*kept.values(), strict=True)))
    labels = kept.pop("checkpoint")
    return Table(caption, ["", *labels], [[name, *cells] for name, cells in kept.items()])


def _bits(sizes: Mapping[str, Any]) -> str:
    """Bits per weight before and after quantization: `16.0 → 4.62`."""
    after = sizes.get("bits_per_weight")
    nbytes, n = sizes.get("before_nbytes"), sizes.get("n_parameters")
    if not isinstance(nbytes, int) or not isinstance(n, int) or not n:
        return "" if after is None else number(after)
    return f"{number(8 * nbytes / n)} → {number(after)}"


def _steps(found: Sequence[Stage]) -> list[str]:
    """The steps since the checkpoint of which a checkpoint's history is a continuation."""
    words = []
    for i, stage in enumerate(found):
        done = list(stage.history)
        before = max((len(s.history) for s in found[:i] if done[: len(s.history)] == list(s.history)), default=0)
        words.append(" → ".join(str(step.get("transform", "?")) for step in done[before:]))
    return words


def _before_after(evaluation: Mapping[str, Any]) -> str:
    before, after = evaluation.get("perplexity_before"), evaluation.get("perplexity_after")
    return "" if before is None else f"{number(before, 4)} → {number(after, 4)}"


def _percent(share: object) -> str:
    return f"{percent(share)} %" if isinstance(share, float) else ""
