"""The verbs at the shapes of `large_shapes.py`: what a plan costs, and the peak of memory of whole runs.

    python tests/bench/large_runs.py FOLDER plans [MODEL …] [--verb NAME …]
    python tests/bench/large_runs.py FOLDER runs [MODEL …] [--verb NAME …] [--workers N]

`plans` are dry runs, twice each: processor time, time and peak resident memory of the process. Where the disk is too
small for the output, they say so and end with code 2, as always. `runs` compute everything, of
qwen3-30b-a3b where no model is named, with the disk left out: holes of the inputs read as random bfloat16 values, and
what is computed is counted and hashed, but not written. FOLDER takes some 100 MB; what it lacks is made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import sysconfig
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from large_shapes import MODELS, shapes_of, write, write_files

RANK = 8
VERBS = {
    "convert": ["convert", "{model}", "--to", "hf", "--dtype", "float16"],
    "quantize": ["quantize", "{model}", "--bits", "4", "--method", "rtn", "--calibration", "none"],
    "lora": ["lora", "merge", "{model}", "{model}-adapter"],
    "lora experts": ["lora", "merge", "{model}", "{model}-adapter-experts"],
    "delta": ["delta", "apply", "{model}", "{model}-delta"],
}


def make(model: Path) -> None:
    """The model, a delta of it, and two adapters: of the attention, and of the experts besides."""
    shapes = shapes_of(MODELS[model.name])
    if not model.exists():
        write(model, MODELS[model.name])
    delta = model.with_name(f"{model.name}-delta")
    if not delta.exists():
        delta.mkdir()
        shutil.copy(model / "config.json", delta)
        write_files(delta, shapes, norms=bytes(2))
    for suffix, words in (("", (".self_attn.",)), ("-experts", (".self_attn.", ".experts."))):
        folder = model.with_name(f"{model.name}-adapter{suffix}")
        if folder.exists():
            continue
        folder.mkdir()
        stems = [n.removesuffix(".weight") for n in shapes if any(w in n for w in words) and n.endswith("proj.weight")]
        parts: dict[str, tuple[int, ...]] = {}
        for stem in stems:
            rows, columns = shapes[f"{stem}.weight"]
            parts[f"base_model.model.{stem}.lora_A.weight"] = (RANK, columns)
            parts[f"base_model.model.{stem}.lora_B.weight"] = (rows, RANK)
        write_files(folder, parts, name="adapter_model.safetensors")
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model), "r": RANK,
            "lora_alpha": RANK, "target_modules": sorted({stem.rpartition(".")[2] for stem in stems}), "bias": "none",
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))


def measured(command: list[str], label: str) -> None:
    """Run a command, and print what it took."""
    started = time.perf_counter()
    # With compiled modules, as an installation has them.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    pid = os.posix_spawn(command[0], command, environment)
    _, status, usage = os.wait4(pid, 0)
    wall, cpu = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    code = os.waitstatus_to_exitcode(status)
    print(f"{label:<32} {cpu:8.2f} s cpu {wall:8.2f} s wall  peak {usage.ru_maxrss * 1024 / 1e6:6.0f} MB", end="")
    print("" if code == 0 else f"  exit code {code}", flush=True)


def counted(args: list[str]) -> int:
    """llmkit in this process: holes of inputs have values, and large outputs are counted instead of written."""
    import numpy as np

    from llmkit.cli.app import main as llmkit
    from llmkit.pipeline import writer
    from llmkit.tensors.source import SourceFile

    bits = np.random.default_rng(0).standard_normal(2**22, dtype=np.float32).__mul__(np.float32(0.02)).view(np.uint32)
    values = memoryview((bits >> 16).astype(np.uint16)).cast("B")
    filled, write_all, counts = SourceFile.fill, writer.Writer.write, {"read": 0, "written": 0}

    def fill(source: SourceFile, view: memoryview, offset: int) -> None:
        try:
            data = os.lseek(source.fileno(), offset, os.SEEK_DATA)
        except OSError:  # none is left
            data = source.nbytes
        if data < offset + len(view):
            return filled(source, view, offset)
        counts["read"] += len(view)
        done, at = 0, (offset + 2 * zlib.crc32(str(source.path).encode())) % len(values) // 2 * 2
        while done < len(view):
            n = min(len(view) - done, len(values) - at)
            view[done : done + n] = values[at : at + n]
            done, at = done + n, 0
        return None

    def write_counted(self: writer.Writer, name: str, view: memoryview, offset: int) -> None:
        counts["written"] += len(view)
        if not name.endswith(".safetensors") or not offset:  # headers are read again
            write_all(self, name, view, offset)

    SourceFile.fill, writer.Writer.write, writer._reserve = fill, write_counted, os.ftruncate  # type: ignore[method-assign]
    shutil.disk_usage = lambda _path: shutil._ntuple_diskusage(2**50, 0, 2**50)  # type: ignore[attr-defined]
    del os.copy_file_range  # the head start of copies
    code = llmkit(args)
    print(f"{counts['read'] / 1e9:.1f} GB read from holes, {counts['written'] / 1e9:.1f} GB counted", file=sys.stderr)
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=["plans", "runs"])
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--verb", action="append", choices=VERBS)
    parser.add_argument("--workers", default="2")
    args = parser.parse_args()
    is_plan = args.what == "plans"
    for model in args.models or (["qwen3-235b-a22b", "deepseek-v3"] if is_plan else ["qwen3-30b-a3b"]):
        make(args.folder / model)
        for verb in args.verb or VERBS:
            out = args.folder / f"{model}-out"
            shutil.rmtree(out, ignore_errors=True)
            command = [part.format(model=args.folder / model) for part in VERBS[verb]] + ["-o", str(out), "-q"]
            if is_plan:
                llmkit = [str(Path(sysconfig.get_path("scripts")) / "llmkit"), *command, "--dry-run"]
            else:
                llmkit = [sys.executable, __file__, "counted", *command, "--workers", args.workers]
            for _ in range(2 if is_plan else 1):  # the first compiles modules, and fills the caches of the disk
                measured(llmkit, f"{model} {verb}")
            shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["counted"]:
        sys.exit(counted(sys.argv[2:]))
    main()
