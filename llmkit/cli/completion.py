"""The values that a shell offers for an option, from the tables that the commands themselves look in.

Paths are not here: where nothing is offered, the shell goes on with its own completion of files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import typer

from llmkit.errors import LlmkitError


def offering(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A completion of one of these names, or of the last in a list with commas; asked for when a shell asks."""
    return lambda incomplete: _begun(incomplete, names)


def offering_after(names: Callable[[typer.Context], Iterable[str]]) -> Callable[[typer.Context, str], list[str]]:
    """The same for names that depend on the arguments and options before."""

    def complete(context: typer.Context, incomplete: str) -> list[str]:
        return _begun(incomplete, lambda: names(context))

    return complete


def _begun(incomplete: str, names: Callable[[], Iterable[str]]) -> list[str]:
    before, comma, begun = incomplete.rpartition(",")
    try:
        return [before + comma + name for name in names() if name.startswith(begun)]
    except (LlmkitError, ImportError):  # a plugin that is broken, a package that is missing: no time to say so
        return []


def among(*names: str) -> Callable[[str], list[str]]:
    """A completion of one of these."""
    return offering(lambda: names)


def _table(target: str) -> Callable[[str], list[str]]:
    """A completion of the names in a table, or in what a function gives: `module:attribute`, imported when asked."""
    module, _, attribute = target.partition(":")

    def known() -> Iterable[str]:
        table = getattr(import_module(f"llmkit.{module}"), attribute)
        names: Iterable[str] = table() if callable(table) else table
        return names

    return offering(known)


attentions = _table("onnx.export:ATTENTIONS")
benches = _table("evaluation.benches:bench_names")
formats = _table("architecture.prompts:FORMATS")
report_formats = _table("evaluation.formats.format:formats")
gguf_types = _table("transforms.convert.gguf:TYPE_NAMES")
inits = _table("transforms.vocab.initial:INITS")
layouts = _table("transforms.convert.targets:targets")
methods = _table("transforms.lora.combine:METHODS")
providers = _table("onnx.opening:PROVIDERS")
scores = _table("transforms.vocab.merged:SCORES")


@offering
def dtypes() -> Iterable[str]:
    """Those that floats are cast to."""
    from llmkit.transforms.convert.casting import CAST_DTYPES

    return [dtype.torch_name for dtype in CAST_DTYPES]


@offering
def profiles() -> Iterable[str]:
    """Conventions of deltas."""
    from llmkit.transforms.delta.profiles import PROFILES

    return [*(profile.name for profile in PROFILES), "llmkit"]


@offering
def quantization_methods() -> Iterable[str]:
    """What registered itself as a method."""
    from llmkit.entry_points import entries
    from llmkit.quantization.method import GROUP

    return [entry.name for entry in entries(GROUP)]


@offering
def quantization_formats() -> Iterable[str]:
    """Codecs that write folders, and layouts of blocks."""
    from llmkit.quantization.codec import FolderCodec, folder_readers
    from llmkit.transforms.convert.targets import targets

    codecs = [codec.name for codec in folder_readers() if isinstance(codec, FolderCodec)]
    return [*codecs, *(name for name, target in targets().items() if target.of_bits)]


@offering
def plugins() -> Iterable[str]:
    """Architectures."""
    from llmkit.architecture.registry import default_registry

    return [plugin.name for plugin in default_registry().plugins]


@offering_after
def backends(context: typer.Context) -> Iterable[str]:
    """What computes a model; `eval` knows serving engines besides."""
    from llmkit.evaluation.engine import engine_names
    from llmkit.onnx.backend import BACKENDS

    return engine_names() if context.info_name == "eval" else BACKENDS


@offering_after
def subjects(context: typer.Context) -> Iterable[str]:
    """Subsets, categories and subjects of the benchmark; of several words only as a shell takes them."""
    from llmkit.evaluation.benches import load_bench

    bench = load_bench(context.params.get("bench") or "")
    names = [subject.name for subject in bench.subjects]
    return [*(name for name in bench.groups(names) if re.fullmatch(r"\S+", name)), *names]


@offering_after
def protocols(context: typer.Context) -> Iterable[str]:
    """Those of the benchmark."""
    from llmkit.evaluation.protocol import protocol_names

    return protocol_names(context.params.get("bench") or "")


@offering_after
def tensors(context: typer.Context) -> Iterable[str]:
    """Those in a folder that llmkit wrote."""
    from llmkit.checkpoint.manifest import load_manifest

    return list(load_manifest(Path(context.params["folder"]))["tensors"])


@offering_after
def modules(context: typer.Context) -> Iterable[str]:
    """Those of a model on this machine that have a matrix."""
    from llmkit.checkpoint.checkpoint import open_checkpoint

    model = next(iter(context.args), "")  # where arguments stay while an option has no value yet
    tensors = open_checkpoint(model).tensors if model and Path(model).exists() else {}
    return [n.removesuffix(".weight") for n, lazy in tensors.items() if n.endswith(".weight") and len(lazy.shape) == 2]
