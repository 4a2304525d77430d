"""The fields of a JSON object from outside, each of the type that its reader needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from llmkit.errors import InputError
from llmkit.formats.json_text import as_object

_T = TypeVar("_T")
_Check = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
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

    def count(self, key: str, *default: int) -> int:
        """A whole number that is not negative."""
        return int(self._take(key, _is_count, "a count", default))

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
