"""config.json as an object of the class that the installed transformers has for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.registry import model_type_of
from llmkit.errors import SpecError, in_a_line

_SHOWN = 300  # characters of what a class says


def is_known_class(config: Mapping[str, Any]) -> bool:
    """Whether the installed transformers has a class for the config's `model_type`."""
    import transformers

    return model_type_of(config) in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES


def class_config(config: Mapping[str, Any], label: str) -> Any:
    """The config as its class has it, read as that reads config.json itself: infinities are objects.

    Args:
        config: with a `model_type` that transformers knows.
        label: the model, for messages.

    Raises:
        SpecError: the class does not take its values.
    """
    import transformers

    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[config["model_type"]]
    stated = {k: _with_infinities(v) for k, v in config.items() if k != "architectures"}
    try:
        return kind.from_dict(stated)
    except Exception as error:
        raise SpecError(
            f"{label}: transformers' {kind.__name__} does not take config.json: {first_line(error)}",
            hint="config.json must be the one these weights were saved with",
        ) from error


def first_line(error: Exception) -> str:
    """What a class says, on one line."""
    return f"{type(error).__name__}: {in_a_line(error)}"[:_SHOWN]


def _with_infinities(value: Any) -> Any:
    """JSON has no infinities: transformers 5 writes {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {k: _with_infinities(v) for k, v in value.items()}
    return [_with_infinities(v) for v in value] if isinstance(value, list) else value
