"""The values that a shell offers for an option, from the tables that the commands themselves look in.

Paths are not here: where nothing is offered, the shell goes on with its own completion of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llmkit.errors import LlmkitError

__all__ = [
    "among", "attentions", "backends", "benches", "dtypes", "formats", "gguf_types", "inits", "layouts", "methods",
    "plugins", "profiles", "providers", "quantization_formats", "quantization_methods", "scores",
]  # fmt: skip


def offering(known: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A completion of one of these names, or of the last in a list with commas; asked for when a shell asks."""

    def complete(incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(",")
        try:
            return [before + comma + name for name in known() if name.startswith(begun)]
        except (LlmkitError, ImportError):  # a plugin that is broken, a package that is missing: no time to say so
            return []

    return complete


def among(*known: str) -> Callable[[str], list[str]]:
    """A completion of one of these."""
    return offering(lambda: known)


def _benches() -> Iterable[str]:
    from llmkit.evaluation.benches import bench_names

    return bench_names()


def _layouts() -> Iterable[str]:
    from llmkit.transforms.convert.targets import targets

    return targets()


def _gguf_types() -> Iterable[str]:
    from llmkit.transforms.convert.gguf import TYPE_NAMES

    return TYPE_NAMES


def _dtypes() -> Iterable[str]:
    from llmkit.transforms.convert.casting import CAST_DTYPES

    return [dtype.torch_name for dtype in CAST_DTYPES]


def _methods() -> Iterable[str]:
    from llmkit.transforms.lora.combine import METHODS

    return METHODS


def _attentions() -> Iterable[str]:
    from llmkit.onnx.export import ATTENTIONS

    return ATTENTIONS


def _providers() -> Iterable[str]:
    from llmkit.onnx.opening import PROVIDERS

    return PROVIDERS


def _backends() -> Iterable[str]:
    from llmkit.onnx.backend import BACKENDS

    return BACKENDS


def _formats() -> Iterable[str]:
    from llmkit.architecture.prompts import FORMATS

    return FORMATS


def _profiles() -> Iterable[str]:
    from llmkit.transforms.delta.profiles import PROFILES

    return [*(profile.name for profile in PROFILES), "llmkit"]


def _inits() -> Iterable[str]:
    from llmkit.transforms.vocab.initial import INITS

    return INITS


def _scores() -> Iterable[str]:
    from llmkit.transforms.vocab.merged import SCORES

    return SCORES


def _quantization_methods() -> Iterable[str]:
    from llmkit.entry_points import entries
    from llmkit.quantization.method import GROUP

    return [entry.name for entry in entries(GROUP)]


def _quantization_formats() -> Iterable[str]:
    from llmkit.quantization.codec import folder_codecs

    return [codec.name for codec in folder_codecs()]


def _plugins() -> Iterable[str]:
    from llmkit.architecture.registry import default_registry

    return [plugin.name for plugin in default_registry().plugins]


attentions, backends, benches, dtypes = map(offering, (_attentions, _backends, _benches, _dtypes))
formats, gguf_types, inits, layouts = map(offering, (_formats, _gguf_types, _inits, _layouts))
methods, plugins, profiles = map(offering, (_methods, _plugins, _profiles))
providers, scores = map(offering, (_providers, _scores))
quantization_formats, quantization_methods = map(offering, (_quantization_formats, _quantization_methods))
