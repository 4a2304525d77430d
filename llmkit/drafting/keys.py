"""The keys of a foreign config, matched with the spellings that the plugins know."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

from llmkit.architecture.keys import REQUIRED, Key, as_key, lookup, source_of
from llmkit.drafting.known import likeness

__all__ = ["Keys"]

_CLOSE = 0.75  # how like a known spelling an unknown key must be, where its value does not tell


class Keys:
    """A config and which of its keys have been matched.

    Attributes:
        used: name of a size or field -> the key that holds it.
        checks: path of a field (`block.norm.eps`) -> what is not known of it.
        n_assumed: fields of kinds that are not at their default although the config does not say so.
    """

    def __init__(self, config: Mapping[str, Any], known: Mapping[str, tuple[str, ...]]) -> None:
        self.config, self._known = config, known
        self.used: dict[str, str] = {}
        self.checks: dict[str, str] = {}
        self.n_assumed = 0

    def of_size(self, name: str, value: int | None, *, least: float = 0.0) -> Key:
        """The key of a size: of those that hold `value` the one that is most like a known spelling.

        Args:
            value: what the shapes say; None where they say nothing: then the name alone tells.
            least: how like it must be.
        """
        whole = {k: v for k, v in self.config.items() if isinstance(v, int) and not isinstance(v, bool)}
        fitting = [k for k, v in whole.items() if value is None or v == value]
        key, ratio = self._nearest(name, fitting)
        if key is None or ratio < (_CLOSE if value is None else least):
            if value is not None:
                self.checks[f"dims.{name}"] = f"no key of config.json is {value}"
            return Key((), value)
        self.used[name] = key
        if ratio < 1:
            self.checks[f"dims.{name}"] = "told by its name" if value is None else f"told by its value, {value}"
        return Key(key)

    def in_kind(self, kind: Any, path: str, tiny: Mapping[str, Any]) -> Any:
        """A kind of a plugin with the keys that this config has for the values of its fields.

        Args:
            tiny: the plugin's config of a tiny model, for what this one does not state.
        """
        if not is_dataclass(kind) or isinstance(kind, type):
            return kind
        changes = {}
        for field in fields(kind):
            value, where = getattr(kind, field.name), f"{path}.{field.name}"
            if field.name in getattr(kind, "string_keys", ()):
                value = as_key(value)
            if isinstance(value, Key):
                changes[field.name] = self._of_field(field.name, value, where, tiny)
                is_usual = where in self.used or field.default in (value, value.default)
            else:
                changes[field.name] = self.in_kind(value, where, tiny)
                is_usual = is_dataclass(value) or field.default in (value, MISSING)
            if not is_usual:
                self.n_assumed += 1
                self.checks.setdefault(where, "not in config.json: as that plugin has it")
        return replace(kind, **changes)

    def _of_field(self, name: str, key: Key, where: str, tiny: Mapping[str, Any]) -> Any:
        if source_of(key, self.config) is not None:
            self.used[where] = str(source_of(key, self.config))
            return key
        other = next((s for s in self._known.get(name, ()) if source_of(Key(s), self.config) is not None), None)
        if other is None and isinstance(usual := lookup(Key(key.names, None), tiny) or key.default, float | str):
            alike = [k for k, v in self.config.items() if type(v) is type(usual) and usual != REQUIRED]
            near, ratio = self._nearest(name, alike)
            if near is not None and ratio >= _CLOSE:
                other = near
                self.checks[where] = "told by its name"
        if other is not None:
            self.used[where] = other
            return Key(other, key.default)
        if key.default is not REQUIRED:
            return key
        self.checks[where] = f"config.json has no {key.spellings[0]}"
        return lookup(key, tiny)

    def _nearest(self, name: str, candidates: Iterable[str]) -> tuple[str | None, float]:
        taken: Collection[str] = self.used.values()
        best = max(
            ((max((likeness(k, s) for s in self._known.get(name, (name,))), default=0.0), k) for k in candidates
             if k not in taken), default=(0.0, None), key=lambda pair: pair[0],
        )  # fmt: skip
        return best[1], best[0]
