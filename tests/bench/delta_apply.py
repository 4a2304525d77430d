"""How fast `llmkit delta apply` is, beside `cp` of the same bytes and FastChat's apply_delta, in one run.

    python tests/bench/delta_apply.py SCRATCH [--fastchat SITE] [--dtype float16|bfloat16] [--repeat N] [--keep]

SCRATCH needs 12 GB. SITE is a folder that holds the package `fastchat` (`pip download --no-deps fschat==0.2.36`,
unpacked); its own algorithm is run, with the saving of the tokenizer left out, which only makes it faster. The pair has
the shape of a 1.1B model (hidden 2048, 22 layers, 32 heads, 4 key/value heads, vocabulary 32,000), in three files.
Files are warm. Anonymous memory is the peak of RssAnon in /proc/PID/status, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HIDDEN, LAYERS, FFN, KV, VOCAB = 2048, 22, 5632, 256, 32000
FASTCHAT = """
import runpy, sys, transformers
class NoTokenizer:
    @staticmethod
    def from_pretrained(*args, **kwargs): return NoTokenizer()
    def save_pretrained(self, *args, **kwargs): pass
transformers.AutoTokenizer = NoTokenizer
script, base, delta, out = sys.argv[1:]
sys.argv = [script, "--base-model-path", base, "--delta-path", delta, "--target-model-path", out]
runpy.run_path(script, run_name="__main__")
"""


def shapes(hidden: int = HIDDEN, layers: int = LAYERS, ffn: int = FFN, kv: int = KV) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        found |= {f"{p}self_attn.{n}_proj.weight": (hidden, hidden) for n in "qo"}
        found |= {f"{p}self_attn.{n}_proj.weight": (kv, hidden) for n in "kv"}
        found |= {f"{p}mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
        found[f"{p}mlp.down_proj.weight"] = (hidden, ffn)
        found |= {f"{p}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCAB, hidden)}


def config_of(dtype_name: str, **sizes: int) -> dict[str, object]:
    """The config.json of the pair; `sizes` of another model in place of its own."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": VOCAB,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": dtype_name,
    } | sizes  # fmt: skip


def make_model(folder: Path, seed: int, scale: float, dtype_name: str) -> None:
    """Random weights in three files; norms of a delta (scale below one) lie around zero."""
    import torch
    from safetensors.torch import save_file

    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, dtype_name)
    g = torch.Generator().manual_seed(seed)
    names, weight_map = list(shapes().items()), {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        state = {}
        for name, shape in names[i * len(names) // 3 : (i + 1) * len(names) // 3]:
            x = torch.randn(shape, generator=g).mul_(0.02 * scale)
            state[name] = (x + (1 if "norm" in name and scale == 1 else 0)).to(dtype)
        save_file(state, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_of(dtype_name)))


class Run(NamedTuple):
    """Wall and processor seconds, peak anonymous MiB."""

    wall: float
    cpu: float
    mib: float = 0.0


def timed(command: list[str]) -> Run:
    """Run a command and measure it."""
    before = os.times()
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak, status = 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            line = next(x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
            peak = max(peak, int(line.split()[1]))
        except (OSError, StopIteration):
            pass
        time.sleep(0.02)
    elapsed, after = time.monotonic() - started, os.times()
    if process.returncode:
        sys.exit(f"{' '.join(command[:4])} … failed:\n{process.stderr.read().decode()[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(elapsed, cpu, peak / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--fastchat", type=Path, metavar="SITE")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep the pair for another run")
    args = parser.parse_args()
    home = args.scratch / args.dtype
    base, delta = home / "base", home / "delta"
    make_model(base, 0, 1.0, args.dtype)
    make_model(delta, 1, 0.05, args.dtype)
    os.sync()
    llmkit = [sys.executable, "-m", "llmkit"]
    runs: dict[str, list[Run]] = {"import torch": [], "cp": [], "cp + sync": [], "llmkit": []}
    for _ in range(args.repeat):
        for out in ("cp", "llmkit"):
            shutil.rmtree(home / out, ignore_errors=True)
        os.sync()
        runs["import torch"].append(timed([sys.executable, "-c", "import torch"]))
        started = time.monotonic()
        runs["cp"].append(timed(["cp", "-r", str(base), str(home / "cp")]))
        os.sync()
        runs["cp + sync"].append(Run(time.monotonic() - started, 0.0))
        shutil.rmtree(home / "cp")
        command = [*llmkit, "delta", "apply", str(base), str(delta), "-o", str(home / "llmkit"), "-q"]
        runs["llmkit"].append(timed(command))
        if args.fastchat:
            script = args.fastchat / "fastchat" / "model" / "apply_delta.py"
            command = [sys.executable, "-c", FASTCHAT, str(script), str(base), str(delta), str(home / "fastchat")]
            shutil.rmtree(home / "fastchat", ignore_errors=True)
            os.sync()
            runs.setdefault("FastChat", []).append(timed(command))
    report(runs)
    if args.fastchat:
        compare(home / "llmkit", home / "fastchat")
    if not args.keep:
        shutil.rmtree(home)


def compare(mine: Path, theirs: Path) -> None:
    """Say whether both wrote the same bits."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for path in sorted(mine.glob("*.safetensors")):
        found |= load_file(path)
    n = n_same = 0
    for path in sorted(theirs.glob("*.safetensors")):
        for name, want in load_file(path).items():
            if want.dtype != found[name].dtype:  # the script loads everything as float16
                print(f"FastChat wrote {want.dtype}, llmkit {found[name].dtype}: not compared")
                return
            n += 1
            n_same += torch.equal(found[name].view(torch.int16), want.view(torch.int16))
    print(f"{n_same} of {n} tensors have FastChat's bits ({len(found)} written)")


def report(runs: dict[str, list[Run]]) -> None:
    """Best of the runs, all of them, and the targets."""
    best = {name: min(run.wall for run in found) for name, found in runs.items()}
    for name, found in runs.items():
        every = ", ".join(f"{run.wall:.2f} ({run.cpu:.2f} cpu)" for run in found)
        peak = max(run.mib for run in found)
        print(f"{name:>14}  {best[name]:6.2f} s  {peak:5.0f} MiB anonymous   [{every}]")
    for name in ("cp", "cp + sync"):
        limit = 2 * best[name] + best["import torch"]
        print(f"llmkit / (2 x {name} + import torch) = {best['llmkit'] / limit:.2f}   (target: at most 1)")
    if "FastChat" in runs:
        print(f"FastChat / llmkit = {best['FastChat'] / best['llmkit']:.1f}   (target: at least 5)")
    print(f"anonymous peak {max(run.mib for run in runs['llmkit']):.0f} MiB   (target: under 600)")


if __name__ == "__main__":
    main()
