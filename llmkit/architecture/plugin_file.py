"""Plugins that are files, not installed: `--plugin FILE` and the variable LLMKIT_PLUGINS."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from llmkit.architecture.architecture import Architecture
from llmkit.errors import PluginError
from llmkit.formats.paths import expanded
from llmkit.formats.unreadable import no_file

VARIABLE = "LLMKIT_PLUGINS"
"""Plugin files, separated as the folders of PATH are."""


def given_files() -> tuple[Path, ...]:
    """The plugin files that the environment names."""
    return tuple(expanded(p) for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p)


def architectures_in(path: Path) -> dict[str, Architecture]:
    """Import a plugin file: attribute -> architecture.

    Raises:
        PluginError: it cannot be imported, or holds none.
    """
    if not path.is_file():
        raise PluginError(
            no_file(path),
            hint="llmkit plugins new MODEL -o FILE.py drafts one; llmkit plugins list shows those that have a name",
        )
    module_name = f"llmkit_plugin_file_{path.stem}_{abs(hash(path.resolve())):x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is no Python module (expected NAME.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise PluginError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    architectures = {k: v for k, v in vars(module).items() if isinstance(v, Architecture)}
    if not architectures:
        raise PluginError(f"{path} holds no Architecture", hint="llmkit plugins new MODEL -o FILE drafts one")
    return architectures
