"""Run records read back: llmkit's own, of this form and the one before it, and lm-eval's results with their samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.errors import InputError
from llmkit.evaluation import lm_eval_results
from llmkit.evaluation.benches import Bench, Subject, bench_names, load_bench
from llmkit.evaluation.record import COLUMNS, FORMAT, BenchResult, Question, RunRecord, SubjectResult
from llmkit.evaluation.statistics import Mean
from llmkit.formats.json_fields import Fields, is_count, is_number
from llmkit.formats.json_text import REMEDY, as_object, read_json
from llmkit.formats.paths import expanded

_FORMATS = ("llmkit.eval/1", FORMAT)
_MAX_NBYTES = 1 << 30  # the samples of a long run have its prompts, far more than the files of a checkpoint
_HINT = "give a file of llmkit eval -o, or the folder or results_*.json of lm_eval --output_path"


def read_record(path: str | Path) -> RunRecord:
    """A run record.

    Args:
        path: a file that `llmkit eval -o` wrote, a results file of lm-eval, or the folder that holds one.

    Raises:
        InputError: it cannot be read, is truncated, is no record, or says of itself what cannot be.
    """
    file = expanded(path)
    try:
        return _read(lm_eval_results.results_in(file) if file.is_dir() else file)
    except InputError as error:
        raise InputError(error.message, hint=error.hint or _HINT) from error


def _read(file: Path) -> RunRecord:
    try:
        document = read_json(file, max_nbytes=_MAX_NBYTES, what="a record", takes_mark=True)
    except InputError as error:
        raise InputError(error.message, hint=error.hint if error.hint != REMEDY else None) from error
    body = Fields(as_object(document, str(file)), str(file))
    stated = body.body.get("format")
    if stated in _FORMATS:
        return own_record(body)
    if lm_eval_results.is_results(body.body):
        return lm_eval_results.record_of(body, file)
    if isinstance(stated, str) and stated.startswith("llmkit.eval/"):
        raise InputError(f"{file} is of the form {stated}, expected {' or '.join(_FORMATS)}", hint="update llmkit")
    raise InputError(f"{file} is no record of an evaluation: neither llmkit's nor lm-eval's")


def own_record(body: Fields) -> RunRecord:
    """A record of llmkit's own from its JSON.

    Raises:
        InputError: a field is missing or is not of its type, columns differ in length, or a subject's accuracy is not
            the share of its right answers.
    """
    return RunRecord(
        model=dict(body.object("model").body),
        settings=dict(body.object("settings").body),
        versions={k: str(v) for k, v in body.object("versions").body.items()},
        created=body.text("created"),
        elapsed_s=body.number("elapsed_s"),
        benches={name: _bench_result(name, fields) for name, fields in body.objects("benches")},
        tasks={name: dict(fields.body) for name, fields in body.objects("tasks", {})},
        continuations=body.arrays("continuations", is_count, "token ids"),
        samples=body.arrays("samples", lambda sample: isinstance(sample, dict), "objects"),
        warnings=tuple(body.texts("warnings", [])),
        n_reused=body.count("n_reused", 0),
        shard=_shard(body.object("shard", {})),
    )


def _shard(fields: Fields) -> dict[str, Any]:
    """The description of the whole run in a shard's record; empty for a whole run."""
    if not fields.body:
        return {}
    index, count = fields.count("index"), fields.count("count")
    if not 1 <= index <= count:
        raise InputError(f"{fields.where}: shard {index} of {count} cannot be")
    tasks, aggregations = fields.object("tasks"), fields.object("aggregations")
    for sizes in (tasks, *(f for _, f in fields.objects("benches"))):
        for name in sizes.body:
            sizes.count(name)
    for name in tasks.body:
        of_task = aggregations.object(name)
        for metric, function in of_task.body.items():
            if function is not None:
                of_task.text(metric)
    for _, group in fields.objects("groups"):
        group.text("version")
        metrics = group.array("metrics")
        if not {*group.texts("tasks")} <= tasks.body.keys() or not all(isinstance(m, dict) for m in metrics):
            raise InputError(f"{group.where}: expected tasks of the run, and metrics as objects")
    for name, values in fields.objects("values", {}):
        for metric in values.body:
            if not all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], int) for p in values.array(metric)):
                raise InputError(f"{values.where}: {metric}: expected [question, value] of each question of {name}")
    return dict(fields.body)


