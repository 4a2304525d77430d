"""Seeded run records of every size that a report meets, made without a model."""

from __future__ import annotations

import random
from dataclasses import replace
from math import log, sqrt

from llmkit.evaluation.benches import Bench, Subject, load_bench
from llmkit.evaluation.record import BenchResult, Question, RunRecord, SubjectResult
from llmkit.evaluation.statistics import mean

HOSTILE = [
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>",
    "\u202etxet desrever \u202d and \u2067 isolates left open",
    "10 000 characters: " + "wide" * 2500,
    r"$\frac{1}{2}$ \begin{align} x &= \sqrt{2} \end{align} {{ 7 * 7 }} {% raw %}",
    "中文标点：《论语》——“学而时习之，不亦说乎？”下列选项中，正确的是（　　）。",
    "\x00\x1b[31mcontrol\ud800 characters",
]


def question(rng: random.Random, number: int, skill: float) -> Question:
    """An answer that is right with probability `skill`."""
    target = rng.randrange(4)
    choice = target if rng.random() < skill else rng.choice([i for i in range(4) if i != target])
    shares = [rng.random() * 0.5 + (1.0 if i == choice else 0.0) for i in range(4)]
    logprobs = tuple(log(0.9 * s / sum(shares)) for s in shares)
    return Question(str(number), "ABCD"[choice], "ABCD"[target], logprobs, 0.9, f"{number:016x}")


def again(rng: random.Random, asked: Question, changes: float) -> Question:
    """The same question answered by another run, which answers at random with probability `changes`."""
    if rng.random() >= changes:
        return asked
    return replace(question(rng, int(asked.id), 0.25), target=asked.target, prompt=asked.prompt)


def subject_result(subject: Subject, questions: list[Question]) -> SubjectResult:
    return SubjectResult(subject, mean([float(q.is_right) for q in questions]), tuple(questions))


def bench_result(
    bench: Bench, seed: int = 0, *, n: int = 40, skill: float = 0.45, only: int | None = None
) -> BenchResult:
    rng = random.Random(seed)
    subjects = []
    for subject in bench.subjects[:only]:
        its_skill = min(max(rng.gauss(skill, 0.12), 0.05), 0.98)
        size = n if n == 1 else rng.randrange(n // 2, 2 * n)
        subjects.append(subject_result(subject, [question(rng, i, its_skill) for i in range(size)]))
    missing = tuple(s.name for s in bench.subjects[only:]) if only is not None else ()
    return BenchResult(
        bench, tuple(subjects), missing, 5, 0, "1.0", "ab" * 32, 61.5, {"tokens": 123456, "tokens_unshared": 801234}
    )


def changed(result: BenchResult, seed: int, changes: float) -> BenchResult:
    rng = random.Random(seed)
    subjects = [subject_result(s.subject, [again(rng, q, changes) for q in s.questions]) for s in result.subjects]
    return replace(result, subjects=tuple(subjects))


def run(
    label: str, *results: BenchResult, history: tuple[str, ...] = (), samples: bool = False, **model: object
) -> RunRecord:
    logged = {r.bench.task_name(s.name): documents(s) for r in results for s in r.subjects} if samples else {}
    return RunRecord(
        model={
            "label": label, "path": f"/models/{label}", "architectures": ["LlamaForCausalLM"], "quantization": None,
            "nbytes": 269_060_552, "header_digest": "1f" * 32, "source_digest": f"{abs(hash(label)):064x}"[:64],
            "tokenizer_digest": "3c" * 32, "history": [{"transform": t} for t in history], "dtype": "float32",
            "device": "cpu", "backend": "llmkit",
        } | model,
        settings={"bench": [r.bench.name for r in results], "shots": 5, "limit": None, "protocol": "lm-eval"},
        versions={"llmkit": "0.2.0", "lm-eval": "0.4.12", "python": "3.11.7", "torch": "2.13.0"},
        created="2026-11-29T12:00:00+00:00",
        elapsed_s=61.5,
        benches={r.bench.name: r for r in results},
        tasks={},
        continuations={" A": [330], " B": [389], " C": [340], " D": [422]},
        samples=logged,
        warnings=("MMLU: the data folder lacks 1 of 57 subjects (virology): the averages are over those present",),
    )  # fmt: skip


def documents(result: SubjectResult) -> list[dict]:
    """What `--log-samples` keeps, with texts that a page must not obey."""
    return [
        {
            "doc_id": int(q.id), "target": "ABCD".index(q.target), "prompt": "Question before.\nAnswer: A\n\n" + text,
            "doc": {"question": text, "choices": ["one", "二", "<b>three</b>", "أربعة"]},
        }
        for q, text in ((q, HOSTILE[i % len(HOSTILE)]) for i, q in enumerate(result.questions))
    ]  # fmt: skip


def tasks(shift: float = 0.0) -> dict[str, dict]:
    """Metrics of lm-eval's tasks as its results have them: shares with and without an error, others, and a group."""

    def share(value: float, n: int, name: str) -> dict:
        metric, _, rest = name.partition(",")
        error = sqrt(value * (1 - value) / (n - 1))
        return {"sample_len": n, name: value, f"{metric}_stderr,{rest}": error}

    strict = share(0.05 + shift, 200, "exact_match,strict-match")
    loose = share(0.15, 200, "exact_match,flexible-extract")
    return {
        "arc_challenge": share(0.31 + shift, 1172, "acc,none") | share(0.35 + shift, 1172, "acc_norm,none"),
        "hellaswag": share(0.42, 900, "acc,none") | {"version": "1.0", "shots": 0},
        "gsm8k": strict | loose,
        "ifeval": {"inst_level_strict_acc,none": 0.27, **share(0.16 - shift, 541, "prompt_level_strict_acc,none")},
        "wikitext": {"sample_len": 62, "word_perplexity,none": 24.5},
        "a_group": {"acc,none": 0.38, "acc_stderr,none": 0.011},
    }


def mmlu(**options) -> BenchResult:
    return bench_result(load_bench("mmlu"), **options)


def ceval(**options) -> BenchResult:
    return bench_result(load_bench("ceval"), **options)
