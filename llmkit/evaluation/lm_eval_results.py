"""lm-eval's own results file and sample files as a run record.

Sources: lm-eval 0.4.13, `lm_eval/loggers/evaluation_tracker.py` (the files) and `lm_eval/evaluator.py` (the samples).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from math import exp, fsum
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, listing
from llmkit.evaluation.benches import Bench, Subject
from llmkit.evaluation.documents import LETTERS
from llmkit.evaluation.extraction import matched_letter
from llmkit.evaluation.protocol import Protocol, protocol_named, protocol_names
from llmkit.evaluation.protocols.lm_eval import families
from llmkit.evaluation.record import BenchResult, Question, RunRecord, SubjectResult
from llmkit.evaluation.statistics import Mean
from llmkit.formats.json_fields import Fields, is_number
from llmkit.formats.json_text import parse_object

_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")
_MAX_FILES = 10_000


def is_results(body: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a results file of lm-eval."""
    return all(isinstance(body.get(key), dict) for key in ("results", "configs", "versions", "n-shot"))


def results_in(folder: Path) -> Path:
    """The one results file in a folder that lm-eval wrote to, or in the folders of models in it.

    Raises:
        InputError: there is none, or there are several.
    """
    found = sorted([*folder.glob("results_*.json"), *folder.glob("*/results_*.json")][:_MAX_FILES])
    if not found:
        raise InputError(f"{folder} is a folder without a results_*.json of lm-eval")
    if len(found) > 1:
        names = listing(str(p.relative_to(folder)) for p in found)
        raise InputError(f"{folder} holds {len(found)} runs of lm-eval: {names}", hint=f"name one: {found[-1]}")
    return found[0]


def record_of(body: Fields, file: Path) -> RunRecord:
    """The record of a results file, with the samples that lie beside it.

    Tasks that are a known benchmark's subjects become that benchmark; groups over them are computed anew.

    Raises:
        InputError: a field or a sample is missing or not of its type.
    """
    leaves = {name: Fields(body.object("results").body[name], f"{body.where}: results.{name}")
              for name, fields in body.objects("results") if name in body.object("configs").body}  # fmt: skip
    samples = {name: list(_samples(path)) for name in leaves if (path := _samples_path(file, name)).is_file()}
    benches = {}
    scored = [name for name, fields in leaves.items() if _score_key(fields)]
    for bench, protocol in families():
        present = _subjects(bench, scored)
        if present and bench.name not in benches:
            result = _bench_result(body, bench, present, leaves, samples)
            stated = _stated_protocol(body, bench, next(iter(present.values()))) or protocol
            benches[bench.name] = replace(result, protocol=stated.name, average=stated.average)
    taken = {r.bench.task_name(s.name) for r in benches.values() for s in r.subjects}
    others = [name for name in leaves if name not in taken]
    config = body.object("config", {})
    date = body.optional_number("date")
    return RunRecord(
        model={
            "label": body.text("model_name", "") or str(config.body.get("model_args", "")),
            "dtype": str(config.body.get("model_dtype", "")).removeprefix("torch.") or None,
            "device": config.body.get("device"),
            "backend": f"lm-eval {config.body.get('model', '')}".strip(),
        },
        settings={
            "bench": [*benches, *others],
            "limit": config.body.get("limit"),
            "max_length": body.body.get("max_length"),
            "chat_template": bool(body.body.get("chat_template")),
        },
        versions={
            package: str(body.body[key])
            for package, key in (("lm-eval", "lm_eval_version"), ("transformers", "transformers_version"))
            if body.body.get(key)
        },
        created="" if date is None else datetime.fromtimestamp(date, UTC).isoformat(timespec="seconds"),
        elapsed_s=_seconds(body),
        benches=benches,
        tasks={name: _metrics(leaves[name], body, name) for name in others},
        continuations={},
        samples={name: [_logged(s) for s in some] for name, some in samples.items()},
    )


def _stated_protocol(body: Fields, bench: Bench, task: str) -> Protocol | None:
    """The protocol that llmkit's own files name; lm-eval's name none."""
    metadata = body.object("configs").object(task).body.get("metadata")
    name = metadata.get("protocol") if isinstance(metadata, Mapping) else None
    return protocol_named(bench, name) if isinstance(name, str) and name in protocol_names(bench.name) else None


def _score_key(results: Fields) -> str:
    """The metric and filter that are a question's score: accuracy, or the one exact match; empty without one."""
    matches = [key for key in results.body if key.startswith("exact_match,")]
    return "acc,none" if "acc,none" in results.body else matches[0] if len(matches) == 1 else ""


def _subjects(bench: Bench, tasks: Iterable[str]) -> dict[str, str]:
    """The subjects of a benchmark among lm-eval's tasks, in its order: subject -> task."""
    if bench.subjects:
        names = {s.name: bench.task_name(s.name) for s in bench.subjects}
        return {subject: task for subject, task in names.items() if task in set(tasks)}
    before, _, after = bench.task.partition("{subject}")
    pattern = re.compile(f"{re.escape(before)}(.+){re.escape(after)}")
    return {match[1]: task for task in sorted(tasks) if (match := pattern.fullmatch(task))}


def _seconds(body: Fields) -> float:
    try:
        return float(body.body.get("total_evaluation_time_seconds") or 0.0)
    except (TypeError, ValueError):
        return 0.0


