"""MMLU, C-Eval or CMMLU with llmkit and with `lm_eval --model hf`, on the same questions, in one run.

    python tests/bench/eval_vs_lm_eval.py MODEL --data ../shared/data \
        --subjects abstract_algebra,high_school_us_history,anatomy,computer_security --limit 100

Each side runs in a process of its own (so that its peak memory is its own), one after the other, with the same number
of threads. The clock runs over the same work on both sides: building the requests, encoding them, scoring them; not
over imports and loading the model (processor time has llmkit's loading in it, and not lm-eval's). lm-eval reads the
questions from JSON lines of strings (its CSV loader turns a choice `0.50` into `0.5`), through its own task
definitions. Batch size 1 is its fastest on a CPU (it pads otherwise).

Exit code 0 when every choice agrees (exact ties aside), no log-probability differs by more than --tolerance and the
speed-up reaches --at-least; else 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUBJECTS = "abstract_algebra,high_school_us_history,anatomy,computer_security"
# lm-eval's definition of a subject, the split that is asked, and the name of a file of a split.
DEFINITIONS = {
    "mmlu": ("mmlu/default/mmlu_{}.yaml", "test", "{}_{}.csv"),
    "ceval": ("ceval/ceval-valid_{}.yaml", "val", "{}_{}.csv"),
    "cmmlu": ("cmmlu/cmmlu_{}.yaml", "test", "{}.csv"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="folder with mmlu/, ceval/ or cmmlu/ in it, published CSV layout")
    parser.add_argument("--bench", choices=sorted(DEFINITIONS), default="mmlu")
    parser.add_argument("--subjects", help=f"default for mmlu: {SUBJECTS}; `all` for every subject in the folder")
    parser.add_argument("--limit", type=int, help="first questions of each subject; default: all")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--repeat", type=int, default=1, help="run both sides this often and take each side's best")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--at-least", type=float, default=0.0, help="the speed-up to reach")
    parser.add_argument("--theirs", help="a result of lm-eval kept by --keep, instead of running it again")
    parser.add_argument("--keep", help="write both sides' results to this folder")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen_subjects(args: argparse.Namespace) -> list[str]:
    _, split, pattern = DEFINITIONS[args.bench]
    ending = pattern.format("", split)
    present = sorted(p.name.removesuffix(ending) for p in (folder(args) / split).glob(f"*{ending}"))
    if args.subjects:
        return present if args.subjects == "all" else args.subjects.split(",")
    return SUBJECTS.split(",") if args.bench == "mmlu" else present


def folder(args: argparse.Namespace) -> Path:
    inside = Path(args.data) / args.bench
    return inside if inside.is_dir() else Path(args.data)


def ours(args: argparse.Namespace) -> dict:
    import torch

    torch.set_num_threads(args.threads)
    sys.path.insert(0, str(ROOT))
    import lm_eval.evaluator  # noqa: F401 - before the clock
    import transformers  # noqa: F401

    from tests.evaluation.running import evaluate

    options = {"batch_tokens": args.batch_tokens} if args.batch_tokens else {}
    cpu = time.process_time()
    record = evaluate(
        args.model,
        args.bench,
        data=args.data,
        shots=args.shots,
        limit=args.limit,
        subjects=chosen_subjects(args),
        dtype=args.dtype,
        log_samples=True,
        **options,
    )
    cpu = time.process_time() - cpu
    result = record.benches[args.bench]
    answers = {
        subject_of(name): [
            {"prompt": s["prompt_sha256"], "logprobs": [r[0] for r in s["responses"]], "acc": s["acc"]} for s in samples
        ]
        for name, samples in record.samples.items()
    }
    return {"seconds": result.elapsed_s, "cpu_s": cpu, "answers": answers, "tokens": dict(result.tokens)}


def subject_of(task: str) -> str:
    """The subject of one of lm-eval's tasks (`mmlu_anatomy`)."""
    return next(
        task.removeprefix(stem)
        for stem in (Path(name).stem.format("") for name, _, _ in DEFINITIONS.values())
        if task.startswith(stem)
    )


