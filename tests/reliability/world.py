"""Every writing command on tiny inputs, and running one in a fork of this process under the shim."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.releases import release_world
from tests.reliability.shim import Shim

__all__ = ["Command", "Ended", "World", "snapshot"]

_VOCAB, _HIDDEN, _FFN = 1536, 32, 64
_SECONDS = 120
_PASSING = ("elapsed_s", "mtime_ns", "tokens", "sharing", "n_reused")


@dataclass(frozen=True)
class Command:
    """A command line without -o; `is_file`: OUT is a file of this name."""

    words: tuple[str, ...]
    out: str = "out"
    can_overwrite: bool = True

    @property
    def name(self) -> str:
        """In few words."""
        return " ".join(w if os.sep not in w else Path(w).name for w in self.words if w != "-q")

    def line(self, *, overwrite: bool) -> list[str]:
        """The arguments."""
        return [*self.words, "-o", self.out, "-q", *(["--overwrite"] if overwrite else [])]


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative: signal), what it said, and the operations that were counted."""

    code: int
    text: str
    operations: tuple[str, ...]


class World:
    """Inputs in a folder, and commands that read them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = folder / "inputs"
        self.trial = folder / "trial"
        self._modules = folder / "modules"
        self.inputs.mkdir(parents=True)
        rng = np.random.default_rng(0)
        base = _model(self.inputs / "base", rng)
        _model(self.inputs / "tuned", rng, base)
        _adapter(self.inputs / "adapter", rng)
        text = (files("llmkit_evalsets") / "mini/text.txt").read_text()
        (self.inputs / "corpus.txt").write_text(text[:3000])
        (self.inputs / "words.txt").write_text("zyzzyva\nquokka\n")
        hf = release_world.write_hf(self.inputs / "hf")
        hf_tuned = release_world.write_hf(self.inputs / "hf-tuned", tuned=1)
        release_world.write_xor_payload(self.inputs / "xor", hf, hf_tuned)
        key = release_world.write_key(self.inputs / "7B/consolidated.00.pth")
        release_world.write_encrypted(self.inputs / "enc", hf_tuned, key)
        self.reset()
        self._prepare()
        self.must(Command(self._words("delta make @base @tuned --no-check"), str(self.inputs / "delta")))
        self.must(Command(self._words("convert @tuned --to hf --dtype bfloat16"), str(self.inputs / "old")))
        old_gguf = str(self.inputs / "old.gguf")
        self.must(Command(self._words("convert @tuned --to gguf --type q8_0"), old_gguf))

    def commands(self, *, with_eval: bool = True) -> Iterator[Command]:
        """Every command that writes."""
        for text in (
            "delta apply @base @delta", "delta make @base @tuned", "lora merge @base @adapter",
            "lora combine @adapter @adapter --method svd --rank 2", "lora extract @base @tuned --rank 2",
            "vocab extend @base --with @words.txt", "vocab trim @base --corpus @corpus.txt",
            "convert @base --to hf --dtype bfloat16", "convert @base --to bin", "convert @base --to meta",
            "convert @base --to litgpt", "convert @base --to llama2c", "convert @base --to gguf --type q8_0",
            "quantize @base --bits 4 --group-size 32 --samples 4 --length 16",
            "quantize @base --bits 4 --group-size 32 --calibration @corpus.txt --samples 4 --length 16",
            "export @base --to onnx --no-check",
            "convert @base --to hf --max-shard-size 40KB",
            "delta xor @hf @xor", "delta decrypt @7B/consolidated.00.pth @enc",
        ):  # fmt: skip
            yield Command(self._words(text))
        yield Command(self._words("convert @base --to gguf --type f16"), "out.gguf")
        yield Command(self._words("plugins new @base"), "out.py", can_overwrite=False)
        if with_eval:
            yield Command(self._words("eval @base --bench mini --limit 1 --shots 0"), "out.json", can_overwrite=False)

    def _words(self, text: str) -> tuple[str, ...]:
        words = (w.replace("@", str(self.inputs) + os.sep) if w.startswith("@") else w for w in text.split())
        workers = () if text.startswith(("plugins", "eval")) else ("--workers", "1")
        return (*words, *workers)

    def reset(self, command: Command | None = None, *, overwrite: bool = False) -> None:
        """An empty folder to work in; with something to be overwritten, where that is wanted."""
        shutil.rmtree(self.trial, ignore_errors=True)
        self.trial.mkdir()
        if command is not None and overwrite:
            old = self.inputs / ("old.gguf" if command.out.endswith(".gguf") else "old")
            place = self.trial / command.out
            shutil.copytree(old, place) if old.is_dir() else shutil.copy(old, place)

    def _prepare(self) -> None:
        """Run a command in this process, so that its forks have what is made once a process: commands, plugins."""
        from llmkit.cli.app import main

        command = Command(self._words("convert @base --to hf"), str(self.folder / "prepared"))
        assert main(command.line(overwrite=False)) == 0
        assert threading.active_count() == 1, "a fork beside threads may hang"
        gc.collect()
        gc.freeze()  # memory that is not looked at is not copied either

    def must(self, command: Command) -> None:
        """Make an input."""
        ended = self.run(command)
        assert ended.code == 0, f"{command.name}: exit {ended.code}: {ended.text}"

    def run(
        self, command: Command, at: int = 0, *, overwrite: bool = False, is_full: bool = False, is_torn: bool = False
    ) -> Ended:
        """Run a command in a fork, under the shim."""
        said, log = self.folder / "said", self.folder / "log"
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._child(
                command.line(overwrite=overwrite), said, Shim(self.trial, at, is_full=is_full, is_torn=is_torn, log=log)
            )
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._import_as_well()
        return Ended(code, said.read_text(errors="replace"), tuple(log.read_text().splitlines()))

    def _import_as_well(self) -> None:
        """Import here what a child had to import, so that the next one need not."""
        if not self._modules.exists():
            return
        for name in self._modules.read_text().split():
            if name not in sys.modules:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        self._modules.unlink()

    def _child(self, line: list[str], said: Path, shim: Shim) -> None:
        code = 70
        try:
            fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            os.chdir(self.trial)
            signal.alarm(_SECONDS)
            from llmkit.cli.app import main

            shim.install()
            code = main(line)
            self._modules.write_text("\n".join(sys.modules))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def snapshot(path: Path) -> dict[str, bytes]:
    """The bytes of a file or of all files of a folder; of a manifest and a record what every run has in common."""
    if not os.path.lexists(path):
        return {}
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() or p.is_symlink())
    return {str(p.relative_to(path)): _comparable(p.name, p.read_bytes()) for p in found}


def _comparable(name: str, data: bytes) -> bytes:
    if not name.endswith(".json"):
        return data
    try:
        body = json.loads(data)
    except ValueError:
        return data
    if not isinstance(body, dict) or not ({"run", "created"} & body.keys()):
        return data
    return json.dumps(_without_times({k: v for k, v in body.items() if k not in ("run", "created")})).encode()


def _without_times(value: object) -> object:
    """Without how long it took, and how much was computed rather than taken up."""
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in _PASSING}
    return value


def _model(folder: Path, rng: np.random.Generator, base: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    mini = Path(str(files("llmkit_evalsets"))) / "mini/base"
    shutil.copytree(mini, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((mini / "config.json").read_text())
    config |= {"hidden_size": _HIDDEN, "intermediate_size": _FFN, "num_hidden_layers": 1, "num_attention_heads": 2,
               "num_key_value_heads": 2, "head_dim": 16, "torch_dtype": "float32"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    at = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (_VOCAB, _HIDDEN), "lm_head": (_VOCAB, _HIDDEN)}
    shapes |= {at + f"self_attn.{n}_proj": (_HIDDEN, _HIDDEN) for n in "qkvo"}
    shapes |= {at + "mlp.gate_proj": (_FFN, _HIDDEN), at + "mlp.up_proj": (_FFN, _HIDDEN)}
    shapes |= {at + "mlp.down_proj": (_HIDDEN, _FFN), at + "input_layernorm": (_HIDDEN,)}
    shapes |= {at + "post_attention_layernorm": (_HIDDEN,), "model.norm": (_HIDDEN,)}
    scale = 0.1 if base is None else 0.01
    made = {f"{n}.weight": rng.standard_normal(s).astype(np.float32) * scale for n, s in shapes.items()}
    if base is None:  # norms of a model are near one; those of a delta are not, and that tells them apart
        made = {n: t + 1 if "norm" in n else t for n, t in made.items()}
    if base is not None:
        made = {n: base[n] + t for n, t in made.items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return made


def _adapter(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir()
    at = "base_model.model.model.layers.0.self_attn."
    made = {}
    for name in ("q_proj", "v_proj"):
        made[f"{at}{name}.lora_A.weight"] = rng.standard_normal((2, _HIDDEN)).astype(np.float32) * 0.1
        made[f"{at}{name}.lora_B.weight"] = rng.standard_normal((_HIDDEN, 2)).astype(np.float32) * 0.1
    save_file(made, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none",
              "fan_in_fan_out": False, "task_type": "CAUSAL_LM", "base_model_name_or_path": "base"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
