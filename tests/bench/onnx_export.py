"""One checkpoint to ONNX folders in float32 and int4, by llmkit, Optimum and the ONNX Runtime GenAI builder.

    python tests/bench/onnx_export.py MODEL SCRATCH [--optimum PYTHON] [--genai PYTHON] [--repeat 3]

Each is one command in a process of its own, `--no-check` for llmkit and without validation for Optimum; they take turns
`--repeat` times, and the best of each counts. Wall and CPU time are the whole command's, imports included; the imports
alone are lines of their own. Peak is the process's VmHWM (of those that start others the largest sum of VmRSS), and
anonymous memory RssAnon, sampled every 20 ms. Disk is the new files; what is hard-linked to the source is not counted.
Under each of the others: how many times as much it takes as llmkit at the same precision, linked in float32.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for known in found:
        found += children.get(known, [])
    return found


def memory_of(pid: int) -> dict[str, int]:
    """What the kernel says of a process's memory, in kB; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if "kB" in rest}


def timed(command: list[str], log: Path) -> dict[str, float]:
    """Wall and CPU seconds, and memory in MB; raises for a command that fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    peak = {"peak": 0, "RssAnon": 0}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1"})

        def watch() -> None:
            pids, n = [process.pid], 0
            while process.poll() is None:
                pids, n = tree(process.pid) if n % 10 == 9 else pids, n + 1
                found = [memory_of(pid) for pid in pids]
                key = "VmHWM" if len(found) == 1 else "VmRSS"
                peak["peak"] = max(peak["peak"], sum(f.get(key, 0) for f in found))
                peak["RssAnon"] = max(peak["RssAnon"], sum(f.get("RssAnon", 0) for f in found))
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        watcher.join()
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        raise RuntimeError(f"{command[:4]}: exit {code}: {log.read_text().strip().splitlines()[-1]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu, "peak": peak["peak"] / 1e3, "anon": peak["RssAnon"] / 1e3}


def new_bytes(folder: Path) -> float:
    """MB of the files that have no other name, i.e. are not shared with the source."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.stat().st_nlink == 1) / 1e6


@dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
        against: the case that it is compared with.
    """

    name: str
    command: list[str]
    against: str | None = None


def cases(model: str, out: Path, cache: Path, optimum: str | None, genai: str | None) -> list[Case]:
    """What is compared: start-up first, then float32, then int4."""
    llmkit = [sys.executable, "-m", "llmkit", "export", model, "--to", "onnx", "--no-check", "-q", "-o", str(out)]
    imports = "import llmkit.cli.app, llmkit.onnx.export, llmkit.pipeline.runner, onnx"
    start, single, fours = [Case("imports of llmkit", [sys.executable, "-c", imports])], [], []
    single += [Case("llmkit, linked", llmkit), Case("llmkit, copied", [*llmkit, "--weights", "copy"])]
    fours += [Case("llmkit, int4", [*llmkit, "--bits", "4"])]
    if optimum:
        start.append(Case("imports of optimum", [optimum, "-c", "import optimum.exporters.onnx, transformers, torch"]))
        call = (
            f"from optimum.exporters.onnx import main_export; main_export({model!r}, {str(out)!r}, "
            "task='text-generation-with-past', local_files_only=True, do_validation=False)"
        )
        single.append(Case("optimum", [optimum, "-c", call], "llmkit, linked"))
    if genai:
        start.append(Case("imports of the builder", [genai, "-c", "from onnxruntime_genai.models import builder"]))
        builder = [genai, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", str(out), "-e", "cpu",
                   "-c", str(cache)]  # fmt: skip
        single.append(Case("genai builder", [*builder, "-p", "fp32"], "llmkit, linked"))
        fours.append(Case("genai builder, int4", [*builder, "-p", "int4"], "llmkit, int4"))
    return start + single + fours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--optimum", metavar="PYTHON")
    parser.add_argument("--genai", metavar="PYTHON")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    out, log = args.scratch / "out", args.scratch / "log"
    wanted = cases(str(args.model), out, args.scratch / "cache", args.optimum, args.genai)
    runs: dict[str, list[dict[str, float]]] = {case.name: [] for case in wanted}
    disk: dict[str, float] = {}
    for _ in range(args.repeat):
        for case in wanted:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            runs[case.name].append(timed(case.command, log))
            disk[case.name] = new_bytes(out) if out.exists() else 0.0
    best = {name: {key: min(r[key] for r in found) for key in found[0]} for name, found in runs.items()}
    print(f"{'':24} {'wall':>7} {'cpu':>7} {'peak':>8} {'anonymous':>10} {'disk':>9}   (walls)")
    for case in wanted:
        b = best[case.name]
        walls = ", ".join(f"{r['wall']:.1f}" for r in runs[case.name])
        print(f"{case.name:24} {b['wall']:6.2f}s {b['cpu']:6.2f}s {b['peak']:6.0f}MB {b['anon']:8.0f}MB "
              f"{disk[case.name]:7.2f}MB   {walls}")  # fmt: skip
        if case.against is not None:
            times = {key: b[key] / best[case.against][key] for key in b}
            print(f"{'  × ' + case.against:24} {times['wall']:6.1f}x {times['cpu']:6.1f}x {times['peak']:6.1f}x  "
                  f"{times['anon']:8.1f}x")  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
