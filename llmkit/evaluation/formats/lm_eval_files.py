"""lm-eval's own files: `results_DATE.json` and `samples_TASK_DATE.jsonl`, as its tools and `llmkit report` read them.

Source: lm-eval 0.4.13, `lm_eval/loggers/evaluation_tracker.py` (the files), `lm_eval/evaluator.py` (what is in them).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.errors import InputError
from llmkit.evaluation.documents import LETTERS, logged_questions
from llmkit.evaluation.formats.format import ReportFormat, file_part, json_line, when
from llmkit.evaluation.record import BenchResult, Question, RunRecord, SubjectResult
from llmkit.evaluation.report_inputs import ReportInputs
from llmkit.evaluation.statistics import Mean


def _files(inputs: ReportInputs) -> dict[str, bytes]:
    if not inputs.records:
        raise InputError(
            "nothing to write as lm-eval's results: no run record is given", hint="llmkit report run.json …"
        )
    files: dict[str, bytes] = {}
    for i, record in enumerate(inputs.records):
        name = file_part(_sanitized(record))
        stamp = when(record).replace(tzinfo=None, microsecond=i).isoformat(timespec="microseconds").replace(":", "-")
        files[f"{name}/results_{stamp}.json"] = json_line(results_of(record)).encode()
        for task, lines in samples_of(record):
            files[f"{name}/samples_{file_part(task)}_{stamp}.jsonl"] = "".join(map(json_line, lines)).encode()
    return files


def _sanitized(record: RunRecord) -> str:
    """The model's name as lm-eval names folders."""
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", str(record.model.get("label") or "model"))


def results_of(record: RunRecord) -> dict[str, Any]:
    """The results file of a record."""
    body: dict[str, dict[str, Any]] = {
        key: {}
        for key in (
            "results",
            "groups",
            "group_subtasks",
            "configs",
            "versions",
            "n-shot",
            "higher_is_better",
            "n-samples",
        )
    }
    for bench in record.benches.values():
        _add_bench(body, bench)
    for task, metrics in record.tasks.items():
        values = {k: v for k, v in metrics.items() if k not in ("version", "shots")}
        body["results"][task] = {"alias": task, **values}
        body["configs"][task] = {"task": task, "num_fewshot": metrics.get("shots")}
        body["versions"][task], body["n-shot"][task] = metrics.get("version"), metrics.get("shots")
    model, date = record.model, when(record)
    label = str(model.get("label") or "model")
    return {
        **{k: v for k, v in body.items() if v or k not in ("groups", "group_subtasks")},
        "config": {
            "model": f"llmkit {model.get('backend', '')}".strip(),
            "model_args": f"pretrained={label}",
            "model_dtype": model.get("dtype"),
            "device": model.get("device"),
            "limit": record.settings.get("limit"),
            "llmkit": {"model": dict(model), "settings": dict(record.settings), "versions": dict(record.versions)},
        },
        "date": date.timestamp(),
        "lm_eval_version": record.versions.get("lm-eval"),
        "transformers_version": record.versions.get("transformers"),
        "model_source": "llmkit",
        "model_name": label,
        "model_name_sanitized": _sanitized(record),
        "max_length": record.settings.get("max_length"),
        "chat_template": record.settings.get("prompt_format"),
        "total_evaluation_time_seconds": str(record.elapsed_s),
    }


def _add_bench(body: dict[str, dict[str, Any]], bench: BenchResult) -> None:
    group, metadata = bench.bench.name, {"version": bench.task_version, "protocol": bench.protocol}
    rows: dict[str, tuple[str, Mapping[str, Mean]]] = {}
    if len(bench.subjects) > 1:
        rows[group] = bench.bench.title, {"acc": bench.micro}
        body["group_subtasks"][group] = [bench.bench.task_name(s.name) for s in bench.subjects]
    for subject in bench.subjects:
        rows[bench.bench.task_name(subject.name)] = subject.name, {"acc": subject.acc, **subject.metrics}
    for task, (alias, means) in rows.items():
        body["results"][task] = {"alias": alias} | _metrics(means)
        body["versions"][task], body["n-shot"][task] = bench.task_version, bench.shots
        body["higher_is_better"][task] = dict.fromkeys(means, True)
        n = means["acc"].n
        if task == group:
            body["groups"][task] = body["results"][task]
        else:
            body["configs"][task] = {
                "task": task, "output_type": "multiple_choice", "num_fewshot": bench.shots, "metadata": metadata
            }  # fmt: skip
            body["n-samples"][task] = {"original": n, "effective": n}


def _metrics(means: Mapping[str, Mean]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for metric, mean in means.items():
        values[f"{metric},none"] = mean.value
        values[f"{metric}_stderr,none"] = "N/A" if mean.stderr is None else mean.stderr
    return values


def samples_of(record: RunRecord) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each task's samples: all that the record has of every question."""
    listed: dict[str, list[dict[str, Any]]] = {}
    for bench in record.benches.values():
        for subject, question, logged in logged_questions(record, bench):
            rows = listed.setdefault(bench.bench.task_name(subject.name), [])
            rows.append(_sample(question, len(rows), subject, logged or {}))
    yield from listed.items()
    for task, some in record.samples.items():
        if task not in listed:
            yield task, [_logged_sample(s) for s in some if isinstance(s, Mapping)]


def _sample(question: Question, row: int, subject: SubjectResult, logged: Mapping[str, Any]) -> dict[str, Any]:
    """One question, with what `--log-samples` kept of it."""
    target = LETTERS.index(question.target) if question.target in LETTERS and question.target else question.target
    responses = logged.get("responses") or [[x] for x in question.logprobs or ()]
    document = logged.get("doc", {"id": question.id, "subject": subject.name})
    body = {
        "doc_id": logged.get("doc_id", row),
        "doc": document,
        "target": target,
        "responses": responses,
        "acc": float(question.is_right),
    }
    return _logged_sample({**logged, **body, "metrics": ["acc", *(m for m in subject.metrics if m in logged)]})


def _logged_sample(logged: Mapping[str, Any]) -> dict[str, Any]:
    document, prompt = logged.get("doc"), logged.get("prompt")
    given = logged.get("responses")
    responses = (
        [[str(x) for x in r] if isinstance(r, list) else str(r) for r in given] if isinstance(given, list) else []
    )
    metrics = logged.get("metrics") or [k for k, v in logged.items() if isinstance(v, float)]
    arguments = {}
    if isinstance(prompt, str):
        continuations = logged.get("continuations") or [""] * len(responses)
        arguments = {f"gen_args_{i}": {"arg_0": prompt, "arg_1": c} for i, c in enumerate(continuations)}
    return {
        "doc_id": logged.get("doc_id"),
        "doc": document,
        "target": str(logged.get("target")),
        "arguments": arguments,
        "resps": [[r] for r in responses],
        "filtered_resps": responses,
        "filter": "none",
        "metrics": metrics,
        "doc_hash": _hash(json.dumps(document, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt) if isinstance(prompt, str) else str(logged.get("prompt_sha256", "")),
        "target_hash": _hash(str(logged.get("target"))),
    } | {m: logged[m] for m in metrics if m in logged}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


FORMAT = ReportFormat("lm-eval", "a folder of lm-eval's results", (), _files, b"{")
