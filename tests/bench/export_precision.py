"""What int4 and int8 exports cost and lose: time and memory beside `llmkit quantize`, sizes, perplexity, load memory.

    python tests/bench/export_precision.py MODEL TEXT [--windows 4] [--context 512] [--runs 3]
                                        [--only exports|perplexity|kernels]

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
        floats = ["--embedding-bits", "16"]
        cases[f"export --bits {bits}, embedding in floats"] = [*cases[f"export --bits {bits}"], *floats]
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
        print(f"{name:44} {seconds:6.2f} s  {peak / MIB:6.0f} MiB  {sizes[name] / 1e6:7.1f} MB written", flush=True)


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
    from llmkit.onnx.opening import load_onnx
    from llmkit.onnx.precision import Precision
    from llmkit.pipeline.plan import make_plan
    from llmkit.pipeline.runner import run_plan

    ckpt = open_checkpoint(model)
    content = Path(text).read_text()[: 40 * n_windows * context]
    ids = list(load_tokenizer(ckpt)(content, verbose=False)["input_ids"])[: n_windows * context]
    with torch.inference_mode():
        plain = measure_perplexity(load_decoder(ckpt), ids, context=context).perplexity
    print(f"torch float32 {plain:.4f}")
    cases = [(4, 32, True, 16), (4, 32, False, 16), (4, 64, False, 16), (4, 128, False, 16), (4, 64, False, 8)]
    cases += [(4, 64, False, 4), (8, 64, True, 16), (8, 64, True, 8)]
    for bits, group, symmetric, ends in cases:
        found = {}
        for level in (0, 4):
            rounding = Precision(bits, group, symmetric, embedding_bits=ends, accuracy_level=level)
            folder = work / f"p{bits}_{group}_{symmetric}_{ends}_{level}"
            run_plan(make_plan(export(ckpt, precision=rounding), folder), overwrite=True)
            found[level] = measure_perplexity(load_onnx(folder), ids, context=context).perplexity
        decoder = load_decoder(computed_weights(ckpt, precision=rounding))
        wanted = measure_perplexity(decoder, ids, context=context).perplexity
        seconds, rss = memory_of_load(folder)
        what = f"int{bits} group {group} {'symmetric' if symmetric else 'asymmetric'}, embedding {ends}"
        print(
            f"{what:44} torch {wanted:.4f}  level 0 {found[0]:.4f}  level 4 {found[4]:.4f}  "
            f"load {seconds:.2f} s, {rss:.0f} MiB",
            flush=True,
        )


def kernels(k: int, n: int) -> None:
    """The time of one product by bits, block and accuracy level, beside float32."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    inputs = {m: rng.standard_normal((m, k), dtype=np.float32) for m in (1, 512)}
    cases: list[tuple[int, int, str, int]] = [(32, 0, "", 0)]
    cases += [(bits, block, zeros, 4) for bits in (4, 8) for block in (16, 32, 64, 128, 256) for zeros in ("", "uint8")]
    cases += [(4, 32, "", 1), (8, 32, "", 1), (4, 32, "float", 4), (4, 32, "offsets", 4), (8, 32, "offsets", 4)]
    print(f"x [M, {k}] with a matrix [{n}, {k}]                    M=1        M=512")
    for bits, block, zeros, level in cases:
        held: dict[str, np.ndarray] = {}
        nodes = []
        if bits == 32:
            held["B"] = rng.standard_normal((n, k), dtype=np.float32)
            nodes.append(helper.make_node("FusedMatMul", ["A", "B"], ["Y"], domain="com.microsoft", transB=1))
        else:
            blocks = k // block
            held["B"] = rng.integers(0, 256, (n, blocks, block * bits // 8), dtype=np.uint8)
            held["S"] = rng.random((n, blocks), dtype=np.float32)
            if zeros == "uint8":
                held["Z"] = rng.integers(0, 256, (n, -(-blocks * bits // 8)), dtype=np.uint8)
            elif zeros == "float":
                held["Z"] = rng.random((n, blocks), dtype=np.float32)
            y = "P" if zeros == "offsets" else "Y"
            nodes.append(helper.make_node("MatMulNBits", ["A", *held], [y], domain="com.microsoft", K=k, N=n, bits=bits,
                                          block_size=block, accuracy_level=level))  # fmt: skip
            if zeros == "offsets":
                held |= {"O": rng.random((n, blocks), dtype=np.float32), "shape": np.array([0, blocks, block]),
                         "axes": np.array([-1])}  # fmt: skip
                nodes.append(helper.make_node("Reshape", ["A", "shape"], ["R"]))
                nodes.append(helper.make_node("ReduceSum", ["R", "axes"], ["T"], keepdims=0))
                nodes.append(helper.make_node("FusedMatMul", ["T", "O"], ["Q"], domain="com.microsoft", transB=1))
                nodes.append(helper.make_node("Add", ["P", "Q"], ["Y"]))
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["m", k])],
            [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in held.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        data = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        best = {m: _fastest(data, a, 50 if m == 1 else 5) for m, a in inputs.items()}
        what = "float32" if bits == 32 else f"int{bits} block {block} {zeros or 'symmetric'}, level {level}"
        print(f"{what:36} {best[1] * 1e6:9.0f} us {best[512] * 1e3:9.2f} ms", flush=True)


def _fastest(data: bytes, a, runs: int) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 3
    session = onnxruntime.InferenceSession(data, options)
    found = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        session.run(None, {"A": a})
        found.append(time.perf_counter() - started)
    return min(found[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=["exports", "perplexity", "kernels"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as place:
        if options.only in (None, "exports"):
            exports(options.model, Path(place), options.runs)
        if options.only in (None, "perplexity"):
            perplexities(options.model, options.text, Path(place), options.context, options.windows)
    if options.only in (None, "kernels"):
        kernels(2048, 4096)
        kernels(4096, 11008)
    print(f"peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
