"""Values that an architecture takes from config.json: which key, which spelling, which default."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from llmkit.errors import SpecError, nearest

REQUIRED = "<required>"
_SHOWN = 60  # characters of a value in a message
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Key:
    """A value read from config.json.

    Attributes:
        names: the spellings, tried in order; a dot goes into a nested object (`rope_parameters.rope_theta`).
            A key that is absent or null does not count.
        default: what holds when no spelling is there; `REQUIRED` makes that an error.
        null: what holds when one is there and null; None for the default.
    """

    names: tuple[str, ...] | str
    default: Any = REQUIRED
    null: Any = None

    def __repr__(self) -> str:
        return f"Key({self.names!r})" if self.default is REQUIRED else f"Key({self.names!r}, {self.default!r})"

    @property
    def spellings(self) -> tuple[str, ...]:
        """The spellings as a tuple."""
        return (self.names,) if isinstance(self.names, str) else self.names


@dataclass(frozen=True, slots=True)
class Computed:
    """A value, or a kind, that follows from several keys of config.json.

    Attributes:
        of: the function of the whole config; a kind that it returns is bound in its turn.
    """

    of: Callable[[Mapping[str, Any]], Any]

    @property
    def spellings(self) -> tuple[str, ...]:
        """For messages: it has no key of its own."""
        return ("(computed)",)

    def bind(self, config: Mapping[str, Any]) -> Any:
        """The value for one config."""
        value = self.of(config)
        return value.bind(config) if hasattr(value, "bind") else value


Number = float | str | Key | Computed  # a constant, the name of a required key, a Key, or computed from several
Flag = bool | str | Key | Computed


def as_key(value: Any) -> Any:
    """A bare string stands for a required key; everything else stays."""
    return Key(value) if isinstance(value, str) else value


def source_of(key: Key | Computed, config: Mapping[str, Any]) -> str | None:
    """The spelling under which `config` has the value, or None."""
    if isinstance(key, Computed):
        return None
    return next((name for name in key.spellings if _get(config, name) is not None), None)


def is_null(key: Key | Computed, config: Mapping[str, Any]) -> bool:
    """Whether `config` states null where it could have the value.

    The classes of transformers take their defaults where nothing is stated, not there: a flag is then false, a size
    follows from the others.
    """
    if isinstance(key, Computed) or source_of(key, config) is not None:
        return False
    return any(name in config for name in key.spellings)


def lookup(key: Key | Computed, config: Mapping[str, Any]) -> Any:
    """The value of `key` in `config`.

    Raises:
        SpecError: a required key is absent.
    """
    if isinstance(key, Computed):
        return key.bind(config)
    for other in key.spellings:
        _get(config, other)  # read, though another spelling may win
    name = source_of(key, config)
    if name is not None:
        return _get(config, name)
    if key.null is not None and is_null(key, config):
        return key.null
    if key.default is REQUIRED:
        raise absent(key.spellings[0], config)
    return key.default


def absent(key: str, config: Mapping[str, Any]) -> SpecError:
    """The error of a required key that `config` has not."""
    stated = [other for other, value in config.items() if not isinstance(value, bool)]  # flags have defaults
    if key in stated:
        return SpecError(
            f"config.json: {key} is null, and this architecture needs it", hint=f"state {key}, as published"
        )
    guess = nearest(key, stated)
    return SpecError(
        f"config.json has no {key!r}, which this architecture needs",
        hint=f"is {guess!r} meant? Otherwise add {key!r} to config.json" if guess else None,
    )


def respelled(
    config: Mapping[str, Any], of: str, model_type: str, names: Mapping[str, str] | None = None, **values: Any
) -> dict[str, Any]:
    """A config in the words of another class.

    Args:
        of: that class, as in `architectures`.
        names: keys that it calls otherwise, or "" for those that it has not.
        values: what it states besides.
    """
    names = names or {}
    renamed = {name: value for key, value in config.items() if (name := names.get(key, key))}
    return renamed | {"architectures": [of], "model_type": model_type} | values


def bind_fields(kind: T, config: Mapping[str, Any], string_keys: tuple[str, ...] = ()) -> T:
    """The same dataclass with every `Key` (and every string in the fields `string_keys`) replaced by its value.

    Fields that have a `bind(config)` of their own are bound by it.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = getattr(kind, field.name)
        if field.name in string_keys:
            value = as_key(value)
        if isinstance(value, Key):
            bound, where = lookup(value, config), source_of(value, config) or field.name
            if bound is True and field.name != "tied" and is_null(value, config):  # tying is read from the files
                bound = False
        elif hasattr(value, "bind"):
            bound, where = value.bind(config), field.name
        else:
            continue
        if bound is not None and field.type in _CHECKS and not hasattr(bound, "bind"):  # an activation may be a kind
            _CHECKS[field.type](bound, where)
        changes[field.name] = bound
    return dataclasses.replace(kind, **changes)  # type: ignore[type-var]


def as_float(value: Number, name: str = "") -> float:
    """The number of a bound field, or of the key `name`.

    Raises:
        SpecError: config.json holds something else there, an infinity among others.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise SpecError(_expected("a finite number", value, name))
    return float(value)


def as_optional(value: Number | None) -> float | None:
    """The number of a bound field that may have none.

    Raises:
        SpecError: config.json holds something else there.
    """
    return None if value is None else as_float(value)


def as_bool(value: Flag, name: str = "") -> bool:
    """The truth value of a bound field, or of the key `name`.

    Raises:
        SpecError: config.json holds something else there.
    """
    if not isinstance(value, bool | int):
        raise SpecError(_expected("true or false", value, name))
    return bool(value)


def as_text(value: Any, name: str = "") -> str:
    """The text of a bound field, or of the key `name`.

    Raises:
        SpecError: config.json holds something else there.
    """
    if not isinstance(value, str):
        raise SpecError(_expected("a text", value, name))
    return value


# What a bound field has to be, by its annotation.
_CHECKS: Mapping[Any, Callable[[Any, str], Any]] = {
    "Number": as_float, "Number | None": as_float, "Flag": as_bool, "str | Any": as_text, Number: as_float,
    Flag: as_bool,
}  # fmt: skip


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond floats
        return False


def _expected(what: str, value: Any, name: str) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return (
        f"config.json: {name} is {shown}, expected {what}"
        if name
        else (f"expected {what} in config.json, found {shown}")
    )


def _get(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value
