"""Running prepared tasks through lm-eval's `evaluate`, and reading its samples.

Imported only when something is evaluated.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.evaluator import evaluate as lm_evaluate

from llmkit.architecture.prompts import ChatTemplate, Turns
from llmkit.errors import InputError, listing
from llmkit.evaluation.benches import Subject
from llmkit.evaluation.documents import LETTERS
from llmkit.evaluation.extraction import matched_letter
from llmkit.evaluation.identity import digest_of
from llmkit.evaluation.lm import Sent, SharedPrefixLM
from llmkit.evaluation.meter import Meter
from llmkit.evaluation.prompting import probability_mass
from llmkit.evaluation.protocol import Protocol, Samples, Workload
from llmkit.evaluation.record import BenchResult, Question, SubjectResult
from llmkit.evaluation.statistics import mean
from llmkit.evaluation.tasks import as_errors_of, line_of_ones_own, quiet_lm_eval, require_shots, set_shots

Values = dict[str, dict[str, list[Any]]]
BOOTSTRAP_ITERS = (
    1000  # for the metrics without a closed form among lm-eval's other tasks; lm-eval itself takes 100,000
)

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function, where a definition names one


def run_bench(
    lm: SharedPrefixLM,
    work: Workload,
    tasks: Mapping[str, Any],
    protocol: Protocol,
    subjects: Sequence[str],
) -> tuple[BenchResult, Samples]:
    """Score `subjects` in one go; `tasks` are those of all subjects."""
    bench = work.bench
    meter = Meter(lm)
    by_task = {bench.task_name(subject): tasks[subject] for subject in subjects}
    results = _evaluate(lm, by_task, limit=work.limit, chat_template=work.chat, bootstrap_iters=0)
    scored, logged = [], {}
    for name in subjects:
        samples = sorted(results["samples"][bench.task_name(name)], key=lambda s: int(s["doc_id"]))
        scored.append(_subject(bench.by_name.get(name, Subject(name)), samples, lm))
        logged[bench.task_name(name)] = [_logged(s) for s in samples]
    some = tasks[subjects[0]]
    result = BenchResult(
        bench=bench,
        subjects=tuple(scored),
        missing=work.missing,
        shots=int(some.get_config("num_fewshot") or 0),
        n_truncated=meter.n_truncated,
        task_version=str(some.VERSION),
        task_digest=_digest_tasks(tasks),
        elapsed_s=meter.elapsed_s,
        tokens=meter.tokens,
        protocol=protocol.name,
        average=protocol.average,
        letter_ids=_letter_ids(lm, results["samples"][bench.task_name(subjects[0])]),
    )
    return result, logged


def run_tasks(
    lm: SharedPrefixLM,
    loaded: Any,
    *,
    shots: int | None,
    limit: float | None,
    chat_template: bool,
    questions: Mapping[str, list[int]] | None = None,
) -> tuple[dict[str, Any], Samples, Values]:
    """Score lm-eval's own tasks and groups: its results by task, its samples, the values of metrics by question.

    Args:
        questions: task -> the only questions that are scored; None for all within `limit`.
    """
    tasks = list(loaded["tasks"].values())
    if not tasks:
        raise InputError("nothing to score: no group that was named has a task", hint="list tasks in its definition")
    with as_errors_of([str(task.config.task) for task in tasks]):
        for task in tasks:
            set_shots(task, shots)
            require_shots(task)
        output = _evaluate(
            lm,
            loaded,
            limit=None if questions else limit,
            chat_template=chat_template,
            bootstrap_iters=BOOTSTRAP_ITERS,
            questions=questions,
        )
    results: dict[str, Any] = {}
    for name, metrics in output["results"].items():
        kept = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        results[name] = {k: float(v) if "," in k else v for k, v in kept.items()}
        results[name] |= {"version": str(output["versions"].get(name)), "shots": output["n-shot"].get(name)}
    samples = output["samples"].items()
    for name, some in samples:
        if some and not any("," in key for key in results.get(name, ())):
            raise InputError(
                f"{name}: its questions were scored, and no number came of it; its process_results returned "
                f"{listing(map(str, some[0]['metrics'])) or 'no metric'}",
                hint="correct the definition of the task: each metric is a number, and metric_list says how to average",
            )
    values = {name: _values(some) for name, some in samples}
    return results, {name: [_logged(s) for s in some] for name, some in samples}, values


def _values(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """`metric,filter` -> [question, value] of each question."""
    values: dict[str, list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            key = f"{metric},{sample.get('filter', 'none')}"
            values.setdefault(key, []).append([int(sample["doc_id"]), sample[metric]])
    plain: dict[str, list[Any]] = json.loads(json.dumps(values, default=float))
    return plain


def _evaluate(
    lm: SharedPrefixLM,
    tasks: Any,
    *,
    limit: float | None,
    chat_template: bool,
    bootstrap_iters: int,
    questions: Mapping[str, list[int]] | None = None,
) -> Any:
    with quiet_lm_eval():
        try:
            return lm_evaluate(
                lm,
                tasks,
                limit=limit,
                samples=questions or None,
                bootstrap_iters=bootstrap_iters,
                log_samples=True,
                apply_chat_template=chat_template,
                # a format without history takes the shots as part of its one question
                fewshot_as_multiturn=chat_template and isinstance(lm.prompt, ChatTemplate | Turns | None),
            )
        except ValueError as error:  # lm-eval's word for tasks it may not run: unsafe code, images
            if line_of_ones_own(error):
                raise
            raise InputError(f"lm-eval: {error}") from error


def _subject(subject: Subject, samples: Sequence[Mapping[str, Any]], lm: SharedPrefixLM) -> SubjectResult:
    metrics = [m for m in samples[0]["metrics"] if m not in ("acc", "exact_match")]
    questions = tuple(_question(s, lm) for s in samples)
    return SubjectResult(
        subject=subject,
        acc=mean([float(q.is_right) for q in questions]),
        questions=questions,
        metrics={m: mean([float(s[m]) for s in samples]) for m in metrics},
    )


def _question(sample: Mapping[str, Any], lm: SharedPrefixLM) -> Question:
    """The best-scored choice, the first of equals, as numpy's argmax has it; or the letter that was generated."""
    sent = _sent(lm, sample)
    row = str(sample["doc_id"])
    if "acc" not in sample["metrics"]:
        right, text = str(sample["target"]), str(sample["filtered_resps"][0])
        choice = matched_letter(text, right, is_match=bool(sample["exact_match"]))
        return Question(row, choice, right, prompt=sent[0].prompt)
    logprobs = tuple(float(x[0]) for x in sample["filtered_resps"])
    is_letters = len({s.prompt for s in sent}) == 1
    return Question(
        id=row,
        choice=LETTERS[logprobs.index(max(logprobs))],
        target=LETTERS[int(sample["target"])],
        logprobs=logprobs,
        mass=probability_mass([[s.targets] for s in sent], logprobs) if is_letters else None,
        prompt=sent[0].prompt,
    )


