"""How fast `llmkit --help` and `llmkit inspect` answer, beside a bare Python and `import transformers`, in one run.

    python tests/bench/startup.py SCRATCH [--repeat N]

The folder that is inspected has the shape of a 7B model (hidden 4096, 32 layers, vocabulary 32,000, float16) in three
files of real size; their data are holes, so that SCRATCH needs some kilobytes. Files are warm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import struct
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from delta_apply import config_of, shapes

HIDDEN, LAYERS, FFN, FILES = 4096, 32, 11008, 3


def make_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (HIDDEN // 64,) for i in range(LAYERS)}
    names, weight_map = list((shapes(HIDDEN, LAYERS, FFN, HIDDEN) | buffers).items()), {}
    for i in range(FILES):
        file = f"model-{i + 1:05d}-of-{FILES:05d}.safetensors"
        header, offset = {}, 0
        for name, shape in names[i * len(names) // FILES : (i + 1) * len(names) // FILES]:
            n = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + n]}
            offset += n
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_key_value_heads": 32}
    config = config_of("float16", **sizes)
    (folder / "config.json").write_text(json.dumps(config))


def timed(command: list[str], repeat: int) -> list[float]:
    found = []
    for _ in range(repeat + 1):  # the first fills the caches of the disk
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - started)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    folder = args.scratch / "shape-7b"
    make_folder(folder)
    llmkit = str(Path(sysconfig.get_path("scripts")) / "llmkit")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import transformers": [sys.executable, "-c", "from transformers import AutoConfig"],
        "llmkit --help": [llmkit, "--help"],
        "llmkit inspect 7B": [llmkit, "inspect", str(folder)],
    }
    limits = {"llmkit --help": 0.2, "llmkit inspect 7B": 0.5}
    for name, command in commands.items():
        found = timed(command, args.repeat)
        limit = f"   (target: at most {limits[name]} s)" if name in limits else ""
        print(f"{name:>20}  median {statistics.median(found):.3f} s   best {min(found):.3f} s{limit}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
