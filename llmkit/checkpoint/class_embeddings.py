"""Embedding, head and what else is tied, by the class that the installed transformers has for a config.

For models that no plugin describes: their heads have names of their own (`cls.predictions.decoder`, `proj_out`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from llmkit.architecture.registry import model_type_of
from llmkit.checkpoint.class_config import class_config
from llmkit.checkpoint.spelling import spellings
from llmkit.errors import SpecError
from llmkit.lazy_imports import torch


def class_embeddings(
    config: Mapping[str, Any], stored: Collection[str]
) -> tuple[str, str | None, dict[str, str]] | None:
    """Names of embedding and head, and of every parameter that the class ties -> the stored one that it is tied to.

    The class is made without memory for its weights; tied is what is one parameter. None where transformers has no
    such class, cannot make it of this config, or names the embedding otherwise than the files.
    """
    model = _without_weights(config)
    if model is None:
        return None
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    output = model.get_output_embeddings()
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    names = groups.get(id(embedding), [])
    flag, embed = next(((name, n) for name in names for n in (name, *spellings(name)) if n in stored), (None, None))
    if embed is None:
        return None
    module = next((n for n, m in model.named_modules() if output is not None and m is output), None)
    head = f"{module}.weight" if module else None
    head = head and next((n for n in (head, *spellings(head)) if n in stored), head)
    shares: dict[str, str] = {}
    for key, group in groups.items():
        source = embed if key == id(embedding) else next((n for n in group if n in stored), None)
        shares |= {n: source for n in group if source is not None and n not in (flag, source)}
    return embed, head, shares


def _without_weights(config: Mapping[str, Any]) -> Any:
    stated = model_type_of(config)
    if not stated:
        return None
    import transformers

    if stated not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        return None
    logs = transformers.utils.logging
    verbosity = logs.get_verbosity()
    logs.set_verbosity_error()
    try:
        settings = class_config(config, "")
        named = [getattr(transformers, n, None) for n in config.get("architectures") or () if isinstance(n, str)]
        kind = next((c for c in named if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)), None)
        if kind is None:
            return None
        with torch.device("meta"):
            model = kind(settings)
        model.tie_weights()
    except (AttributeError, ImportError, KeyError, NotImplementedError, RuntimeError, SpecError, TypeError, ValueError):
        return None  # a config that this class does not take: names decide
    finally:
        logs.set_verbosity(verbosity)
    return model
