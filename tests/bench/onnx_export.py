"""One checkpoint to a float32 ONNX folder, by llmkit, Optimum and the ONNX Runtime GenAI builder, in one run.

    python tests/bench/onnx_export.py MODEL SCRATCH [--optimum PYTHON] [--genai PYTHON] [--repeat 3]

Each is one command in a process of its own, `--no-check` for llmkit and without validation for Optimum. Wall and CPU
time are the whole command's, imports included; the same command asked for its help tells what of that is start-up.
Peak is the largest VmHWM of the process, anonymous memory the largest RssAnon, sampled every 20 ms. Disk is what `du`
counts in the new folder alone: what is linked to the source is not counted.
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
from pathlib import Path


def timed(command: list[str], log: Path) -> dict[str, float]:
    """Wall and CPU seconds, and memory in MB; raises for a command that fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    peak = {"VmHWM": 0, "RssAnon": 0}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1"})

        def watch() -> None:
            while process.poll() is None:
                try:
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                except OSError:
                    break
                for line in lines:
                    key = line.partition(":")[0]
                    if key in peak:
                        peak[key] = max(peak[key], int(line.split()[1]))
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
    return {"wall": wall, "cpu": cpu, "peak": peak["VmHWM"] / 1e3, "anon": peak["RssAnon"] / 1e3}


def new_bytes(folder: Path) -> float:
    """MB of the files that have no other name, i.e. are not shared with the source."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.stat().st_nlink == 1) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--optimum", metavar="PYTHON")
    parser.add_argument("--genai", metavar="PYTHON")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    out, log = args.scratch / "out", args.scratch / "log"
    here, model = sys.executable, str(args.model)
    llmkit = [here, "-m", "llmkit", "export", model, "--to", "onnx", "--no-check", "-q"]
    commands = {
        "start-up of llmkit": [here, "-c", "import llmkit.cli.app, llmkit.onnx.export, onnx"],
        "llmkit, linked": [*llmkit, "-o", str(out)],
        "llmkit, copied": [*llmkit, "--weights", "copy", "-o", str(out)],
    }
    if args.optimum:
        commands["start-up of optimum"] = [args.optimum, "-c", "import optimum.exporters.onnx, transformers, torch"]
        call = (
            f"from optimum.exporters.onnx import main_export; main_export({model!r}, {str(out)!r}, "
            "task='text-generation-with-past', local_files_only=True, do_validation=False)"
        )
        commands["optimum"] = [args.optimum, "-c", call]
    if args.genai:
        builder = [args.genai, "-m", "onnxruntime_genai.models.builder"]
        commands["start-up of the builder"] = [args.genai, "-c", "from onnxruntime_genai.models import builder"]
        commands["genai builder"] = [*builder, "-i", model, "-o", str(out), "-p", "fp32", "-e", "cpu",
                                     "-c", str(args.scratch / "cache")]  # fmt: skip
    print(f"{'':24} {'wall':>7} {'cpu':>7} {'peak':>8} {'anonymous':>10} {'disk':>9}   (walls)")
    for name, command in commands.items():
        runs = []
        for _ in range(args.repeat):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            runs.append(timed(command, log))
        best = {key: min(r[key] for r in runs) for key in runs[0]}
        disk = f"{new_bytes(out):7.2f}MB" if out.exists() else ""
        walls = ", ".join(f"{r['wall']:.1f}" for r in runs)
        print(f"{name:24} {best['wall']:6.1f}s {best['cpu']:6.1f}s {best['peak']:6.0f}MB {best['anon']:8.0f}MB "
              f"{disk:>9}   {walls}", flush=True)  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
