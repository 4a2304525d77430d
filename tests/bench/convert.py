"""How fast `llmkit convert` is, there and back, beside `cp` of the same bytes, in one run.

    python tests/bench/convert.py SCRATCH [--to meta …] [--dtype float16] [--repeat N] [--keep]

SCRATCH needs 9 GB. The model has the shape of tests/bench/delta_apply.py (1.1B, three files, grouped heads). Each
direction is one command and counts on its own: its wall time over that of `cp -r` of the folder it reads. Files are
warm; disks are synced before each run, and llmkit syncs its output (cp does not: `cp + sync` does). Anonymous memory
is the peak of RssAnon in /proc/PID/status, sampled every 20 ms. At the end the tensors that came back are compared
with the original's, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from statistics import median

from delta_apply import Run, make_model, timed

TARGET, PEAK_MIB = 2.5, 700


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    return folder


def compare(first: Path, second: Path) -> str:
    """How many tensors of two folders have the same bits."""
    import torch

    import llmkit

    a, b = llmkit.open_checkpoint(first), llmkit.open_checkpoint(second)
    same = 0
    for name, lazy in a.tensors.items():
        x, y = lazy.load(), b.tensors[name].load() if name in b.tensors else None
        same += y is not None and x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    return f"{same} of {len(a.tensors)} tensors came back bit for bit ({len(b.tensors)} written)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--to", nargs="+", default=["meta", "gguf"])
    parser.add_argument("--options", default="", help="more options of the way there, in one string")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="keep the model for another run")
    args = parser.parse_args()
    home = args.scratch / args.dtype
    model = home / "base"
    make_model(model, 0, 1.0, args.dtype)
    for layout in args.to:
        runs: dict[str, list[Run]] = {}
        there, back = home / layout, home / "back"
        for _ in range(args.repeat):
            for source, out, target in ((model, there, layout), (there, back, "hf")):
                copy, fresh_out = fresh(home / "cp"), fresh(out)
                started = time.monotonic()
                runs.setdefault(f"cp to {target}", []).append(timed(["cp", "-r", str(source), str(copy)]))
                os.sync()
                runs.setdefault(f"cp + sync to {target}", []).append(Run(time.monotonic() - started, 0.0))
                fresh(copy)
                more = shlex.split(args.options) if target == layout else []
                command = [sys.executable, "-m", "llmkit", "convert", str(source), "--to", target, *more]
                runs.setdefault(f"llmkit to {target}", []).append(timed([*command, "-o", str(fresh_out), "-q"]))
        report(layout, runs)
        print(compare(model, back))
        for folder in (there, back):
            fresh(folder)
    if not args.keep:
        shutil.rmtree(home)


def report(layout: str, runs: dict[str, list[Run]]) -> None:
    """Best of the runs, all of them, and the targets."""
    best = {name: min(run.wall for run in found) for name, found in runs.items()}
    for name, found in runs.items():
        every = ", ".join(f"{run.wall:.2f} ({run.cpu:.2f} cpu)" for run in found)
        print(f"{name:>18}  {best[name]:6.2f} s  {max(r.mib for r in found):5.0f} MiB anonymous   [{every}]")
    for target in (layout, "hf"):
        mine, copied = best[f"llmkit to {target}"], best[f"cp to {target}"]
        synced = best[f"cp + sync to {target}"]
        print(f"to {target}: {mine / copied:.2f} x cp, {mine / synced:.2f} x cp + sync   (target: at most {TARGET})")
        pairs = zip(runs[f"llmkit to {target}"], runs[f"cp to {target}"], strict=True)
        print(f"to {target}: {median(a.wall / b.wall for a, b in pairs):.2f} x cp, the median of runs side by side")
    both = sum(best[f"llmkit to {t}"] for t in (layout, "hf")) / sum(best[f"cp to {t}"] for t in (layout, "hf"))
    peak = max(r.mib for name, found in runs.items() if name.startswith("llmkit") for r in found)
    print(f"hf -> {layout} -> hf: {both:.2f} x cp; anonymous peak {peak:.0f} MiB   (target: under {PEAK_MIB})")


if __name__ == "__main__":
    main()
