"""The checks of `llmkit doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from llmkit.cli.packages import installed_version, requirements, source
from llmkit.errors import LlmkitError, PluginError, counted
from llmkit.lazy_imports import torch
from llmkit.pipeline.cores import n_cores
from llmkit.tensors.spec import format_bytes
from llmkit.version import __version__

_MIN_FREE_NBYTES = 10 * 10**9


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One thing that was looked at.

    Attributes:
        state: `ok`, `note` (fine, but know it) or `wrong`.
        remedy: what to do about it.
    """

    name: str
    state: str
    text: str
    remedy: str | None = None


def examine() -> list[Diagnosis]:
    """Everything, in order; a check that breaks is itself a finding."""
    diagnoses: list[Diagnosis] = []
    for name, look in (
        ("python", _python),
        ("packages", _packages),
        ("torch", _torch),
        ("ONNX Runtime", _onnx_runtime),
        ("memory", _memory),
        ("disk", _disk),
        ("plugins", _plugins),
        ("end to end", _end_to_end),
    ):
        diagnoses += _guarded(name, look)
    return diagnoses


def _guarded(name: str, look: Callable[[], Iterator[Diagnosis]]) -> list[Diagnosis]:
    try:
        return list(look())
    except LlmkitError as error:
        return [Diagnosis(name, "wrong", error.message, error.hint)]
    except Exception as error:  # noqa: BLE001 - whatever is broken here is what the user wants to know
        if os.environ.get("LLMKIT_DEBUG") == "1":
            traceback.print_exc()
        return [
            Diagnosis(name, "wrong", f"{type(error).__name__}: {error}", "LLMKIT_DEBUG=1 llmkit doctor shows where")
        ]


def _python() -> Iterator[Diagnosis]:
    yield Diagnosis("python", "ok", f"{platform.python_version()} in {sys.prefix}, {platform.platform()}")


def _packages() -> Iterator[Diagnosis]:
    try:
        wanted = requirements()
    except PackageNotFoundError:
        yield Diagnosis(
            "packages", "note", f"llmkit {__version__} runs from a folder, not from an installation", "pip install -e ."
        )
        return
    here: list[str] = []
    missing_extras: dict[str, list[str]] = {}
    for requirement, extra in wanted:
        version = installed_version(requirement.name)
        is_fine = version is not None and requirement.specifier.contains(version, prereleases=True)
        if extra is None:
            if is_fine:
                here.append(f"{requirement.name} {version}")
            else:
                state = f"{requirement.name} {version or 'is not installed'}, needs {requirement.specifier}"
                yield Diagnosis("packages", "wrong", state, f"pip install '{requirement.name}{requirement.specifier}'")
        elif not is_fine:
            state = (
                requirement.name if version is None else f"{requirement.name} {version} is not {requirement.specifier}"
            )
            missing_extras.setdefault(extra, []).append(state)
    yield Diagnosis("packages", "ok", f"llmkit {__version__}, " + ", ".join(here))
    for extra, names in missing_extras.items():
        if extra not in ("dev", "cpu", "gpu"):
            is_apart = any(" is not " in name for name in names)  # it would change what is here
            apart = f"pip install '{source()}[cpu,{extra}]' in an environment of its own"
            remedy = apart if is_apart else f"pip install 'llmkit[{extra}]'"
            yield Diagnosis(f"extra {extra}", "note", f"not here: {', '.join(names)}", remedy)


def _torch() -> Iterator[Diagnosis]:
    cores = n_cores()
    n_threads = torch.get_num_threads()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    words = f"{counted(n_threads, 'thread')} on {counted(cores, 'core')}"
    yield Diagnosis("torch", "ok", f"{torch.__version__} ({build} build), {words}")
    if n_threads > cores:
        yield Diagnosis("threads", "note", words, f"export OMP_NUM_THREADS={cores}")
    if torch.version.cuda and not torch.cuda.is_available():
        yield Diagnosis(
            "gpu",
            "note",
            "torch is built for CUDA but sees no device",
            "nvidia-smi tells whether the driver is there; llmkit computes on the CPU meanwhile",
        )
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        yield Diagnosis("gpu", "ok", f"cuda:{i} {name}, {format_bytes(free)} of {format_bytes(total)} free")


