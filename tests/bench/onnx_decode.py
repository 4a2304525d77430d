"""Prefill and decode of one model in several runtimes, side by side: tokens a second, each in a process of its own.

    python tests/bench/onnx_decode.py MODEL [--genai PYTHON] [--optimum PYTHON] [--llama PYTHON] [--rounds 3]

MODEL is a checkpoint in float32; it is exported to a temporary folder beside it (linked) and, for llama.cpp, converted
to GGUF. The pythons are those of environments that have the packages. All runtimes get the same token ids and as many
threads; each round runs all of them in turn, so that what else the machine does hits all alike. Prefill takes 512
tokens at once, the best of three counts; decode is greedy after them, the fastest quarter of the steps counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

N_PREFILL, N_DECODE, N_WARM = 512, 64, 3


def llmkit_onnx(folder: str, threads: int):
    from llmkit.onnx.opening import load_onnx

    return _decoder(load_onnx(Path(folder), threads=threads), threads)


def llmkit_torch(folder: str, threads: int):
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.decoder import load_decoder

    return _decoder(load_decoder(open_checkpoint(folder)), threads)


def _decoder(decoder, threads: int):
    import torch

    torch.set_num_threads(threads)
    cache = None

    def run(ids: list[int], is_first: bool) -> int:
        nonlocal cache
        if is_first:
            cache = decoder.new_cache(len(ids) + N_DECODE)
        hidden = decoder.hidden(torch.tensor([ids]), cache)
        return int(decoder.logits(hidden[:, -1]).argmax())

    return run


def transformers(folder: str, threads: int):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return _hf(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def optimum(folder: str, threads: int):
    import onnxruntime
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return _hf(ORTModelForCausalLM.from_pretrained(folder, session_options=options))


def _hf(model):
    """By its forward: `generate` has work of its own."""
    import torch

    past, seen = None, 0

    def run(ids: list[int], is_first: bool) -> int:
        nonlocal past, seen
        if is_first:
            past, seen = None, 0
        seen += len(ids)
        with torch.inference_mode():
            found = model(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, seen, dtype=torch.int64),
                position_ids=torch.arange(seen - len(ids), seen)[None], past_key_values=past, use_cache=True,
                **({"logits_to_keep": 1} if "ORT" not in type(model).__name__ else {}),
            )  # fmt: skip
        past = found.past_key_values
        return int(found.logits[0, -1].argmax())

    return run


def genai(folder: str, threads: int):
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    generator = None

    def run(ids: list[int], is_first: bool) -> int:
        nonlocal generator
        if is_first:
            options = og.GeneratorParams(model)
            options.set_search_options(max_length=len(ids) + N_DECODE + 1, min_length=len(ids) + N_DECODE)
            generator = og.Generator(model, options)
            generator.append_tokens(ids)
        generator.generate_next_token()  # after the first call: the token that this runtime chose itself
        return int(generator.get_next_tokens()[0])

    return run


def llama_cpp(path: str, threads: int):
    import numpy as np
    from llama_cpp import Llama

    llm = Llama(path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(ids: list[int], is_first: bool) -> int:
        if is_first:
            llm.reset()
        llm.eval(ids)
        logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),))
        return int(logits.argmax())

    return run


RUNTIMES: dict[str, Callable] = {
    "llmkit, ONNX Runtime": llmkit_onnx,
    "llmkit, torch": llmkit_torch,
    "transformers, torch": transformers,
    "onnxruntime-genai": genai,
    "optimum": optimum,
    "llama.cpp": llama_cpp,
}


def child(name: str, source: str, threads: int) -> None:
    """Time one runtime and print what was found as JSON."""
    started = time.perf_counter()
    run = RUNTIMES[name](source, threads)
    load = time.perf_counter() - started
    ids = [(i * 7919 + 13) % 40000 + 100 for i in range(N_PREFILL)]
    run(ids[:32], True)
    token = 100
    for _ in range(N_WARM):
        token = run([token], False)
    prefills, steps, text = [], [], []
    for _ in range(3):
        started = time.perf_counter()
        text = [run(ids, True)]
        prefills.append(time.perf_counter() - started)
    for _ in range(N_DECODE):
        started = time.perf_counter()
        text.append(run([text[-1]], False))
        steps.append(time.perf_counter() - started)
    prefill, decode = min(prefills), sum(sorted(steps)[: N_DECODE // 4]) / (N_DECODE // 4)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"load_s": load, "prefill": N_PREFILL / prefill, "decode": 1 / decode, "text": text,
                      "peak": peak}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--child", choices=RUNTIMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=RUNTIMES)
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="where exported models are kept and looked for")
    for name in ("genai", "optimum", "llama"):
        parser.add_argument(f"--{name}", metavar="PYTHON")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.model, args.threads)
        return
    with tempfile.TemporaryDirectory(dir=Path(args.model).parent if args.keep is None else None) as scratch:
        at = args.keep or Path(scratch)
        folder, gguf = at / "onnx", at / "gguf"
        here = sys.executable
        if not folder.exists():
            _llmkit("export", args.model, "--to", "onnx", "--no-check", "-o", folder)
        if args.llama and not gguf.exists():
            _llmkit("convert", args.model, "--to", "gguf", "--type", "f32", "-o", gguf)
        chosen = {"llmkit, ONNX Runtime": (here, folder), "llmkit, torch": (here, args.model),
                  "transformers, torch": (here, args.model)}  # fmt: skip
        if args.genai:
            chosen["onnxruntime-genai"] = (args.genai, folder)
        if args.optimum:
            chosen["optimum"] = (args.optimum, folder)
        if args.llama:
            chosen["llama.cpp"] = (args.llama, next(gguf.glob("*.gguf")))
        chosen = {name: chosen[name] for name in args.only or chosen}
        found: dict[str, list[dict]] = {name: [] for name in chosen}
        for _ in range(args.rounds):
            for name, (python, source) in chosen.items():
                command = [python, __file__, str(source), "--child", name, "--threads", str(args.threads)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{name}: {done.stderr.strip().splitlines()[-1]}")
                    continue
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    first = next(runs[0]["text"] for runs in found.values() if runs)
    print(f"{'runtime':22} {'prefill/s':>10} {'decode/s':>9} {'load':>7} {'peak':>8}  same text   (rounds)")
    for name, runs in found.items():
        if runs:
            best = {k: max(r[k] for r in runs) for k in ("prefill", "decode")}
            low = {k: min(r[k] for r in runs) for k in ("load_s", "peak")}
            same = sum(r["text"] == first for r in runs)
            each = ", ".join(f"{r['prefill']:.0f}/{r['decode']:.1f}" for r in runs)
            print(f"{name:22} {best['prefill']:10.0f} {best['decode']:9.1f} {low['load_s']:6.1f}s "
                  f"{low['peak'] / 1e6:6.0f}MB  {same}/{len(runs)}   {each}")  # fmt: skip


def _llmkit(*args: object) -> None:
    subprocess.run([sys.executable, "-m", "llmkit", *map(str, args), "-q"], check=True)


if __name__ == "__main__":
    main()
