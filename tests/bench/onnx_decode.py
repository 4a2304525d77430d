"""Prefill and decode in several runtimes at one precision after the other: tokens a second, each in its own process.

    python tests/bench/onnx_decode.py MODEL SCRATCH [--precision float32 int8 int4] [--rounds 3]
        [--genai PYTHON] [--builder PYTHON] [--optimum PYTHON] [--llama PYTHON]
    python tests/bench/onnx_decode.py 0.5b SCRATCH ...

MODEL is a checkpoint in float32, or `0.5b`: random weights of the shape of Qwen2.5-0.5B. What is exported, converted
(llama.cpp: F32, Q8_0, Q4_0) and built (the GenAI builder: fp32, int4) goes to SCRATCH and is taken from there the next
time. The pythons are those of environments that have the packages. All runtimes get the same token ids and as many
threads; each round runs all of them in turn, so that what else the machine does hits all alike. Prefill takes 512
tokens at once, the best of three counts; decode is greedy after them, the fastest quarter of the steps counts. The
median over the rounds is what peers are compared by: it stands in the last column as a ratio to llmkit's runner.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
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
        return int(decoder.next_logits(torch.tensor([ids]), cache).argmax())

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


def make_shape(folder: Path) -> None:
    """Random weights of the shape of Qwen2.5-0.5B, with an alphabet for a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=True,
                         bos_token_id=0, eos_token_id=0)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


@dataclass(frozen=True)
class Precision:
    """How each tool is asked for one precision."""

    export: tuple[str, ...]
    gguf: str
    builder: str | None = None


PRECISIONS = {
    "float32": Precision((), "f32", "fp32"),
    "int8": Precision(("--bits", "8"), "q8_0"),
    "int4": Precision(("--bits", "4", "--embedding-bits", "4"), "q4_0", "int4"),
}


def prepared(model: str, at: Path, precision: str, pythons: dict[str, str | None]) -> dict[str, tuple[str, Path | str]]:
    """The rows of one precision: title -> (runtime, what it loads), made where they are not there yet."""
    wanted = PRECISIONS[precision]
    ours, gguf, theirs, traced = (at / f"{name}_{precision}" for name in ("llmkit", "gguf", "builder", "optimum"))
    if not ours.exists():
        _run(sys.executable, "-m", "llmkit", "export", model, "--to", "onnx", *wanted.export, "--no-check", "-q",
             "-o", ours)  # fmt: skip
    rows: dict[str, tuple[str, Path | str]] = {"llmkit": ("llmkit, ONNX Runtime", ours)}
    if pythons["genai"]:
        rows["llmkit's folder in GenAI"] = ("onnxruntime-genai", ours)
    if pythons["optimum"]:
        rows["llmkit's folder in Optimum"] = ("optimum", ours)
    if pythons["builder"] and pythons["genai"] and wanted.builder:
        if not theirs.exists():
            _run(pythons["builder"], "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", theirs,
                 "-p", wanted.builder, "-e", "cpu", "-c", at / "cache")  # fmt: skip
        rows["builder's folder in GenAI"] = ("onnxruntime-genai", theirs)
    if pythons["optimum"] and precision == "float32":
        if not traced.exists():
            call = (
                f"from optimum.exporters.onnx import main_export; main_export({model!r}, {str(traced)!r}, "
                "task='text-generation-with-past', local_files_only=True, do_validation=False)"
            )
            _run(pythons["optimum"], "-c", call)
        rows["Optimum's folder"] = ("optimum", traced)
    if pythons["llama"]:
        if not gguf.exists():
            _run(sys.executable, "-m", "llmkit", "convert", model, "--to", "gguf", "--type", wanted.gguf, "-q",
                 "-o", gguf)  # fmt: skip
        rows[f"llama.cpp {wanted.gguf.upper()}"] = ("llama.cpp", next(gguf.glob("*.gguf")))
    if precision == "float32":
        rows |= {"transformers, torch eager": ("transformers, torch", model), "llmkit, torch": ("llmkit, torch", model)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path, nargs="?")
    parser.add_argument("--child", choices=RUNTIMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    for name in ("genai", "builder", "optimum", "llama"):
        parser.add_argument(f"--{name}", metavar="PYTHON")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.model, args.threads)
        return
    model, at = args.model, args.scratch
    at.mkdir(parents=True, exist_ok=True)
    if model == "0.5b":
        model = str(at / "model")
        if not Path(model).exists():
            make_shape(Path(model))
    pythons = {"onnxruntime-genai": args.genai, "optimum": args.optimum, "llama.cpp": args.llama}
    for precision in args.precision:
        rows = prepared(model, at, precision, vars(args))
        found: dict[str, list[dict]] = {title: [] for title in rows}
        for _ in range(args.rounds):
            for title, (runtime, source) in rows.items():
                python = pythons.get(runtime) or sys.executable
                command = [python, __file__, str(source), "--child", runtime, "--threads", str(args.threads)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{title}: {done.stderr.strip().splitlines()[-1]}")
                    continue
                found[title].append(json.loads(done.stdout.splitlines()[-1]))
        show(precision, found)


def show(precision: str, found: dict[str, list[dict]]) -> None:
    """A table; what a peer reaches is also given in parts of what llmkit's runner does."""
    own = found["llmkit"]
    print(
        f"{precision:28} {'prefill/s':>10} {'decode/s':>9} {'load':>6} {'peak':>8}  {'same text':9} of llmkit's, rounds"
    )
    for title, runs in found.items():
        if not runs:
            continue
        middle = {k: statistics.median(r[k] for r in runs) for k in ("prefill", "decode")}
        ratio = {k: middle[k] / statistics.median(r[k] for r in own) for k in middle}
        low = {k: min(r[k] for r in runs) for k in ("load_s", "peak")}
        same = sum(r["text"] == own[0]["text"] for r in runs)
        each = ", ".join(f"{r['prefill']:.0f}/{r['decode']:.1f}" for r in runs)
        print(f"{title:28} {middle['prefill']:10.0f} {middle['decode']:9.1f} {low['load_s']:5.1f}s "
              f"{low['peak'] / 1e6:6.0f}MB  {same}/{len(runs):<7} {ratio['prefill']:.2f}/{ratio['decode']:.2f}   "
              f"{each}", flush=True)  # fmt: skip


def _run(*command: object) -> None:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:4]))} failed: {done.stderr.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
