"""The page's section on each run: its figures, how they were measured, warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from markupsafe import Markup

from llmkit.errors import counted
from llmkit.evaluation.record import BenchResult, RunRecord
from llmkit.evaluation.report_inputs import ReportInputs, TextScore, checkpoint_key, run_names
from llmkit.pipeline.progress import duration
from llmkit.report.setting import interval_words, number, percent, with_interval
from llmkit.report.svg import legend_mark
from llmkit.tensors.spec import format_bytes

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Score:
    """The one figure of a benchmark, large, with what belongs to it."""

    value: str
    words: str
    facts: Pairs


@dataclass(frozen=True, slots=True)
class RunView:
    """A run as the page shows it.

    Attributes:
        name: the model's, made unique among the runs.
        key: its mark in plots.
        facts: the shortest account of how it was measured; `details` is the whole.
    """

    name: str
    key: Markup
    scores: Sequence[Score]
    facts: Pairs
    details: Pairs
    warnings: Sequence[str]


def run_views(inputs: ReportInputs) -> list[RunView]:
    """Records first, each with the perplexities of its checkpoint, then the other perplexities."""
    checkpoints = [checkpoint_key(r.model) for r in inputs.records]
    with_record = [t for t in inputs.texts if checkpoint_key(t.model) in checkpoints]
    others = [t for t in inputs.texts if t not in with_record]
    names = run_names([*(r.model for r in inputs.records), *(t.model for t in others)])
    views = []
    for i, record in enumerate(inputs.records):
        is_first = checkpoints.index(checkpoints[i]) == i
        texts = [t for t in with_record if is_first and checkpoint_key(t.model) == checkpoints[i]]
        views.append(_record_view(i, record, names[i], texts))
    first = len(views)
    return views + [_text_view(first + i, text, names[first + i]) for i, text in enumerate(others)]


def _record_view(series: int, record: RunRecord, name: str, texts: Sequence[TextScore]) -> RunView:
    scores = [_bench_score(bench) for bench in record.benches.values()]
    scores += [_task_score(task, metrics) for task, metrics in record.tasks.items()]
    scores += [_text_score(text) for text in texts]
    model, settings = record.model, record.settings
    shown = {
        "computed in": ", ".join(str(model[k]) for k in ("dtype", "device", "backend") if model.get(k)),
        "quantization": model.get("quantization"),
        "size": format_bytes(model["nbytes"]) if isinstance(model.get("nbytes"), int) else None,
        "prompt format": settings.get("prompt_format"),
        "model digest": _short(model.get("source_digest") or model.get("header_digest")),
        "time": duration(record.elapsed_s),
    }
    details = {
        "date": record.created.replace("T", " ").replace("+00:00", " UTC"),
        "path": model.get("path"),
        "architectures": _words(model.get("architectures")),
        **{k.replace("_", " "): model.get(k) for k in ("header_digest", "source_digest", "tokenizer_digest")},
        **{k.replace("_", " "): _words(v) for k, v in settings.items()},
        "task digests": _words([f"{n} {_short(b.task_digest)}" for n, b in record.benches.items() if b.task_digest]),
        "letters' ids": _words([f"{n} {_letter_ids(b)}" for n, b in record.benches.items() if b.letter_ids]),
        "token ids": _words([f"{k!r} {_words(list(v))}" for k, v in record.continuations.items()]),
        "versions": _words([f"{k} {v}" for k, v in record.versions.items()]),
    }
    return RunView(
        name, legend_mark(series), scores, _pairs(shown), _pairs(details), [*record.warnings, *record.letter_warnings]
    )


def _bench_score(bench: BenchResult) -> Score:
    micro, macro, overall = bench.micro, bench.macro, bench.macro_categories
    is_macro = bench.average == "macro"
    facts = {
        "questions": f"{number(micro.n)} in {counted(len(bench.subjects), 'subject')}",
        "shots": str(bench.shots),
        "protocol": bench.protocol,
        "average": "mean of subjects" if is_macro else "over all questions",
        "over all questions": with_interval(micro) if is_macro else None,
        "mean of subjects": with_interval(macro) if not is_macro else None,
        "mean of categories": with_interval(overall) if overall is not None else None,
        **_letters(bench),
        **{f"{name} subset": with_interval(micro) for name, (micro, _) in bench.subsets.items()},
        "speed": _speed(bench),
    }
    figure = bench.reported
    return Score(f"{percent(figure.value)} %", f"{bench.title} {interval_words(figure)}", _pairs(facts))


def _letters(bench: BenchResult) -> dict[str, str | None]:
    """What the letters tell: chance, the commonest answer, how much of the probability they have."""
    letters = bench.letters
    if letters is None:
        return {}
    return {
        "chance level": f"{percent(letters.chance)} %",
        "always one letter": f"{percent(letters.majority)} % ({letters.majority_letter})",
        "mass on the letters": f"{percent(letters.mass)} %" if letters.mass is not None else None,
        "unreadable answers": number(letters.n_unread) if letters.n_unread else None,
    }


def _speed(bench: BenchResult) -> str | None:
    tokens = bench.tokens.get("tokens", 0)
    return f"{number(round(tokens / bench.elapsed_s))} tokens/s" if tokens and bench.elapsed_s > 0 else None


def _task_score(task: str, metrics: Mapping[str, Any]) -> Score:
    values = {k: v for k, v in metrics.items() if isinstance(v, float) and "_stderr" not in k}
    first = next(iter(values), "")
    facts = {}
    for key, value in values.items():
        name, _, rest = key.partition(",")
        error = metrics.get(f"{name}_stderr,{rest}")
        spread = f" ± {number(error)}" if isinstance(error, float) else ""
        facts[key.removesuffix(",none")] = f"{number(value, 4)}{spread}"
    return Score(number(values.get(first), 4), f"{task} {first.removesuffix(',none')}", _pairs(facts))


def _text_view(series: int, text: TextScore, name: str) -> RunView:
    details = {k.replace("_", " "): _words(v) for k, v in text.model.items() if k != "history"}
    return RunView(name, legend_mark(series), [_text_score(text)], [], _pairs(details), ())


def _text_score(text: TextScore) -> Score:
    body = text.body
    spread = f"± {number(text.perplexity * text.stderr)}" if isfinite(text.perplexity) else ""
    facts = {
        "text": str(body.get("text", "")),
        "bits per token": number(body.get("bits_per_token"), 4),
        "tokens": f"{number(text.n_scored)} scored",
        "windows": f"of {body.get('context')} every {body.get('stride')}",
        "computed in": ", ".join(str(text.model[k]) for k in ("dtype", "device", "backend") if text.model.get(k)),
        "time": duration(text.elapsed_s),
    }
    return Score(number(text.perplexity, 4), f"perplexity {spread}", _pairs(facts | _beside_reference(text)))


def _beside_reference(text: TextScore) -> dict[str, str]:
    """What `perplexity --reference` measured against the model that it names."""
    found = text.reference
    if not found:
        return {}
    low, high = found.get("perplexity_ratio_low"), found.get("perplexity_ratio_high")
    tails = (("mean", "kl_divergence"), ("median", "kl_median"), ("99th percentile", "kl_99"))
    flipped = found.get("flipped")
    return {
        "reference": f"{found.get('model')}, perplexity {number(found.get('perplexity_before'), 4)}",
        "ratio": f"{number(found.get('perplexity_ratio'), 4)} [{number(low, 4)}, {number(high, 4)}]",
        "divergence, nats": ", ".join(f"{name} {number(found[key])}" for name, key in tails if key in found),
        "other top tokens": f"{percent(flipped)} %" if isinstance(flipped, float) else "",
    }


def _letter_ids(bench: BenchResult) -> str:
    """`A 330, B 389`: what counted as each letter."""
    sequences = {k: " or ".join(" ".join(map(str, ids)) for ids in v) for k, v in bench.letter_ids.items()}
    return ", ".join(f"{letter} {ids}" for letter, ids in sequences.items())


def _short(digest: object) -> str | None:
    return str(digest)[:12] if digest else None


def _words(value: object) -> str | None:
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value) or None
    return None if value is None else str(value)


def _pairs(values: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(k, str(v)) for k, v in values.items() if v not in (None, "", "None")]