def _bench_result(
    body: Fields, bench: Bench, tasks: Mapping[str, str], leaves: Mapping[str, Fields], samples: Mapping[str, Any]
) -> BenchResult:
    shots, versions = body.object("n-shot"), body.object("versions")
    first = next(iter(tasks.values()))
    return BenchResult(
        bench=bench,
        subjects=tuple(
            SubjectResult(
                subject=bench.by_name.get(subject, Subject(subject)),
                acc=_mean(body, leaves[task], task, _score_key(leaves[task]), len(samples.get(task, ()))),
                questions=tuple(_question(s) for s in samples.get(task, ())),
                metrics={
                    metric: _mean(body, leaves[task], task, f"{metric},none", len(samples.get(task, ())))
                    for metric in ("acc_norm",)
                    if f"{metric},none" in leaves[task].body
                },
            )
            for subject, task in tasks.items()
        ),
        missing=tuple(s.name for s in bench.subjects if s.name not in tasks),
        shots=shots.count(first, 0),
        n_truncated=0,
        task_version=str(versions.body.get(first, "")),
        task_digest="",
        elapsed_s=_seconds(body),
        tokens={},
    )


def _mean(body: Fields, results: Fields, task: str, key: str, n_samples: int) -> Mean:
    counts = body.object("n-samples", {}).object(task, {})
    n = counts.count("effective", n_samples)
    if not n:
        raise InputError(f"{body.where}: n-samples: {task} is missing, and no samples_{task}_*.jsonl lies beside it")
    if n_samples and n_samples != n:
        raise InputError(f"{body.where}: {task} has {n} questions, but {n_samples} samples lie beside it")
    stderr = key.replace(",", "_stderr,")  # "N/A" where there is none
    return Mean(
        results.number(key),
        results.error_of_mean(stderr) if is_number(results.body.get(stderr)) else None,
        n,
    )


def _metrics(results: Fields, body: Fields, name: str) -> dict[str, Any]:
    kept = {k: v for k, v in results.body.items() if k not in _NOT_METRICS and isinstance(v, int | float)}
    n = body.object("n-samples", {}).object(name, {}).count("effective", 0)
    return (
        ({"sample_len": n} if n else {})
        | kept
        | {
            "version": str(body.object("versions").body.get(name)),
            "shots": body.object("n-shot").body.get(name),
        }
    )


def _samples_path(results: Path, task: str) -> Path:
    """Samples carry the date of their results file."""
    date = re.sub(r"^.*?results_", "", results.stem)
    return results.with_name(f"samples_{task}_{date}.jsonl")


def _samples(path: Path) -> Iterator[Fields]:
    """The samples of a file in order of their documents, of the first filter where there are several."""
    samples: list[Fields] = []
    try:
        with path.open("rb") as file:
            for i, line in enumerate(file, 1):
                where = f"{path}, line {i}"
                sample = _sample(line, where)
                sample["continuations"] = _continuations(sample.pop("arguments", None))  # the prompts are long
                sample.pop("resps", None)
                samples.append(Fields(sample, where))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    samples.sort(key=lambda s: s.count("doc_id"))
    first = samples[0].text("filter", "") if samples else ""
    yield from (s for s in samples if s.text("filter", "") == first)


def _sample(line: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_object(line, where)
    except InputError as error:
        raise InputError(error.message) from error


def _question(sample: Fields) -> Question:
    """A sample of a multiple-choice task: a continuation with its log-probability for each choice, or a text."""
    answers = sample.array("filtered_resps")
    if "exact_match" in sample.body and answers and isinstance(answers[0], str):
        right = sample.text("target")
        choice = matched_letter(answers[0], right, is_match=bool(sample.number("exact_match")))
        return Question(str(sample.count("doc_id")), choice, right)
    logprobs = tuple(_logprob(x, sample) for x in answers)
    if not logprobs:
        raise InputError(f"{sample.where}: filtered_resps is empty, expected one answer a choice")
    target = sample.body.get("target")
    try:
        right = str(target) if str(target).isalpha() else LETTERS[int(str(target))]
        choice = LETTERS[logprobs.index(max(logprobs))]
    except (ValueError, IndexError) as error:
        raise InputError(f"{sample.where}: target: expected a choice's number, found {str(target)[:40]}") from error
    is_letters = [str(c).strip() for c in sample.array("continuations")] == list(LETTERS[: len(logprobs)])
    mass = fsum(map(exp, logprobs)) if is_letters else None
    return Question(str(sample.count("doc_id")), choice, right, logprobs, mass)


def _continuations(arguments: Any) -> list[Any]:
    """What was scored for each choice, of the (prompt, continuation) pairs of a sample."""
    requests = arguments.values() if isinstance(arguments, dict) else ()
    return [request.get("arg_1") for request in requests if isinstance(request, dict)]


def _logprob(answer: Any, sample: Fields) -> float:
    try:
        return float(answer[0])
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{sample.where}: filtered_resps: expected log-probabilities, found {answer!r}") from error


def _logged(sample: Fields) -> dict[str, Any]:
    """As llmkit's records have samples."""
    metrics = sample.texts("metrics", [])
    return {
        "doc_id": sample.count("doc_id"),
        "doc": sample.body.get("doc"),
        "target": sample.body.get("target"),
        "prompt_sha256": sample.text("prompt_hash", ""),
        "responses": sample.array("filtered_resps", []),
    } | {m: sample.body[m] for m in metrics if m in sample.body}
