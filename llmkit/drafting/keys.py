"""The keys of a config that has its own words for what a plugin reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.keys import REQUIRED, Computed, Key, as_key, lookup, source_of
from llmkit.architecture.kinds import PerLayer
from llmkit.errors import SpecError

_PARTS = ("dims", "embedding", "block", "final_norm", "head")
_CLOSE = 0.75  # how like a known spelling an unknown key must be, where its value does not tell


@dataclass
class Config:
    """A config, and what is found out about its keys.

    Attributes:
        values: the config.
        known: name of a size, or of a field of a kind -> spellings that plugins have for it.
        changes: path of a field (`block.norm.eps`) -> what it reads here instead of what the plugin does.
        renamed: a plugin's spelling -> the key that stands for it here.
        checks: path of a field -> what is not known of it.
        n_assumed: fields of kinds that are not at their default although the config does not say so.
    """

    values: Mapping[str, Any]
    known: Mapping[str, list[str]]
    changes: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    n_assumed: int = 0

    def adapted(self, like: Architecture, sizes: dict[str, int]) -> dict[str, Any]:
        """The sizes and kinds of an architecture with the keys of this config; `sizes` are those of the headers."""
        for path, default, value in fields_of(like):
            name = path.rpartition(".")[2]
            if path.startswith("dims."):
                self._size(name, value, sizes)
            elif not isinstance(value, Key):
                self.n_assumed += self._is_assumed(default, value)
            elif source_of(value, self.values) is None and value.spellings:
                self._unstated(path, value, default, like.tiny)
        if isinstance(like.block, PerLayer):  # what every layer has to have; the rest follows from other keys
            first = replace(like, block=like.block.of(self.values, 0))
            needed = [(d, v) for path, d, v in fields_of(first) if path.startswith("block.") and d is MISSING]
            self.n_assumed += sum(self._is_assumed(default, value) for default, value in needed)
        return {part: _changed(getattr(like, part), part, self.changes) for part in _PARTS}

    def _is_assumed(self, default: Any, value: Any) -> bool:
        """Whether a field is not at its default although the config does not say so."""
        if not isinstance(value, Key):
            return not is_dataclass(value) and default not in (value, MISSING)
        is_stated = source_of(value, self.values) is not None or not value.spellings
        return not is_stated and default not in (value, value.names, value.default)

    def heads(self, like: Dims) -> int:
        """The number of heads, which no shape tells: by its name alone; 1 where no key is like it."""
        value = self._value(as_key(like.heads)) or self.values.get(self._nearest("heads", None)[0] or "")
        return value if isinstance(value, int) and value > 0 else 1

    def _size(self, name: str, key: Any, sizes: dict[str, int]) -> None:
        """The key of a size: the plugin's where its value is that of the headers, else the nearest with that value."""
        derived = {"kv_heads": sizes["heads"], "head_dim": sizes["hidden"] // sizes["heads"]}.get(name)
        size, value = sizes.get(name), self._value(key)
        if name == "extra" or (value is not None and size is None) or size == (value or derived):
            return
        near, likeness = self._nearest(name, size)
        if near is not None:
            self.changes[f"dims.{name}"] = Key(near, None) if name in ("kv_heads", "head_dim", "context") else Key(near)
            self.renamed[next(iter(key.spellings), name)] = near
            if likeness < 1:
                self.checks[f"dims.{name}"] = "told by its name" if size is None else f"told by its value, {size}"
        elif size in (derived, None):
            self.changes[f"dims.{name}"] = DERIVED
        else:
            self.changes[f"dims.{name}"] = Key((), size)
            self.checks[f"dims.{name}"] = f"no key of config.json is {size}"

    def _nearest(self, name: str, value: int | None) -> tuple[str | None, float]:
        """The key most like the known spellings of a size, of those that hold a value, and how like it is."""
        numbers = {k: v for k, v in self.values.items() if isinstance(v, int) and not isinstance(v, bool)}
        free = [k for k, v in numbers.items() if value in (v, None) and k not in self.renamed.values()]
        spellings = self.known.get(name, [name])
        likeness, key = max(((max(_likeness(k, s) for s in spellings), k) for k in free), default=(0.0, ""))
        least = _CLOSE if value is None else 0.5 if name in ("kv_heads", "head_dim") else 0.0
        return (key, likeness) if key and likeness >= least else (None, likeness)

    def _unstated(self, path: str, key: Key, default: Any, tiny: Mapping[str, Any]) -> None:
        """A kind's field whose key is not here: another plugin's spelling of it, or a required value as in `tiny`."""
        spellings = self.known.get(path.rpartition(".")[2], [])
        other = next((s for s in spellings if source_of(Key(s), self.values) is not None), None)
        if other is not None:
            self.changes[path], self.renamed[key.spellings[0]] = Key(other, key.default), other
        elif key.default is REQUIRED:
            self.changes[path] = lookup(key, tiny)
        if other is None and self._is_assumed(default, key):
            self.n_assumed += 1
            self.checks[path] = "not in config.json: as that plugin has it"

    def _value(self, key: Any) -> Any:
        with suppress(SpecError, KeyError, TypeError):
            return lookup(key, self.values) if isinstance(key, Key | Computed) else key
        return None


def fields_of(architecture: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """The fields of an architecture's sizes and kinds: path (`block.norm.eps`), default, and value, with its `Key`."""
    parts = [(part, getattr(architecture, part)) for part in _PARTS]
    for path, part in parts:  # which grows
        for f in fields(part) if _is_kind(part) else ():
            value = getattr(part, f.name)
            value = as_key(value) if isinstance(part, Dims) or f.name in getattr(part, "string_keys", ()) else value
            parts.append((f"{path}.{f.name}", value))
            yield f"{path}.{f.name}", f.default, value


def _changed(part: Any, path: str, changes: Mapping[str, Any]) -> Any:
    """Sizes or a kind with other values at some paths."""
    if path in changes or not _is_kind(part):
        return changes.get(path, part)
    return replace(part, **{f.name: _changed(getattr(part, f.name), f"{path}.{f.name}", changes) for f in fields(part)})


def _is_kind(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type | Key | Computed)


@cache
def _likeness(key: str, known: str) -> float:
    one, other = (re.sub(r"[^a-z0-9]", "", re.sub(r"^(n|num)_", "", w.lower()).replace("kv", "keyvalue"))
                  for w in (key, known))  # fmt: skip
    return SequenceMatcher(None, one, other).ratio()