def _bench_result(name: str, fields: Fields) -> BenchResult:
    subjects = [_subject_result(subject, f) for subject, f in fields.objects("subjects")]
    if not subjects:
        raise InputError(f"{fields.where} has no subjects")
    missing = fields.texts("missing", [])
    bench = bench_of(name, [s.subject for s in subjects], missing, fields.text("title"))
    tokens = fields.object("tokens", {})
    return BenchResult(
        bench=bench,
        subjects=tuple(subjects),
        missing=tuple(missing),
        shots=fields.count("shots"),
        n_truncated=fields.count("n_truncated", 0),
        n_fewer_shots=fields.count("n_fewer_shots", 0),
        task_version=fields.text("task_version", ""),
        task_digest=fields.text("task_digest", ""),
        elapsed_s=fields.number("elapsed_s", 0.0),
        tokens={k: tokens.count(k) for k in tokens.body},
        protocol=fields.text("protocol", "lm-eval"),
        average=fields.choice("average", ("micro", "macro"), "micro"),
        letter_ids=fields.arrays("letter_ids", _are_ids, "token ids' arrays"),
    )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_count, value))


def bench_of(name: str, present: list[Subject], missing: list[str], title: str) -> Bench:
    """The benchmark of a record: subjects and categories as the record has them, the rest as installed, if it is."""
    if name in bench_names():
        base = load_bench(name)
    else:
        base = Bench(name, title, (), {}, f"{name}_{{subject}}", "", "", "", "", "", 0)
    stated = {s.name: s for s in present}
    known = [stated.pop(s.name, s) for s in base.subjects]
    others = [Subject(m) for m in missing if m not in base.by_name and m not in stated]
    return replace(base, title=title, subjects=(*known, *stated.values(), *others))


def _subject_result(name: str, fields: Fields) -> SubjectResult:
    acc = _mean(fields, "acc")
    if not 0 <= acc.value <= 1:
        raise InputError(f"{fields.where}: acc is {acc.value:.6g}, expected a share from 0 to 1")
    questions = _questions(fields)
    if questions and len(questions) != acc.n:
        raise InputError(f"{fields.where}: {acc.n} questions are counted, but {len(questions)} are listed")
    n_right = sum(q.is_right for q in questions)
    if questions and abs(n_right - acc.value * acc.n) > 1e-6 * acc.n:
        raise InputError(f"{fields.where}: acc is {acc.value:.6g}, but {n_right} of {acc.n} answers are right")
    subject = Subject(name, fields.text("category", ""), fields.text("subcategory", ""), fields.text("label", ""))
    return SubjectResult(
        subject=subject,
        acc=acc,
        questions=questions,
        metrics={metric: _mean(f, "value") for metric, f in fields.objects("metrics", {})},
    )


def _mean(fields: Fields, key: str) -> Mean:
    n = fields.count("n")
    if not n:
        raise InputError(f"{fields.where}: n is 0, expected at least one question")
    return Mean(fields.number(key), fields.error_of_mean("stderr"), n)


def _questions(fields: Fields) -> tuple[Question, ...]:
    """The columns as questions; the form /1 has letters alone, as one text, and questions are known by their row."""
    targets = _column(fields, "targets") or []
    columns = {"ids": [str(i) for i in range(len(targets))]}
    columns |= {column: values for column in COLUMNS if (values := _column(fields, column)) is not None}
    for column, values in columns.items():
        if len(values) != len(targets):
            raise InputError(f"{fields.where}: {len(values)} {column} and {len(targets)} targets")
    if len(set(columns["ids"])) != len(targets):
        raise InputError(f"{fields.where}: ids: one of them occurs twice")
    names = [COLUMNS[column] for column in columns]
    return tuple(Question(**dict(zip(names, row, strict=True))) for row in zip(*columns.values(), strict=True))


def _column(fields: Fields, name: str) -> list[Any] | None:
    value = fields.body.get(name)
    if value is None:
        return None
    if name == "mass":
        return [x if x is None else _number(x, fields, name) for x in fields.array(name)]
    if name == "logprobs":
        rows = fields.array(name)
        return [row if row is None else _numbers(row, fields, name) for row in rows]
    return list(value) if isinstance(value, str) else fields.texts(name)


def _numbers(row: Any, fields: Fields, name: str) -> tuple[float, ...]:
    if not isinstance(row, list):
        raise InputError(f"{fields.where}: {name}: expected arrays of numbers, found {str(row)[:40]}")
    return tuple(_number(x, fields, name) for x in row)


def _number(value: Any, fields: Fields, name: str) -> float:
    if not is_number(value):
        raise InputError(f"{fields.where}: {name}: expected numbers, found {str(value)[:40]}")
    return float(value)
