"""Every Eval Ever 0.3.0: an aggregate file for each run of a benchmark, and its questions where the record has them.

Source: the schemas `eval.schema.json` and `instance_level_eval.schema.json` of the package every-eval-ever 0.3.0. The
files lie where its datastore has them, `data/BENCHMARK/DEVELOPER/MODEL/UUID.json`; the same record gives the same UUID.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.errors import InputError
from llmkit.evaluation.benches import Subject
from llmkit.evaluation.documents import logged_questions, question_and_choices
from llmkit.evaluation.formats.format import ReportFormat, file_part, json_line, when
from llmkit.evaluation.identity import digest_of
from llmkit.evaluation.record import BenchResult, Question, RunRecord
from llmkit.evaluation.report_inputs import ReportInputs, steps_of
from llmkit.evaluation.statistics import Mean

_SCHEMA = "0.3.0"
_ACCURACY = {
    "metric_id": "accuracy", "metric_name": "Accuracy", "metric_kind": "accuracy", "metric_unit": "proportion",
    "lower_is_better": False, "score_type": "continuous", "min_score": 0.0, "max_score": 1.0,
}  # fmt: skip


def _files(inputs: ReportInputs) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for record in inputs.records:
        for bench in record.benches.values():
            files |= _run(record, bench)
    if not files:
        raise InputError("no run of a benchmark to write", hint="give a record of llmkit eval --bench mmlu or another")
    return files


def _run(record: RunRecord, bench: BenchResult) -> dict[str, bytes]:
    name, model = bench.bench.name, _model_id(record)
    developer, _, label = model.rpartition("/")
    identity = digest_of([record.to_json()["model"], dict(record.settings), record.created, bench.to_json()])
    number = uuid.UUID(identity[:32], version=4)
    folder = f"data/{file_part(name)}/{file_part(developer)}/{file_part(label)}"
    body = aggregate(record, bench, model)
    rows = [
        _instance(body, bench.bench.task_name(s.name), s.subject, question, logged)
        for s, question, logged in logged_questions(record, bench)
        if logged is not None
    ]
    files: dict[str, bytes] = {}
    if rows:
        lines = "".join(map(json_line, rows)).encode()
        path = f"{folder}/{number}_samples.jsonl"
        body["detailed_evaluation_results"] = {
            "format": "jsonl", "file_path": path, "hash_algorithm": "sha256",
            "checksum": hashlib.sha256(lines).hexdigest(), "total_rows": len(rows),
        }  # fmt: skip
        files[path] = lines
    return {f"{folder}/{number}.json": json_line(body).encode(), **files}


def aggregate(record: RunRecord, bench: BenchResult, model: str) -> dict[str, Any]:
    """The aggregate file of a run of a benchmark, without the reference to its questions."""
    seconds = str(int(when(record).timestamp()))
    return {
        "schema_version": _SCHEMA,
        "evaluation_id": f"{bench.bench.name}/{model}/{seconds}",
        "evaluation_timestamp": seconds,
        "retrieved_timestamp": seconds,
        "source_metadata": {
            "source_name": "llmkit eval",
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            "evaluator_relationship": "other",
        },
        "eval_library": {
            "name": "llmkit",
            "version": str(record.versions.get("llmkit", "unknown")),
            "additional_details": dict(record.versions),
        },
        "model_info": _model_info(record, model),
        "evaluation_results": [_result(record, bench, *item) for item in _means(bench)],
    }


def _means(bench: BenchResult) -> Iterator[tuple[str, str, Mean]]:
    """Name, description and mean of each result: averages, categories, subjects."""
    name = bench.bench.name
    texts = {
        "micro": ("share of right answers, every question counts the same", bench.micro),
        "macro": ("mean of the subjects' shares of right answers", bench.macro),
    }
    yield name, *texts[bench.average]
    if len(bench.subjects) > 1:
        other = "micro" if bench.average == "macro" else "macro"
        yield f"{name}/{other}", *texts[other]
    if (overall := bench.macro_categories) is not None:
        yield f"{name}/macro_categories", "mean of the categories' means of subjects", overall
    for category, (micro, _) in bench.categories.items():
        yield f"{name}/{category}", f"share of right answers in {category}", micro
    for subject in bench.subjects:
        task = bench.bench.task_name(subject.name)
        yield task, f"share of right answers in {subject.name}", subject.acc


def _result(record: RunRecord, bench: BenchResult, name: str, description: str, mean: Mean) -> dict[str, Any]:
    uncertainty: dict[str, Any] = {"num_samples": mean.n}
    if mean.stderr is not None:
        uncertainty["standard_error"] = {"value": mean.stderr, "method": "analytic"}
    details = {"shots": bench.shots, "protocol": bench.protocol}
    details |= {k: record.settings.get(k) for k in ("prompt_format", "limit")}
    return {
        "evaluation_result_id": f"{name}:accuracy",
        "evaluation_name": name,
        "source_data": _source(bench),
        "metric_config": {"evaluation_description": description, **_ACCURACY},
        "score_details": {"score": mean.value, "uncertainty": uncertainty},
        "generation_config": {"additional_details": _texts(details)},
    }


def _source(bench: BenchResult) -> dict[str, Any]:
    source: dict[str, Any] = {"dataset_name": bench.bench.title, "source_type": "other"}
    if bench.bench.dataset:
        source |= {"source_type": "hf_dataset", "hf_repo": bench.bench.dataset}
        source |= {"hf_split": bench.bench.split} if bench.bench.split else {}
    return source


def _model_info(record: RunRecord, model: str) -> dict[str, Any]:
    known = {k: v for k, v in record.model.items() if k in ("dtype", "device", "quantization") or k.endswith("digest")}
    history = [str(step.get("transform")) for step in steps_of(record.model)]
    return {
        "name": str(record.model.get("label") or "model"),
        "id": model,
        "developer": model.rpartition("/")[0],
        "inference_engine": {
            "name": str(record.model.get("backend") or "unknown"),
            "version": str(record.versions.get("llmkit", "unknown")),
        },
        "additional_details": {
            "deployment_type": "self_deployed",
            "model_availability": "unknown",
            **_texts({**known, "history": " ".join(history) or None}),
        },
    }


def _instance(
    body: Mapping[str, Any], name: str, subject: Subject, question: Question, logged: Mapping[str, Any]
) -> dict[str, Any]:
    text, choices = question_and_choices(logged.get("doc"))
    is_right = question.is_right
    row: dict[str, Any] = {
        "schema_version": _SCHEMA,
        "evaluation_id": body["evaluation_id"],
        "model_id": body["model_info"]["id"],
        "evaluation_name": name,
        "evaluation_result_id": f"{name}:accuracy",
        "sample_id": question.id,
        "sample_hash": hashlib.sha256(f"{text}{question.target}".encode("utf-8", "replace")).hexdigest(),
        "interaction_type": "single_turn",
        "input": {
            "raw": text, "formatted": logged.get("prompt"), "reference": [question.target], "choices": choices or None,
        },
        "output": {"raw": [question.choice]},
        "answer_attribution": [
            {
                "turn_idx": 0, "source": "output.raw", "extracted_value": question.choice, "is_terminal": True,
                "extraction_method": "argmax of log-probabilities" if question.logprobs else "generated answer",
            }
        ],
        "evaluation": {"score": float(is_right), "is_correct": is_right},
        "metadata": _texts({"subject": subject.name, "category": subject.category or None}),
    }  # fmt: skip
    if question.logprobs is not None:
        row["metadata"]["logprobs"] = json.dumps(question.logprobs)
    return row


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {k: str(v) for k, v in values.items() if v is not None}


def _model_id(record: RunRecord) -> str:
    """`developer/model`, as the hub names models; a folder here has "local" for one."""
    label = str(record.model.get("label") or "model").strip("/")
    return label if label.count("/") == 1 else f"local/{label.rpartition('/')[2] or 'model'}"


FORMAT = ReportFormat("every-eval-ever", "a folder of Every Eval Ever's files", (), _files, b"{")