def _sent(lm: SharedPrefixLM, sample: Mapping[str, Any]) -> list[Sent]:
    """What became of a sample's requests: one a choice, or the one that was to be answered."""
    requests = [(str(r[0]), r[1]) for r in sample["arguments"]]
    return [lm.sent[(lm.with_answer_prefix(a), b) if isinstance(b, str) else (a,)] for a, b in requests]


def _letter_ids(lm: SharedPrefixLM, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, ...]]]:
    """The tokens that stood for each letter after the first prompt; none where answers are texts."""
    sample = min(samples, key=lambda s: int(s["doc_id"]))
    texts = [str(r[1]).strip() for r in sample["arguments"]]
    if texts != list(LETTERS[: len(texts)]):
        return {}
    return {letter: [s.targets] for letter, s in zip(texts, _sent(lm, sample), strict=True)}


def _logged(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as it goes into the record: the document, what was sent, and what came back."""
    prompt = str(sample["arguments"][0][0])
    kept: dict[str, Any] = {
        "doc_id": int(sample["doc_id"]),
        "doc": sample["doc"],
        "target": sample["target"],
        "prompt": prompt,
        "continuations": [a[1] for a in sample["arguments"] if len(a) > 1 and isinstance(a[1], str)],
        "prompt_sha256": hashlib.sha256(prompt.encode("utf-8", "backslashreplace")).hexdigest(),
        "responses": [list(r) if isinstance(r, tuple) else r for r in sample["filtered_resps"]],
    }
    kept |= {m: sample[m] for m in sample["metrics"] if m in sample}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def _digest_tasks(tasks: Mapping[str, Any]) -> str:
    """A digest of the definitions that shape prompts and metrics."""
    keys = ("task", "description", "doc_to_text", "doc_to_choice", "doc_to_target", "target_delimiter",
            "fewshot_delimiter", "fewshot_config", "output_type", "metric_list", "num_fewshot")  # fmt: skip
    bodies = [[_ADDRESS.sub("", str(task.get_config(k))) for k in keys] for task in tasks.values()]
    return digest_of(bodies)