def theirs(args: argparse.Namespace) -> dict:
    """lm-eval's `hf` backend over lm-eval's definitions; nothing of llmkit is imported here."""
    import hashlib
    import logging

    import lm_eval.tasks
    import torch
    import yaml
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    pattern, split, name = DEFINITIONS[args.bench]
    tasks = {}
    with tempfile.TemporaryDirectory() as scratch:
        for subject in chosen_subjects(args):
            files = {}
            for part in ("dev", split):
                rows = read_csv(folder(args) / part / name.format(subject, part), args.bench, subject)
                files[part] = str(Path(scratch) / f"{subject}_{part}.jsonl")
                Path(files[part]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            path = Path(lm_eval.tasks.__file__).parent / pattern.format(subject)
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            config = yaml.safe_load((path.parent / config.pop("include")).read_text(encoding="utf-8")) | config
            config.pop("tag", None)
            config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
            task = ConfigurableTask(config=config)
            task.set_config(key="num_fewshot", value=args.shots)
            task.set_fewshot_seed(seed=1234)
            tasks[subject] = task
    model = HFLM(pretrained=args.model, device="cpu", dtype=args.dtype, batch_size=1)
    started, cpu = time.perf_counter(), time.process_time()
    found = evaluate(model, tasks, limit=args.limit, bootstrap_iters=0, log_samples=True)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    answers = {
        subject: [
            {
                "prompt": hashlib.sha256(s["arguments"][0][0].encode()).hexdigest(),
                "logprobs": [float(r[0]) for r in s["filtered_resps"]],
                "acc": float(s["acc"]),
            }
            for s in sorted(samples, key=lambda s: s["doc_id"])
        ]
        for subject, samples in found["samples"].items()
    }
    return {"seconds": seconds, "cpu_s": cpu, "answers": answers}


def read_csv(path: Path, bench: str, subject: str) -> list[dict]:
    """Rows of strings, read here and not by llmkit."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if bench == "mmlu":
        return [{"question": r[0], "subject": subject, "choices": r[1:5], "answer": "ABCD".index(r[5])} for r in rows]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def run_side(args: argparse.Namespace, side: str) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--out", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
        return json.loads(out.read_text()) | {"process_s": time.perf_counter() - started}


def compare(mine: dict, other: dict) -> dict:
    """Choices, log-probabilities and accuracies of the two sides."""
    found = {"questions": 0, "choices_equal": 0, "ties": 0, "max_difference": 0.0, "prompts_differ": 0, "differ": []}
    accuracy = {}
    for subject, theirs_answers in other["answers"].items():
        ours_answers = mine["answers"][subject]
        if len(ours_answers) != len(theirs_answers):
            raise SystemExit(f"{subject}: {len(ours_answers)} questions against {len(theirs_answers)}")
        for index, (a, b) in enumerate(zip(ours_answers, theirs_answers, strict=True)):
            found["questions"] += 1
            found["prompts_differ"] += a["prompt"] != b["prompt"]
            x, y = a["logprobs"], b["logprobs"]
            found["max_difference"] = max(found["max_difference"], *(abs(p - q) for p, q in zip(x, y, strict=True)))
            if x.index(max(x)) == y.index(max(y)):
                found["choices_equal"] += 1
            elif sorted(y)[-1] == sorted(y)[-2] or sorted(x)[-1] == sorted(x)[-2]:
                found["ties"] += 1
            else:
                found["differ"].append(f"{subject} {index}: {x} against {y}")
        accuracy[subject] = [sum(s["acc"] for s in side) / len(side) for side in (ours_answers, theirs_answers)]
    return found | {"accuracy": accuracy}


def main() -> int:
    args = arguments()
    if args.side:
        result = {"ours": ours, "theirs": theirs}[args.side](args)
        result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        Path(args.out).write_text(json.dumps(result))
        return 0
    mine, other = [], []
    for _ in range(args.repeat):
        mine.append(run_side(args, "ours"))
        other.append(json.loads(Path(args.theirs).read_text()) if args.theirs else run_side(args, "theirs"))
    best, rival = (min(side, key=lambda r: r["seconds"]) for side in (mine, other))
    if args.keep:
        Path(args.keep).mkdir(parents=True, exist_ok=True)
        for name, side in (("ours", best), ("theirs", rival)):
            (Path(args.keep) / f"{name}.json").write_text(json.dumps(side))
    found = compare(best, rival)
    ratio = rival["seconds"] / best["seconds"]
    print(f"{args.bench}, {args.shots}-shot, {args.dtype}, {args.threads} threads, {found['questions']} questions")
    for name, side in (("llmkit", mine), ("lm-eval hf", other)):
        times = ", ".join(f"{r['seconds']:.1f}" for r in side)
        whole, cpu, peak = (side[-1][key] for key in ("process_s", "cpu_s", "peak_mib"))
        print(f"  {name:<11} {times} s, {cpu:.1f} of processors   whole process {whole:.1f} s   peak {peak:.0f} MiB")
    tokens = best["tokens"]
    print(
        f"  speed-up    {ratio:.2f}   tokens {tokens['tokens_unshared']} -> {tokens['tokens']}"
        f" ({tokens['tokens_unshared'] / tokens['tokens']:.2f} times fewer)"
    )
    print(
        f"  choices     {found['choices_equal']} equal, {found['ties']} ties, {len(found['differ'])} differ;"
        f" prompts that differ: {found['prompts_differ']}"
    )
    print(f"  log-probs   differ by at most {found['max_difference']:.2e}")
    for subject, (a, b) in found["accuracy"].items():
        print(f"  {subject:<36} {a:.4f} {b:.4f}")
    for line in found["differ"][:10]:
        print(f"  differs: {line}")
    is_good = not found["differ"] and not found["prompts_differ"] and ratio >= args.at_least
    return 0 if is_good and (found["max_difference"] <= args.tolerance or args.dtype != "float32") else 1


if __name__ == "__main__":
    sys.exit(main())
