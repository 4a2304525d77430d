"""What registers itself: entry points of a group, from installed distributions and from the checkout llmkit runs from.

A group is one seam of llmkit: `llmkit.architectures` (decoder families), `llmkit.layouts` (files of other programs),
`llmkit.codecs` (layouts of quantized matrices), `llmkit.methods` (ways to quantize one),
`llmkit.tokenizers` (files of tokenizers that were published with code), `llmkit.report_formats` (forms of a report),
`llmkit.protocols` (ways to score a benchmark), `llmkit.engines` (what scores in a decoder's place). Built-in entries
stand in llmkit's own pyproject.toml.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from llmkit.errors import InputError, PluginError, nearest

T = TypeVar("T")
_HOME = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """A name in a group, and the object that it stands for.

    Attributes:
        target: `module:attribute`.
        origin: the distribution it comes from, with its version; the path for a checkout.
        is_builtin: it ships with llmkit.
    """

    name: str
    target: str
    origin: str
    is_builtin: bool = False


def entries(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, the built-in ones first; a checkout knows better than an older install of it."""
    return _entries(group, tuple(sys.path))


@cache
def _entries(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    builtin = _of_checkout(group)
    result = []
    owners: dict[int, tuple[str, str]] = {}  # a distribution reads its metadata anew for each question
    for entry in _installed(path).get(group, ()):
        dist = entry.dist
        if id(dist) not in owners:
            owners[id(dist)] = (dist.name, dist.version) if dist is not None else ("unknown", "")
        owner, version = owners[id(dist)]
        if owner != "llmkit" or not builtin:
            result.append(EntryPoint(entry.name, entry.value, f"{owner} {version}".strip(), owner == "llmkit"))
    result.sort(key=lambda e: (e.origin, e.name))
    return tuple({(e.name, e.target, e.origin): e for e in [*builtin, *result]}.values())


@cache
def _installed(path: tuple[str, ...]) -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Of all groups at once: for one of them the files of every distribution are read as well."""
    found: Any = importlib.metadata.entry_points()  # whose class Python 3.12 has changed
    return {group: list(found.select(group=group)) for group in found.groups if group.startswith("llmkit.")}


def load(entry: EntryPoint) -> Any:
    """The object of an entry point.

    Raises:
        PluginError: it cannot be imported, or is not there.
    """
    module_name, _, attribute = entry.target.partition(":")
    try:
        if entry.is_builtin:
            _make_importable(module_name.partition(".")[0])
        return getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        hint = "install llmkit again, as its README says" if entry.is_builtin else f"update or uninstall {entry.origin}"
        message = f"plugin {entry.name} ({entry.origin}) cannot be loaded: {type(error).__name__}: {error}"
        raise PluginError(message, hint=hint) from error


def loaded(group: str, kind: type[T]) -> Mapping[str, T]:
    """The objects of a group that are of a kind, by name; those of other distributions that cannot be loaded are left
    out: `llmkit doctor` names them.

    Raises:
        PluginError: one of llmkit's own cannot be loaded.
    """
    return {name: each for name, each in _loaded(entries(group)).items() if isinstance(each, kind)}


@cache
def _loaded(registered: tuple[EntryPoint, ...]) -> Mapping[str, Any]:
    objects = {}
    for entry in registered:
        try:
            objects[entry.name] = load(entry)
        except PluginError:
            if entry.is_builtin:
                raise
    return objects


def by_name(group: str, name: str, what: str, kind: type[T]) -> T:
    """The object of the entry `name` of a group.

    Args:
        what: the option that names it, for messages (`--method`).
        kind: what it has to be.

    Raises:
        InputError: no such entry.
        PluginError: two distributions register the name, it cannot be loaded, or is something else.
    """
    matches = [e for e in entries(group) if e.name == name]
    if len(matches) > 1:
        owners = " and ".join(e.origin for e in matches)
        raise PluginError(f"{what} {name} is registered by {owners}", hint="uninstall one of them")
    if not matches:
        names = sorted({e.name for e in entries(group)})
        guess = nearest(name, names)
        hint = f"did you mean {what} {guess}?" if guess else f"{what} {names[0]}" if names else None
        raise InputError(f"{what} {name!r} is unknown; expected {', '.join(names)}", hint=hint)
    loaded = load(matches[0])
    if not isinstance(loaded, kind):
        raise PluginError(
            f"{what} {name}: {matches[0].target} is a {type(loaded).__name__}, expected a {kind.__name__}"
        )
    return loaded


def _of_checkout(group: str) -> list[EntryPoint]:
    """The built-in entries of the checkout this module lies in; none when it is installed."""
    listed = _groups_of_checkout().get(group, {})
    return [EntryPoint(name, target, str(_HOME), True) for name, target in sorted(listed.items())]


@cache
def _groups_of_checkout() -> dict[str, dict[str, str]]:
    project = _HOME / "pyproject.toml"
    if not project.is_file() or not (_HOME / "plugins" / "__init__.py").is_file():
        return {}
    table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
    groups: dict[str, dict[str, str]] = table.get("entry-points", {}) if table.get("name") == "llmkit" else {}
    return groups


def _make_importable(package: str) -> None:
    """In a checkout that is not installed, `llmkit_plugins` is the folder `plugins`."""
    if package in sys.modules or importlib.util.find_spec(package) is not None:
        return
    init = _HOME / "plugins" / "__init__.py"
    spec = importlib.util.spec_from_file_location(package, init, submodule_search_locations=[str(init.parent)])
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    spec.loader.exec_module(module)
