"""What each quantization method loses on one model, beside other tools: perplexity, KL divergence, flips, time, size.

    python tests/bench/quantize_quality.py MODEL SCRATCH --calibration TEXT --held TEXT [--case BITS:sym|asym …]
        [--method rtn gptq …] [--group 64] [--samples 64] [--length 512] [--context 1024] [--windows 20]
        [--layers N] [--peer gptqmodel=PYTHON autoround=PYTHON hqq=PYTHON …]

Every row is one process that quantizes the linear layers of MODEL (embedding and head stay floats) with the same
windows of the same calibration text: llmkit's are `llmkit quantize`, the peers' are in `quantize_peers.py`, run by the
Python of an environment that has them. All of them are then measured by one program, llmkit's decoder in float32 with
the numbers that the integers stand for, on the first windows of the held-out text: perplexity, mean KL divergence of
the next-token distribution from MODEL's, and the share of tokens where another one is the most probable.
With --layers only the first N layers are quantized (every tool is given a model that ends after them; it sees the same
inputs of each layer as in the whole one) and measured below the other layers in floats: for tools that take hours.
Folders that exist in SCRATCH are measured, not made again.

Which is faster is told by the processor time (CPU) with `taskset -c 0 env OMP_NUM_THREADS=1`, from a second run on: the
first compiles GPTQModel's extension.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llmkit.decoder.language_model import LanguageModel
    from llmkit.evaluation.divergence import Distributions, Piece, Spans

PEERS = Path(__file__).with_name("quantize_peers.py")
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def run(command: list[str], log: Path) -> tuple[float, float, float]:
    """Seconds of wall time, of processor time, and peak MiB of a command; its output goes to `log`."""
    started = time.monotonic()
    with log.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command[:6])} … failed:\n{log.read_text()[-800:]}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def cut(model: Path, n: int, folder: Path) -> Path:
    """MODEL without its layers from the n-th on."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "llmkit.json"), dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n}))
    tensors = load_file(model / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not (found := LAYER.match(name)) or int(found[1]) < n}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def completed(quantized: Path, model: Path, folder: Path) -> Path:
    """MODEL with the layers of `quantized`, dequantized, in the place of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    dense = folder.with_name("dense")
    to_floats = ["convert", str(quantized), "--to", "dense", "--dtype", "float32", "--overwrite", "-o", str(dense)]
    run([sys.executable, "-m", "llmkit", *to_floats], folder.with_suffix(".log"))
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "llmkit.json"))
    layers = {
        name: t for path in dense.glob("*.safetensors") for name, t in load_file(path).items() if LAYER.match(name)
    }
    save_file(load_file(model / "model.safetensors") | layers, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def decoder(model: Path) -> LanguageModel:
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.onnx.backend import load_backend

    return load_backend(open_checkpoint(str(model)), backend="llmkit", dtype="float32")


@dataclass(frozen=True)
class Kept:
    """Distributions that are computed for the first row only: 4 bytes a token and piece of the vocabulary."""

    of: Distributions
    batches: dict[tuple[tuple[int, int, int], ...], list[Piece]] = field(default_factory=dict)

    def pieces(self, ids: Sequence[int], batch: Spans) -> Iterator[Piece]:
        if tuple(batch) not in self.batches:
            self.batches[tuple(batch)] = list(self.of.pieces(ids, batch))
        yield from self.batches[tuple(batch)]


def held_ids(model: Path, text: Path, context: int, n: int) -> list[int]:
    """The tokens of the first windows of a text, at most `n`."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), verbose=False)["input_ids"]
    return ids[: min(n, len(ids) // context) * context]


def calibration(model: Path, text: Path, length: int, n: int) -> list[list[int]]:
    """The windows of token ids that `llmkit quantize` calibrates on."""
    from transformers import AutoTokenizer

    from llmkit.calibration.texts import read_text, token_ids, windows

    return windows(token_ids(read_text(text), AutoTokenizer.from_pretrained(model)), length, samples=n)


def nbytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held", type=Path, required=True)
    parser.add_argument("--case", nargs="+", default=["4:sym", "4:asym"])
    parser.add_argument("--method", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--peer", nargs="*", default=[], metavar="NAME=PYTHON")
    for name, default in (("group", 64), ("samples", 64), ("length", 512), ("context", 1024), ("windows", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layers", type=int, help="quantize the first N layers only")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    from llmkit.errors import LlmkitError
    from llmkit.evaluation.divergence import ModelDistributions, measure_divergence
    from llmkit.evaluation.perplexity import measure_perplexity

    ids = held_ids(args.model, args.held, args.context, args.windows)
    reference = decoder(args.model)
    kept = Kept(ModelDistributions(reference))
    taken = cut(args.model, args.layers, args.scratch / "cut") if args.layers else args.model
    samples = args.scratch / "samples.json"
    samples.write_text(json.dumps(calibration(args.model, args.calibration, args.length, args.samples)))
    extent = f"first {args.layers} layers" if args.layers else "whole"
    print(f"{args.model.name}, {extent}, group {args.group}, {args.samples} x {args.length} tokens of "
          f"{args.calibration.name}; {len(ids) // args.context} windows of {args.context} of {args.held.name}; "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)  # fmt: skip
    row = "{:10} {:22} {:>8} {:>8} {:>7} {:>9} {:>9} {:>9} {:>8}"
    print(row.format("grid", "method", "perplex.", "KL", "flips", "time", "CPU", "peak", "size"), flush=True)
    floats = measure_perplexity(reference, ids, context=args.context)
    print(row.format("float", "", f"{floats.perplexity:.3f}", "0", "0", "", "", "",
                     f"{nbytes(args.model) / 2**20:.0f} MiB"), flush=True)  # fmt: skip
    for case in args.case:
        bits, symmetry = case.split(":")
        made = {}
        for method in args.method:
            own = [sys.executable, "-m", "llmkit", "quantize", str(taken), "--bits", bits, "--method", method,
                   "--symmetric" if symmetry == "sym" else "--asymmetric", "--group-size", str(args.group)]  # fmt: skip
            text = ["--calibration", str(args.calibration), "--samples", str(args.samples)]
            own += [*text, "--length", str(args.length)] if method not in ("rtn", "hqq") else ["--calibration", "none"]
            made[f"llmkit {method}"] = [*own, "-o"]
        for peer in args.peer:
            name, _, python = peer.partition("=")
            settings = {
                "bits": int(bits), "symmetric": symmetry == "sym", "group": args.group, "ids": str(samples),
            }  # fmt: skip
            made[name] = [python, str(PEERS), name, json.dumps(settings), str(taken)]
        for name, command in made.items():
            folder = args.scratch / f"{bits}-{symmetry}-{name.replace(' ', '-')}"
            note = folder.with_suffix(".json")
            try:
                if not note.exists():
                    shutil.rmtree(folder, ignore_errors=True)
                    seconds, processor, peak = run([*command, str(folder)], folder.with_suffix(".log"))
                    whole = completed(folder, args.model, args.scratch / "whole") if args.layers else folder
                    found = measure_divergence(kept, decoder(whole), ids, context=args.context)
                    cost = {"seconds": seconds, "processor": processor, "peak": peak}
                    note.write_text(json.dumps({**found.as_dict(), **cost}))
            except (RuntimeError, LlmkitError) as error:
                print(row.format(case, name, "failed", "", "", "", "", "", ""), str(error).splitlines()[-1], flush=True)
                continue
            f = json.loads(note.read_text())
            print(row.format(case, name, f"{f['perplexity_after']:.3f}", f"{f['kl_divergence']:.4f}",
                             f"{f['flipped']:.2%}", f"{f['seconds']:.0f} s",
                             f"{f.get('processor', float('nan')):.1f} s", f"{f['peak']:.0f} MiB",
                             f"{nbytes(folder) / 2**20:.0f} MiB"), flush=True)  # fmt: skip
    print(f"peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
