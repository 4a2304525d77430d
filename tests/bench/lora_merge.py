"""How fast `llmkit lora merge` is, beside `cp` of the base, PEFT's merge_and_unload + save, and mergekit, in one run.

    python tests/bench/lora_merge.py SCRATCH [--mergekit PYTHON] [--dtype float16|bfloat16] [--repeat N] [--keep]

SCRATCH needs 9 GB. PYTHON is an interpreter that has mergekit. The base has the shape of a 1.1B model (hidden 2048, 22
layers, 32 heads, 4 key/value heads, vocabulary 32,000) in three files, the adapter rank 16 on q, k, v and o in float32.
Files are warm. Anonymous memory is the peak of RssAnon in /proc/PID/status, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from delta_apply import HIDDEN, KV, LAYERS, Run, make_model, timed

RANK = 16
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
MERGEKIT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
base, adapter, out, dtype = sys.argv[1:]
text = f"merge_method: passthrough\\ndtype: {dtype}\\nslices:\\n- sources:\\n  - model: {base}+{adapter}\\n"
text += "    layer_range: [0, LAYERS]\\n".replace("LAYERS", "22")
config = MergeConfiguration.model_validate(yaml.safe_load(text))
options = MergeOptions(lora_merge_cache=out + ".cache", copy_tokenizer=False, lazy_unpickle=True, low_cpu_memory=True)
run_merge(config, out, options=options)
"""


def make_adapter(folder: Path, base: Path) -> None:
    """A random adapter as PEFT saves one."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(2)
    state = {}
    for i in range(LAYERS):
        for name, rows in (("q", HIDDEN), ("k", KV), ("v", KV), ("o", HIDDEN)):
            stem = f"base_model.model.model.layers.{i}.self_attn.{name}_proj"
            state[f"{stem}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=g).mul_(0.02)
            state[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=g).mul_(0.02)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK,
        "lora_alpha": 2 * RANK, "target_modules": [f"{n}_proj" for n in "qkvo"], "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "lora_dropout": 0.0, "modules_to_save": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep base and adapter for another run")
    args = parser.parse_args()
    home = args.scratch / args.dtype
    base, adapter = home / "base", home / "adapter"
    make_model(base, 0, 1.0, args.dtype)
    make_adapter(adapter, base)
    os.sync()
    llmkit = [sys.executable, "-m", "llmkit", "lora", "merge"]
    others = {"peft": [sys.executable, "-c", PEFT]}
    if args.mergekit:
        others["mergekit"] = [str(args.mergekit), "-c", MERGEKIT]
    runs: dict[str, list[Run]] = {"cp": [], "llmkit": [], **{name: [] for name in others}}
    loads = [os.getloadavg()[0]]
    for _ in range(args.repeat):
        for name in runs:
            shutil.rmtree(home / name, ignore_errors=True)
        os.sync()
        runs["cp"].append(timed(["cp", "-r", str(base), str(home / "cp")]))
        shutil.rmtree(home / "cp")
        os.sync()
        runs["llmkit"].append(timed([*llmkit, str(base), str(adapter), "-o", str(home / "llmkit"), "-q"]))
        for name, command in others.items():
            os.sync()
            runs[name].append(timed([*command, str(base), str(adapter), str(home / name), args.dtype]))
        loads.append(os.getloadavg()[0])
        time.sleep(1)
    report(runs, loads)
    for name in others:
        compare(home / "llmkit", home / name, name)
    if not args.keep:
        shutil.rmtree(home)


def report(runs: dict[str, list[Run]], loads: list[float]) -> None:
    """The best run of each, and how many times faster llmkit is."""
    mine = min(r.wall for r in runs["llmkit"])
    print(
        f"load average {loads[0]:.1f} before, {loads[-1]:.1f} after, {os.cpu_count()} cores; best of {len(runs['cp'])}"
    )
    for name, found in runs.items():
        best = min(found)
        peak = max(r.mib for r in found)
        times = f"{best.wall / mine:6.1f} x" if name not in ("llmkit", "cp") else " " * 8
        print(f"{name:<10} {best.wall:7.2f} s wall  {best.cpu:7.2f} s cpu  {times}  peak {peak:7.0f} MiB anonymous")


def compare(mine: Path, theirs: Path, name: str) -> None:
    """Say how far apart the results are, in units in the last place."""
    import torch
    from safetensors.torch import load_file

    def ordered(t: torch.Tensor) -> torch.Tensor:
        bits = t.view(torch.int16).int()
        return torch.where(bits < 0, -(bits + 0x8000), bits)

    found = {k: v for p in sorted(mine.glob("*.safetensors")) for k, v in load_file(p).items()}
    n = n_off = largest = 0
    for path in sorted(theirs.glob("*.safetensors")):
        for key, value in load_file(path).items():
            steps = (ordered(found.pop(key)) - ordered(value)).abs()
            n += steps.numel()
            n_off += int((steps > 0).sum())
            largest = max(largest, int(steps.max()))
    print(f"{name}: {n - n_off} of {n} weights have the same bits, the rest differ by at most {largest} ulp; "
          f"{len(found)} tensors are only ours")  # fmt: skip


if __name__ == "__main__":
    main()