def _onnx_runtime() -> Iterator[Diagnosis]:
    name = "ONNX Runtime"
    builds = [build for build in ("onnxruntime", "onnxruntime-gpu") if installed_version(build) is not None]
    if len(builds) > 1:
        remedy = f"pip uninstall {' '.join(builds)}, then pip install 'llmkit[cpu]' or 'llmkit[gpu]'"
        yield Diagnosis(name, "wrong", f"{' and '.join(builds)} are both installed, under one import name", remedy)
    elif not builds:
        remedy = "pip install 'llmkit[cpu]' or 'llmkit[gpu]'"
        yield Diagnosis(name, "note", "not installed: exporting works, checking and running what was exported does not",
                      remedy)  # fmt: skip
    else:
        import onnxruntime

        providers = ", ".join(onnxruntime.get_available_providers())
        yield Diagnosis(name, "ok", f"{onnxruntime.__version__} ({builds[0]}), with {providers}")


def _memory() -> Iterator[Diagnosis]:
    text = Path("/proc/meminfo")
    if not text.is_file():
        return
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.read_text().splitlines() if ":" in line}
    free = sizes.get("MemAvailable", 0)
    yield Diagnosis(
        "memory",
        "ok",
        f"{format_bytes(free)} of {format_bytes(sizes.get('MemTotal', 0))} free: transforms stream and need little; "
        f"evaluation in float32 holds a model of about {free / 4 / 1e9 * 0.8:.0f} B parameters",
    )


def _disk() -> Iterator[Diagnosis]:
    for name, folder in (("disk here", Path.cwd()), ("disk for temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        if not os.access(folder, os.W_OK):
            yield Diagnosis(name, "note", f"{folder} cannot be written", "work in another folder, or set TMPDIR")
        elif free < _MIN_FREE_NBYTES:
            yield Diagnosis(
                name,
                "note",
                f"{folder}: only {format_bytes(free)} free",
                "free some space, or work on another disk: a 7B model takes 13.5 GB in half precision",
            )
        else:
            yield Diagnosis(name, "ok", f"{folder}: {format_bytes(free)} free")


def _plugins() -> Iterator[Diagnosis]:
    from llmkit import entry_points
    from llmkit.architecture import tokenizers
    from llmkit.architecture.registry import default_registry
    from llmkit.layouts import opening
    from llmkit.quantization import codec, method

    registry = default_registry()
    loaded = registry.load_all()
    good = [p.name for p, result in loaded.items() if not isinstance(result, PluginError)]
    yield Diagnosis(
        "plugins",
        "ok" if good else "wrong",
        ", ".join(good) or "none",
        None if good else f"pip install --force-reinstall --no-deps '{source()}'",
    )
    for plugin, result in loaded.items():
        if isinstance(result, PluginError):
            yield Diagnosis(f"plugin {plugin.name}", "wrong", result.message, f"update or uninstall {plugin.origin}")
    groups = (opening.GROUP, method.GROUP, codec.GROUP, tokenizers.GROUP)
    for entry in (e for group in groups for e in entry_points.entries(group)):
        try:
            entry_points.load(entry)
        except PluginError as error:
            yield Diagnosis(f"plugin {entry.name}", "wrong", error.message, error.hint)
    for clash in registry.clashes():
        yield Diagnosis("plugins", "wrong", clash, "uninstall one of them")


def _end_to_end() -> Iterator[Diagnosis]:
    """A tiny random model: saved, quantized, read back, compared, verified."""
    from llmkit.api import save
    from llmkit.architecture.registry import default_registry
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.decoder import load_decoder
    from llmkit.decoder.contract import random_checkpoint
    from llmkit.inspection.check import check_output
    from llmkit.transforms.quantize import quantize

    started = time.monotonic()
    registry = default_registry()
    architecture = registry.load(registry.plugins[0])
    model = random_checkpoint(architecture, architecture.tiny_config())
    ids = torch.arange(24)[None] % 8
    expected = load_decoder(model)(ids)
    with tempfile.TemporaryDirectory(prefix="llmkit-doctor-") as folder:
        full, small = Path(folder) / "float", Path(folder) / "int8"
        save(model, full)
        save(quantize(open_checkpoint(full), bits=8), small)
        back = load_decoder(open_checkpoint(full))(ids)
        quantized = load_decoder(open_checkpoint(small))(ids)
        verdicts = [check_output(full), check_output(small)]
    elapsed = time.monotonic() - started
    problems = [p for v in verdicts for p in v.problems]
    if not torch.equal(back, expected):
        problems.append("a saved model gives other logits than the one in memory")
    error = float((quantized - expected).norm() / expected.norm())
    if not error < 0.1:
        problems.append(f"8 bits change the logits by {error:.1%}")
    if problems:
        yield Diagnosis("end to end", "wrong", "; ".join(problems), "please report this with `llmkit doctor --json`")
    else:
        text = f"a tiny {architecture.name} model saved, quantized, read back and verified in {elapsed:.1f} s"
        yield Diagnosis("end to end", "ok", f"{text}; 8 bits change its logits by {error:.2%}")
