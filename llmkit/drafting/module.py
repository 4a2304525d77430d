"""Drafts of plugins, written and at once read back and compared with what they were made of."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from llmkit.drafting.draft import make_draft
from llmkit.drafting.record import Draft
from llmkit.drafting.text import plugin_text
from llmkit.errors import LlmkitError
from llmkit.tensors.spec import TensorSpec

__all__ = ["draft_plugin"]


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
