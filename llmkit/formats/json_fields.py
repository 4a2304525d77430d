"""The fields of a JSON object from outside, each of the type that its reader needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llmkit.errors import InputError
from llmkit.formats.json_text import as_object

_T = TypeVar("_T")
_MAX_ERROR = 1e9  # so that its square has a float
_Check = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether a value of JSON is a whole number that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True, slots=True)
class Fields:
    """An object and where it stands.

    Every method takes a key and, where the key may be absent or null, what stands for it then.

    Attributes:
        body: the object.
        where: the file and the keys that lead here, for errors.
    """

    body: Mapping[str, Any]
    where: str

    def text(self, key: str, *default: str) -> str:
        """A string."""
        value: str = self._take(key, lambda v: isinstance(v, str), "text", default)
        return value

    def number(self, key: str, *default: float) -> float:
        """A number; not true or false."""
        return float(self._take(key, is_number, "a number", default))

    def optional_number(self, key: str) -> float | None:
        """A number, or None where it is absent or null."""
        return None if self.body.get(key) is None else self.number(key)

    def error_of_mean(self, key: str) -> float | None:
        """A standard error, or None where it is absent or null."""
        value = self.optional_number(key)
        if value is not None and not 0 <= value <= _MAX_ERROR:
            raise InputError(f"{self.where}: {key}: expected a standard error, found {value:.6g}")
        return value

    def count(self, key: str, *default: int) -> int:
        """A whole number that is not negative."""
        return int(self._take(key, is_count, "a count", default))

    def array(self, key: str, *default: list[Any]) -> list[Any]:
        """An array."""
        value: list[Any] = self._take(key, lambda v: isinstance(v, list), "an array", default)
        return value

    def texts(self, key: str, *default: list[str]) -> list[str]:
        """An array of strings."""
        value: list[str] = self._take(
            key, lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v), "an array of texts", default
        )
        return value

    def choice(self, key: str, choices: Sequence[str], *default: str) -> str:
        """One of some strings."""
        value = self.text(key, *default)
        if value not in choices:
            raise InputError(f"{self.where}: {key}: expected {' or '.join(choices)}, found {value[:40]!r}")
        return value

    def arrays(self, key: str, check: Callable[[Any], bool], expected: str) -> dict[str, list[Any]]:
        """The members of an object, each of which is an array of what `check` tells; {} where it is absent or null."""
        outer = self.object(key, {})
        found = {name: outer.array(name) for name in outer.body}
        if not all(check(item) for items in found.values() for item in items):
            raise InputError(f"{outer.where}: expected arrays of {expected}")
        return found

    def object(self, key: str, *default: Mapping[str, Any]) -> Fields:
        """An object."""
        found = self._take(key, lambda v: isinstance(v, Mapping), "an object", default)
        return Fields(found, f"{self.where}: {key}")

    def objects(self, key: str, *default: Mapping[str, Any]) -> Iterator[tuple[str, Fields]]:
        """The members of an object, each of which is an object."""
        outer = self.object(key, *default)
        for name, value in outer.body.items():
            where = f"{outer.where}.{name}"
            yield name, Fields(as_object(value, where), where)

    def _take(self, key: str, check: _Check, expected: str, default: tuple[_T, ...]) -> Any:
        value = self.body.get(key)
        if value is None and default:
            return default[0]
        if not check(value):
            found = "nothing" if key not in self.body else repr(value)[:40]
            raise InputError(f"{self.where}: {key}: expected {expected}, found {found}")
        return value
