"""What int4 and int8 exports cost and lose: time and memory beside `llmkit quantize`, sizes, perplexity, load memory.

    python tests/bench/export_precision.py MODEL TEXT [--windows 4] [--context 512] [--runs 3]

Every command runs in a process of its own, commands alternating, and the least of the runs counts. The perplexity of
a folder stands beside that of the torch decoder with the floats that the folder's integers stand for.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LLMKIT = [sys.executable, "-m", "llmkit"]
MIB = 2**20


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a child."""
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed: {child.stderr.read().decode()[-500:] if child.stderr else ''}")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def written(folder: Path) -> int:
    """Bytes of a folder that are not shared with the source."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.stat().st_nlink == 1)


def exports(model: str, work: Path, runs: int) -> None:
    """Time and memory of exporting against quantizing."""
    cases = {}
    for bits in ("4", "8"):
        group = ["--group-size", "64"]
        cases[f"quantize --bits {bits}"] = ["quantize", model, "--bits", bits, *group]
        cases[f"export --bits {bits}"] = ["export", model, "--to", "onnx", "--no-check", "--bits", bits, *group]
        whole = ["--quantize-embedding"]
        cases[f"export --bits {bits} with the embedding"] = [*cases[f"export --bits {bits}"], *whole]
    cases["export (linked float32)"] = ["export", model, "--to", "onnx", "--no-check"]
    best: dict[str, tuple[float, int]] = {}
    sizes = {}
    for _ in range(runs):
        for name, arguments in cases.items():
            out = work / name.replace(" ", "_")
            shutil.rmtree(out, ignore_errors=True)
            seconds, peak = measured([*LLMKIT, *arguments, "-o", str(out)])
            sizes[name] = written(out)
            before = best.get(name, (float("inf"), 0))
            best[name] = (min(before[0], seconds), max(before[1], peak))
    for name, (seconds, peak) in best.items():
        print(f"{name:40} {seconds:6.2f} s  {peak / MIB:6.0f} MiB  {sizes[name] / 1e6:7.1f} MB written", flush=True)


def memory_of_load(folder: Path) -> tuple[float, float]:
    """Seconds, and MiB of memory of its own (files that are mapped not counted), that opening a session takes."""
    code = (
        "import sys,time,json,onnxruntime as o;"
        "r=lambda:[int(x.split()[1])/1024 for x in open('/proc/self/status') if x.startswith(('RssAnon','RssFile'))];"
        "a=r();t=time.monotonic();q=o.SessionOptions();q.log_severity_level=3;"
        "s=o.InferenceSession(sys.argv[1],q,providers=['CPUExecutionProvider']);"
        "b=r();print(json.dumps([time.monotonic()-t,b[0]-a[0]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder / "model.onnx")], capture_output=True, check=True)
    seconds, anonymous = json.loads(done.stdout)
    return seconds, anonymous


def perplexities(model: str, text: str, work: Path, context: int, n_windows: int) -> None:
    """Of folders, and of the torch decoder with the same integers."""
    import torch

    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.checkpoint.tokenizer import load_tokenizer
    from llmkit.decoder import load_decoder
    from llmkit.evaluation.perplexity import measure_perplexity
    from llmkit.onnx.export import computed_weights, export
    from llmkit.onnx.precision import Rounding
    from llmkit.onnx.session import load_onnx
    from llmkit.pipeline.plan import make_plan
    from llmkit.pipeline.runner import run_plan

    ckpt = open_checkpoint(model)
    content = Path(text).read_text()[: 40 * n_windows * context]
    ids = list(load_tokenizer(ckpt)(content, verbose=False)["input_ids"])[: n_windows * context]
    with torch.inference_mode():
        plain = measure_perplexity(load_decoder(ckpt), ids, context=context).perplexity
    print(f"torch float32 {plain:.4f}")
    for bits, group, embedding in ((4, 32, False), (4, 64, False), (4, 64, True), (8, 64, False), (8, 64, True)):
        found = {}
        for level in (0, 4):
            rounding = Rounding(bits, group, embedding=embedding, accuracy_level=level)
            folder = work / f"p{bits}_{group}_{embedding}_{level}"
            run_plan(make_plan(export(ckpt, rounding=rounding), folder), overwrite=True)
            found[level] = measure_perplexity(load_onnx(folder), ids, context=context).perplexity
        decoder = load_decoder(computed_weights(ckpt, rounding=rounding))
        wanted = measure_perplexity(decoder, ids, context=context).perplexity
        seconds, rss = memory_of_load(folder)
        what = f"int{bits} group {group}{' with the embedding' if embedding else ''}"
        print(
            f"{what:36} torch {wanted:.4f}  level 0 {found[0]:.4f}  level 4 {found[4]:.4f}  "
            f"load {seconds:.2f} s, {rss:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=["exports", "perplexity"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as place:
        if options.only != "perplexity":
            exports(options.model, Path(place), options.runs)
        if options.only != "exports":
            perplexities(options.model, options.text, Path(place), options.context, options.windows)
    print(f"peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
