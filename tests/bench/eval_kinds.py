"""Every kind of lm-eval's tasks with llmkit and with `lm_eval --model hf`, on the same questions, in one run.

    OMP_NUM_THREADS=1 python tests/bench/eval_kinds.py MODEL --kinds arc_easy,gsm8k --limit 16

Both sides run in this process, in turns, by lm-eval's own definitions over documents of our own
(tests/evaluation/small_tasks.py); what is counted is the CPU time of one thread from building the requests to the last
answer, the best of --repeat. Exit code 0 when every response agrees (log-probabilities within --tolerance) and no kind
takes longer than lm-eval's hf; else 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/evaluation")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kinds", help="names with commas; default: all")
    parser.add_argument("--limit", type=int, default=16, help="documents of each task")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1, help="lm-eval's; 1 is its fastest on a CPU for scores")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    import datasets
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from small_tasks import KINDS, load

    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.evaluation.runner import make_lm
    from llmkit.evaluation.tasks import quiet_lm_eval, set_shots

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    sides = {
        "ours": make_lm(open_checkpoint(args.model)),
        "theirs": HFLM(pretrained=args.model, device="cpu", dtype="float32", batch_size=args.batch_size),
    }
    is_good = True
    print(f"{'kind':<12}{'ours, s':>10}{'hf, s':>10}{'times':>8}{'largest difference':>20}")
    for name in args.kinds.split(",") if args.kinds else KINDS:
        seconds = dict.fromkeys(sides, float("inf"))
        found = {}
        for _ in range(args.repeat):
            for side, lm in sides.items():
                with tempfile.TemporaryDirectory() as folder, quiet_lm_eval():
                    loaded = load(Path(folder), [name], args.limit, new_tokens=args.new_tokens)
                    for task in loaded["tasks"].values():
                        set_shots(task, args.shots if "wikitext" not in name else None)
                    started = time.process_time()
                    results = evaluate(lm, loaded, bootstrap_iters=0, log_samples=True)
                    seconds[side] = min(seconds[side], time.process_time() - started)
                found[side] = [s["resps"] for s in results["samples"][f"small_{name}"]]
        difference = compared(found["ours"], found["theirs"])
        times = seconds["theirs"] / seconds["ours"]
        is_good &= difference <= args.tolerance and times >= 1
        print(
            f"{name:<12}{seconds['ours']:>10.2f}{seconds['theirs']:>10.2f}{times:>8.2f}{difference:>20.2g}", flush=True
        )
    return 0 if is_good else 1


def compared(ours: list, theirs: list) -> float:
    """The largest difference of log-probabilities, of a whole page relative to it; infinite where texts differ."""
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            x, y = x[0], y[0]
            if isinstance(y, str):
                largest = max(largest, 0.0 if x == y else float("inf"))
            elif isinstance(y, tuple):
                largest = max(largest, abs(x[0] - y[0]) if x[1] == y[1] else float("inf"))
            else:
                largest = max(largest, abs(x - y) / max(abs(y), 1.0))
    return largest


if __name__ == "__main__":
    sys.exit(main())
