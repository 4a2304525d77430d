"""The registry of architecture plugins: entry points of the group `llmkit.architectures`, loaded when needed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.model import Model
from llmkit.architecture.plugin_file import VARIABLE, architectures_in, given_files
from llmkit.entry_points import EntryPoint, entries
from llmkit.entry_points import load as load_entry
from llmkit.errors import PluginError, RequirementError
from llmkit.formats.unreadable import no_file

GROUP = "llmkit.architectures"
DRAFT = "llmkit plugins new MODEL -o FILE.py drafts a plugin, which --plugin FILE.py gives to this command"
"""The hint where no plugin describes a model."""


@dataclass(frozen=True, slots=True)
class Plugin(EntryPoint):
    """An entry point that promises an architecture.

    Attributes:
        is_given: a file that the user named; it goes before what is installed.
    """

    is_given: bool = False


class Registry:
    """Finds the architecture of a config among plugins.

    Built-in plugins are loaded only when their name occurs in the config's, or when nothing else is found; plugins of
    other distributions are always loaded, so that a clash between two cannot go unseen.
    """

    def __init__(self, plugins: Iterable[Plugin], given: Mapping[Plugin, Architecture] | None = None) -> None:
        self.plugins = (*(given or {}), *plugins)
        self._loaded: dict[Plugin, Architecture | PluginError] = dict(given or {})

    def load(self, plugin: Plugin) -> Architecture:
        """The architecture of a plugin; a failure is remembered.

        Raises:
            PluginError: it cannot be imported, or is not an `Architecture`.
        """
        if plugin not in self._loaded:
            self._loaded[plugin] = _load(plugin)
        loaded = self._loaded[plugin]
        if isinstance(loaded, PluginError):
            raise loaded
        return loaded

    def find(self, config: Mapping[str, Any]) -> Architecture | None:
        """The architecture that claims a config, by `architectures`, or by `model_type` where that is missing.

        Raises:
            PluginError: two plugins claim it, or the only plugin of that name cannot be loaded.
        """
        wanted = _wanted(config)
        if not wanted:
            return None
        hinted = [p for p in self.plugins if not p.is_builtin or any(_folded(p.name) in w for w in wanted)]
        given = [p for p in self.plugins if p.is_given]
        for candidates in (given, hinted, list(self.plugins)):
            claimants = self._claimants(candidates, config)
            if len(claimants) > 1:
                names = " and ".join(f"{p.name} ({p.origin})" for p, _ in claimants)
                raise PluginError(
                    f"two plugins claim {', '.join(claims(config))}: {names}",
                    hint="uninstall one of them; `llmkit plugins list` shows all",
                )
            if claimants:
                return claimants[0][1]
        self._raise_failure(wanted)
        return None

    def _claimants(self, plugins: Iterable[Plugin], config: Mapping[str, Any]) -> list[tuple[Plugin, Architecture]]:
        claimants = []
        for plugin in plugins:
            try:
                architecture = self.load(plugin)
            except PluginError:
                continue  # kept in `failures`; another plugin may serve
            if is_claimed(architecture, config):
                claimants.append((plugin, architecture))
        return claimants

    def _raise_failure(self, wanted: list[str]) -> None:
        for plugin, loaded in self._loaded.items():
            if isinstance(loaded, PluginError) and any(_folded(plugin.name) in w for w in wanted):
                raise loaded

    def load_all(self) -> dict[Plugin, Architecture | PluginError]:
        """Every plugin with its architecture, or the error that it failed with."""
        for plugin in self.plugins:
            if plugin not in self._loaded:
                self._loaded[plugin] = _load(plugin)
        return {plugin: self._loaded[plugin] for plugin in self.plugins}

    def clashes(self) -> list[str]:
        """Names claimed by two plugins, in words; loads all. Releases that a `when` tells apart do not clash."""
        owners: dict[str, str] = {}
        clashes = []
        for plugin, loaded in self.load_all().items():
            if isinstance(loaded, PluginError) or loaded.when is not None or plugin.is_given:
                continue
            for claim in (*loaded.matches, *(f"model_type {m}" for m in loaded.model_types)):
                other = owners.setdefault(_folded(claim), f"{plugin.name} ({plugin.origin})")
                if other != f"{plugin.name} ({plugin.origin})":
                    clashes.append(f"{claim} is claimed by {other} and {plugin.name} ({plugin.origin})")
        return clashes


def default_registry() -> Registry:
    """The registry of everything installed, of the checkout that llmkit runs from, and of the files the user named.

    Raises:
        PluginError: a named file holds no plugin.
    """
    return _registry(given_files())


@cache
def _registry(files: tuple[Path, ...]) -> Registry:
    unique = [Plugin(e.name, e.target, e.origin, e.is_builtin) for e in entries(GROUP)]
    return Registry(unique, {plugin: a for file in files for plugin, a in plugins_in(file).items()})


def plugins_in(file: Path) -> dict[Plugin, Architecture]:
    """The architectures of a plugin file, as the registry has those that are installed.

    Raises:
        PluginError: it cannot be imported, or holds none.
    """
    architectures = architectures_in(file)
    return {Plugin(a.name, f"{file}:{name}", str(file), is_given=True): a for name, a in architectures.items()}


@contextmanager
def using(files: Sequence[Path]) -> Iterator[None]:
    """Add plugin files to those of the environment: threads and child processes have them, too.

    Raises:
        PluginError: one of them is not there, or is no plugin.
    """
    for file in files:
        if not file.is_file():
            raise PluginError(f"--plugin {no_file(file)}", hint="llmkit plugins new MODEL -o FILE.py drafts one")
    before = os.environ.get(VARIABLE)
    if files:
        os.environ[VARIABLE] = os.pathsep.join([*map(str, files), *([before] if before else [])])
    try:
        if files:
            default_registry()  # a file that is no plugin is refused before the work
        yield
    finally:
        if files:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def find(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture that claims a config among all installed plugins, or None."""
    return default_registry().find(config)


