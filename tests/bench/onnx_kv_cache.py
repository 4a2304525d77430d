"""A cache in int8 beside one in float32, in turns: bytes, steps at long contexts, prompts, perplexity.

    python tests/bench/onnx_kv_cache.py MODEL [--text FILE] [--tokens 4096] [--keep FOLDER] [--rounds 3]

MODEL is a checkpoint; it is exported twice to a temporary folder beside it (linked). Steps are timed on a cache whose
contents are zeros: what a step takes follows from the length alone. The attention of llama-7B is timed in a model of
one layer with its 32 heads of 128 and next to nothing else. The fastest quarter of the steps counts, of all rounds the
best.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTEXTS, N_STEPS, N_PREFILL = (1024, 4096), 24, 512


def decoders(source: Path, at: Path) -> dict[str, object]:
    """The runner of both exports of a checkpoint."""
    from llmkit.onnx.opening import load_onnx

    found = {}
    for name, options in (("float32", ["--attention", "gqa"]), ("int8", ["--kv-cache-dtype", "int8"])):
        folder = at / f"{source.name}-{name}"
        if not folder.exists():
            command = [sys.executable, "-m", "llmkit", "export", str(source), "--to", "onnx", "--no-check", "-q"]
            subprocess.run([*command, *options, "-o", str(folder)], check=True)
        found[name] = load_onnx(folder, threads=2)
    return found


def attention_of_7b(at: Path) -> Path:
    """A checkpoint of one layer: the heads of llama-7B on 64 hidden dims."""
    from safetensors.torch import save_file

    from llmkit.architecture.registry import default_registry
    from llmkit.decoder.contract import random_checkpoint

    folder = at / "attention-of-7b"
    if not folder.exists():
        registry = default_registry()
        llama = registry.load(next(p for p in registry.plugins if p.name == "llama"))
        mini = Path(__file__).resolve().parents[2] / "evalsets" / "mini" / "base"  # for its tokenizer
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 32}
        sizes |= {"num_key_value_heads": 32, "head_dim": 128, "vocab_size": 1536, "max_position_embeddings": 8192}
        config = llama.tiny_config() | sizes
        folder.mkdir()
        tensors = random_checkpoint(llama, config).tensors
        save_file({n: t.load().contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        for path in mini.glob("*token*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def step_time(decoder, past: int) -> float:
    """Seconds of one token after `past` others."""
    import torch

    cache = decoder.new_cache(past + N_STEPS + 1)
    cache.length = past
    times = []
    for _ in range(N_STEPS):
        started = time.perf_counter()
        decoder.hidden(torch.tensor([[7]]), cache)
        times.append(time.perf_counter() - started)
    return sum(sorted(times)[: N_STEPS // 4]) / (N_STEPS // 4)


def prompt_time(decoder) -> float:
    """Seconds of a prompt's layers."""
    import torch

    ids = torch.arange(N_PREFILL)[None] % 900 + 100
    started = time.perf_counter()
    decoder.hidden(ids, decoder.new_cache(N_PREFILL))
    return time.perf_counter() - started


def compare(label: str, both: dict, rounds: int) -> None:
    for past in CONTEXTS:
        found = {name: [] for name in both}
        for _ in range(rounds):
            for name, decoder in both.items():
                found[name].append(step_time(decoder, past))
        best = {name: min(times) for name, times in found.items()}
        print(f"{label}, a step after {past:5}: " + "  ".join(f"{n} {t * 1e3:.2f} ms" for n, t in best.items())
              + f"  ({best['float32'] / best['int8']:.2f} times as fast)", flush=True)  # fmt: skip
    found = {name: [] for name in both}
    for _ in range(rounds):
        for name, decoder in both.items():
            found[name].append(prompt_time(decoder))
    best = {name: min(times) for name, times in found.items()}
    print(f"{label}, a prompt of {N_PREFILL}:   " + "  ".join(f"{n} {t * 1e3:.0f} ms" for n, t in best.items())
          + f"  ({best['int8'] / best['float32']:.2f} times the time)", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", metavar="FOLDER", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.model.parent if args.keep is None else None) as scratch:
        at = args.keep or Path(scratch)
        at.mkdir(parents=True, exist_ok=True)
        both = decoders(args.model, at)
        for name, decoder in both.items():
            caches = [port for port in decoder.parts.inputs.values() if len(port.shape) == 4]
            size = sum(c.shape[1] * c.shape[3] * (1 if c.dtype == "int8" else 4) for c in caches)
            print(f"{args.model.name}, {name} cache: {size} bytes a token, {size * 4096 / 1e6:.0f} MB at 4096")
        compare(args.model.name, both, args.rounds)
        compare("attention of llama-7B", decoders(attention_of_7b(at), at), args.rounds)
        if args.text:
            from llmkit.checkpoint.checkpoint import open_checkpoint
            from llmkit.checkpoint.tokenizer import load_tokenizer
            from llmkit.evaluation.perplexity import measure_perplexity

            content = args.text.read_text(encoding="utf-8")[: 8 * args.tokens]
            ids = list(load_tokenizer(open_checkpoint(args.model))(content, verbose=False)["input_ids"])[: args.tokens]
            for name, decoder in both.items():
                found = measure_perplexity(decoder, ids, context=min(2048, decoder.context or 2048))
                print(f"perplexity of {len(ids)} tokens, {name} cache: {found.perplexity:.4f}", flush=True)


if __name__ == "__main__":
    main()
