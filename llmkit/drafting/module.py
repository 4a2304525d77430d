"""Plugin files: the architectures in one, and drafts that are written and at once read back and compared."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.drafting.draft import make_draft
from llmkit.drafting.record import Draft
from llmkit.drafting.text import plugin_text
from llmkit.errors import LlmkitError, PluginError
from llmkit.tensors.spec import TensorSpec

__all__ = ["architectures_in", "draft_plugin"]


def draft_plugin(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any], *, name: str, label: str
) -> tuple[str, Draft, list[str]]:
    """The text of a plugin, what it was made of, and what of the checkpoint it does not fit.

    Where the core's kinds do not give the tensors, the draft has a kind of its own that names and shapes them.

    Raises:
        InputError: the names do not tell enough.
    """
    draft = make_draft(specs, config, label)
    text = plugin_text(draft, name)
    problems = _problems(text, specs, config)
    if problems and draft.is_plain:
        reason = f"as a block of llmkit's kinds it does not fit: {problems[0]}"
        draft = make_draft(specs, config, label, is_plain=False)
        draft.special.insert(0, reason)
        text = plugin_text(draft, name)
        problems = _problems(text, specs, config)
    return text, draft, problems


def _problems(text: str, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> list[str]:
    module = ModuleType("llmkit_draft")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(text, "<draft>", "exec"), module.__dict__)  # `plugin_text` wrote it a moment ago
        return list(module.ARCHITECTURE.bind(dict(config)).check(specs).problems)
    except LlmkitError as error:
        return [error.message]
    finally:
        del sys.modules[module.__name__]


def architectures_in(path: Path) -> dict[str, Architecture]:
    """Import a plugin file: attribute -> architecture.

    Raises:
        PluginError: it cannot be imported, or holds none.
    """
    if not path.is_file():
        raise PluginError(f"{path}: no such file", hint="llmkit plugins list shows the plugins that have a name")
    module_name = f"llmkit_plugin_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is no Python module (expected NAME.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise PluginError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    found = {k: v for k, v in vars(module).items() if isinstance(v, Architecture)}
    if not found:
        raise PluginError(f"{path} holds no Architecture", hint="llmkit plugins new MODEL -o FILE drafts one")
    return found
