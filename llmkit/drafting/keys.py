"""The keys of a config that has its own words for what a plugin reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.keys import REQUIRED, Computed, Key, as_key, lookup, source_of
from llmkit.errors import SpecError

__all__ = ["PARTS", "Config", "keys_of"]

PARTS = ("embedding", "block", "final_norm", "head")
_CLOSE = 0.75  # how like a known spelling an unknown key must be, where its value does not tell


@dataclass
class Config:
    """A config, and what is found out about its keys.

    Attributes:
        values: the config.
        known: name of a size, or of a field of a kind -> spellings that plugins have for it.
        renamed: a plugin's spelling -> the key that stands for it here.
        checks: path of a field (`block.norm.eps`) -> what is not known of it.
        n_assumed: fields of kinds that are not at their default although the config does not say so.
    """

    values: Mapping[str, Any]
    known: Mapping[str, tuple[str, ...]]
    renamed: dict[str, str] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    n_assumed: int = 0

    def dims(self, like: Dims, sizes: dict[str, int]) -> Dims:
        """The keys of the sizes that the headers show; `sizes` gets the number of heads, which they do not."""
        changed: dict[str, Any] = {}
        derived = {"kv_heads": sizes["heads"], "head_dim": sizes["hidden"] // sizes["heads"]}
        for name in (f.name for f in fields(like) if f.name != "extra"):
            key, wanted = as_key(getattr(like, name)), sizes.get(name)
            value = self._value(key)
            if (value is not None and wanted is None) or wanted == (value or derived.get(name)):
                continue
            found, ratio = self.nearest(name, wanted)
            if found is None and wanted in (derived.get(name), None):
                changed[name] = DERIVED
            elif found is None:
                changed[name], self.checks[f"dims.{name}"] = Key((), wanted), f"no key of config.json is {wanted}"
            else:
                changed[name] = Key(found, None) if name in ("kv_heads", "head_dim", "context") else Key(found)
                self.renamed[next(iter(key.spellings), name)] = found
                if ratio < 1:
                    self.checks[f"dims.{name}"] = (
                        "told by its name" if wanted is None else f"told by its value, {wanted}"
                    )
        return replace(like, **changed)

    def heads(self, like: Dims) -> int:
        """The number of heads, which no shape tells: by its name alone; 1 where no key is like it."""
        value = self._value(as_key(like.heads)) or self.values.get(self.nearest("heads", None)[0] or "")
        return value if isinstance(value, int) and value > 0 else 1

    def nearest(self, name: str, value: int | None) -> tuple[str | None, float]:
        """The key most like the known spellings of a size, of those that hold a value, and how like it is."""
        numbers = {k: v for k, v in self.values.items() if isinstance(v, int) and not isinstance(v, bool)}
        used = self.renamed.values()
        free = [k for k, v in numbers.items() if v == (v if value is None else value) and k not in used]
        spellings = self.known.get(name, (name,))
        ratio, key = max(((max(_likeness(k, s) for s in spellings), k) for k in free), default=(0.0, ""))
        least = _CLOSE if value is None else 0.5 if name in ("kv_heads", "head_dim") else 0.0
        return (key, ratio) if key and ratio >= least else (None, ratio)

    def kind(self, kind: Any, path: str, tiny: Mapping[str, Any]) -> Any:
        """A kind with the keys that this config has for its fields; what it must state and does not is as in `tiny`."""
        if not is_dataclass(kind) or isinstance(kind, type | Computed):
            return kind
        changed = {}
        for f in fields(kind):
            value, where = getattr(kind, f.name), f"{path}.{f.name}"
            key = as_key(value) if f.name in getattr(kind, "string_keys", ()) else value
            if not isinstance(key, Key):
                changed[f.name] = self.kind(value, where, tiny)
                self.n_assumed += not is_dataclass(value) and f.default not in (value, MISSING)
                continue
            if source_of(key, self.values) is not None or not key.spellings:
                continue
            other = next((s for s in self.known.get(f.name, ()) if source_of(Key(s), self.values) is not None), None)
            if other is not None:
                changed[f.name], self.renamed[key.spellings[0]] = Key(other, key.default), other
            elif key.default is REQUIRED:
                changed[f.name] = lookup(key, tiny)
            if other is None and f.default not in (value, key.default):
                self.n_assumed += 1
                self.checks[where] = "not in config.json: as that plugin has it"
        return replace(kind, **changed)

    def _value(self, key: Any) -> Any:
        try:
            return lookup(key, self.values) if isinstance(key, Key | Computed) else key
        except (SpecError, KeyError, TypeError):
            return None


def keys_of(architecture: Architecture) -> Iterator[tuple[str, Key]]:
    """The keys of an architecture, by the name of the size or of the kind's field."""
    pending: list[Any] = [architecture.dims, *(getattr(architecture, part) for part in PARTS)]
    while pending:
        kind = pending.pop()
        for f in fields(kind) if is_dataclass(kind) else ():
            is_key = f.name in getattr(kind, "string_keys", ()) or isinstance(kind, Dims)
            value = as_key(getattr(kind, f.name)) if is_key else getattr(kind, f.name)
            if isinstance(value, Key):
                yield f.name, value
            elif not isinstance(value, type):
                pending.append(value)


@cache
def _likeness(key: str, known: str) -> float:
    one, other = (re.sub(r"[^a-z0-9]", "", re.sub(r"^(n|num)_", "", w.lower()).replace("kv", "keyvalue"))
                  for w in (key, known))  # fmt: skip
    return SequenceMatcher(None, one, other).ratio()