def require(config: Mapping[str, Any], label: str) -> Architecture:
    """The architecture that claims a config.

    Raises:
        RequirementError: no plugin describes it.
    """
    architecture = find(config)
    if architecture is None:
        names = ", ".join(claims(config)) or "nothing (config.json names no architecture)"
        raise RequirementError(
            f"{label}: no plugin describes its architecture: {names}",
            hint="llmkit plugins new MODEL -o FILE.py drafts one for --plugin; `llmkit plugins list` shows others",
        )
    return architecture


def require_model(config: Mapping[str, Any], label: str) -> Model:
    """The model that a config describes.

    Raises:
        RequirementError: no plugin describes it.
        SpecError: the config lacks a key or contradicts itself.
    """
    return require(config, label).bind(config)


def claims(config: Mapping[str, Any]) -> list[str]:
    """What a config calls its architecture, in words: its `architectures`, else its `model_type`; empty for neither."""
    stated = config.get("architectures")
    if isinstance(stated, list) and stated:
        return [str(a) for a in stated]
    return [f"model_type {config['model_type']}"] if config.get("model_type") else []


def _wanted(config: Mapping[str, Any]) -> list[str]:
    words = [*claims(config), str(config.get("model_type") or "")]
    return [_folded(w) for w in words if w]


def model_type_of(config: Mapping[str, Any]) -> str:
    """The `model_type` of a config; empty where there is none or it is no text, as no class has it."""
    stated = config.get("model_type")
    return stated if isinstance(stated, str) else ""


def is_claimed(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """True when the architecture is the one that a config states."""
    return _is_named(architecture, config) and (architecture.when is None or architecture.when(config))


def _is_named(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    stated = config.get("architectures")
    if isinstance(stated, list) and stated:
        matches = [_folded(name) for m in architecture.matches for name in (m, _HEADED.sub("Model", m))]
        return not isinstance(config.get("text_config"), Mapping) and any(_folded(str(a)) in matches for a in stated)
    model_type = config.get("model_type")
    return bool(model_type) and _folded(str(model_type)) in [_folded(m) for m in architecture.model_types]


# A class with a head, and transformers' name for the same model without it.
_HEADED = re.compile(r"(ForCausalLM|LMHeadModel)$")


@lru_cache(4096)
def _folded(text: str) -> str:
    """Lower case without punctuation: 2023 files write `LLaMAForCausalLM`."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _load(plugin: Plugin) -> Architecture | PluginError:
    try:
        loaded = load_entry(plugin)
    except PluginError as error:
        return error
    if not isinstance(loaded, Architecture):
        where = f"plugin {plugin.name} ({plugin.origin})"
        return PluginError(f"{where}: {plugin.target} is a {type(loaded).__name__}, expected an Architecture")
    return loaded
