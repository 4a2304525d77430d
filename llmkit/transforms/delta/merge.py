"""Walks the union of the names of a base and a delta (or a tuned model) and makes one tensor of each pair."""

from __future__ import annotations

from typing import NamedTuple

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import SpecError, listing
from llmkit.tensors.alike import Alike
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import DType
from llmkit.transforms.delta.arithmetic import combined, extended, overlapped, ulp_added, ulp_dtype, ulp_subtracted
from llmkit.transforms.delta.base_structure import bound_model
from llmkit.transforms.delta.detect import main_dtype
from llmkit.transforms.delta.marker import Marker, specs_digest
from llmkit.transforms.delta.profiles import NewRows, Profile, Rule, is_buffer


class _How(NamedTuple):
    """`base + other` (sign 1) or `other - base` (-1), in one dtype; the result in another."""

    sign: int
    arithmetic: DType
    output: DType


class Merge:
    """One pairing of a base with a delta, or with the tuned model of which a delta is made.

    Attributes:
        notes: what was decided on the way.
        warnings: what was forced.
    """

    def __init__(self, base: Checkpoint, other: Checkpoint, dtype: DType | None, force: bool) -> None:
        self.base = base
        self.other = other
        self.dtype = dtype
        self.force = force
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._combined = Alike(
            lambda left, right, how: {"sum": combined(how.sign, left, right, how.arithmetic, how.output)}
        )
        self._sums: dict[tuple[Rule, int, int], _How] = {}  # of two forms that are added in one shape

    def floats(self, profile: Profile) -> dict[str, Lazy]:
        """Base + delta by the profile's rules."""
        return self._walk(profile, +1)

    def differences(self, profile: Profile) -> dict[str, Lazy]:
        """Tuned - base by the profile's rules."""
        return self._walk(profile, -1)

    def _walk(self, profile: Profile, sign: int) -> dict[str, Lazy]:
        pairs = self._pairs(profile.base_prefix)
        self._sums.clear()
        tensors: dict[str, Lazy] = {}
        base_only, other_only = [], []
        for name, (base, other) in pairs.items():
            rule = profile.rule_for(name)
            if rule is Rule.SKIP:
                continue
            if other is None:
                if rule is not Rule.COPY:
                    base_only.append(name)
                continue
            if base is None and rule is not Rule.COPY:
                if profile.delta_only is None:
                    other_only.append(name)
                rule = Rule.COPY
            tensors[name] = self._one(name, profile, rule, base, other, sign)
        self._refuse_unmatched(profile, base_only, other_only)
        return tensors

    def _one(self, name: str, profile: Profile, rule: Rule, base: Lazy | None, other: Lazy, sign: int) -> Lazy:
        """What a name gets by its rule: a sum with `sign`, a sum in a part of it, or `other` as it is."""
        if base is None or rule is Rule.COPY:
            how = self._how(profile, base, other, sign)
            return other.cast(how.arithmetic).cast(how.output) if other.dtype.is_float else other
        forms = rule, base.spec.form, other.spec.form
        if (known := self._sums.get(forms)) is not None:
            return self._sum(base, other, known)
        if base.dtype.is_float != other.dtype.is_float:
            raise self._misfit(name, profile, base, other)
        if not other.dtype.is_float:
            return other
        how = self._how(profile, base, other, sign)
        if rule is not Rule.ADD:
            if len(base.shape) != len(other.shape) or any(a > b for a, b in zip(base.shape, other.shape, strict=True)):
                raise self._misfit(name, profile, base, other)
            return overlapped(sign if rule is Rule.OVERLAP_ADD else -sign, base, other, how.arithmetic, how.output)
        if base.shape == other.shape:
            self._sums[forms] = how
            return self._sum(base, other, how)
        return self._resized(name, profile, base, other, how)

    def _how(self, profile: Profile, base: Lazy | None, other: Lazy, sign: int) -> _How:
        """A difference is stored in the dtype of the sum, whatever the profile says of results."""
        arithmetic = profile.arithmetic_of(other.dtype, base.dtype if base is not None else None)
        stored = arithmetic if sign < 0 else profile.output or arithmetic
        return _How(sign, arithmetic, self.dtype or stored)

    def _sum(self, base: Lazy, other: Lazy, how: _How) -> Lazy:
        return self._combined(how, (base, other) if how.sign > 0 else (other, base), how)["sum"]

    def _resized(self, name: str, profile: Profile, base: Lazy, other: Lazy, how: _How) -> Lazy:
        """A sum of two shapes: the second's further rows are the profile's new rows, else its rule for other shapes."""
        n_new = other.spec.n_rows - base.spec.n_rows
        few = profile.max_new_rows is None or n_new <= profile.max_new_rows
        if base.shape[1:] == other.shape[1:] and n_new > 0 and few and profile.new_rows is not NewRows.NONE:
            if profile.new_rows is NewRows.RAW:
                return overlapped(how.sign, base, other, how.arithmetic, how.output)
            return self._sum(extended(base, other.spec.n_rows, profile.new_rows, how.arithmetic), other, how)
        if profile.other_shapes is Rule.COPY:
            return other.cast(how.output)
        raise self._misfit(name, profile, base, other)

    def _misfit(self, name: str, profile: Profile, base: Lazy, other: Lazy) -> SpecError:
        return SpecError(
            f"{name}: {self.base.label} has {base.spec}, {self.other.label} {other.spec}; "
            f"profile {profile.name} has no rule for that",
            hint="check that this is the base the delta was made from, or force another --profile",
        )

    def _refuse_unmatched(self, profile: Profile, base_only: list[str], other_only: list[str]) -> None:
        for names, has, lacks in ((base_only, self.base, self.other), (other_only, self.other, self.base)):
            if not names:
                continue
            message = f"{len(names)} tensors of {has.label} are not in {lacks.label}: {listing(names)}"
            if not self.force:
                hint = f"profile {profile.name} has no rule for them: check the base, or force another --profile"
                raise SpecError(message, hint=f"{hint}; --force takes the second model's and leaves out the base's")
            self.warnings.append(f"forced: {message}")

    def _pairs(self, prefix: str) -> dict[str, tuple[Lazy | None, Lazy | None]]:
        """Name in the second checkpoint -> (base's tensor, its tensor), without buffers, tied heads resolved."""
        base, other = _without_buffers(self.base), _without_buffers(self.other)
        n_dropped = len(self.base.tensors) - len(base) + len(self.other.tensors) - len(other)
        if n_dropped:
            self.notes.append(f"{n_dropped} rotary buffers are left out: every reader computes them")
        self._tie(base, other)
        if prefix and any(n.startswith(prefix) for n in other):
            base = {prefix + n: t for n, t in base.items()}
        names = [*other, *(n for n in base if n not in other)]
        return {n: (base.get(n), other.get(n)) for n in names}

    def _tie(self, base: dict[str, Lazy], other: dict[str, Lazy]) -> None:
        """Where one side ties its head and stores none: the other's is compared with the embedding, or left out."""
        for checkpoint, here, there in ((self.base, base, other), (self.other, other, base)):
            model = bound_model(checkpoint)
            if model is None or not model.is_tied:
                continue
            embedding = here.get(model.name_of("embed.weight"))
            for head in (s.name for s in model.slots.values() if s.kind == "head"):
                if head in here or head not in there or embedding is None:
                    continue
                if here is base:
                    here[head] = embedding
                    self.notes.append(f"{head}: {checkpoint.label} ties it, so its embedding is the base of it")
                else:
                    del there[head]
                    self.notes.append(f"{head} of the base is left out: {checkpoint.label} ties it to the embedding")

    def ulp_differences(self) -> tuple[dict[str, Lazy], Marker]:
        """Tuned - base in ulps, and the marker that says how to read it.

        Raises:
            SpecError: the two have no tensor in common.
        """
        tensors: dict[str, Lazy] = {}
        copied: list[str] = []
        main = main_dtype(self.other) or DType.F32
        dtypes: dict[str, DType] = {}
        dropped = []
        for name, (base, other) in self._pairs("").items():
            if other is None:
                dropped.append(name)
                continue
            if not self._is_comparable(base, other):
                tensors[name] = other
                copied.append(name)
                continue
            resized = extended(base, other.spec.n_rows, NewRows.ZERO, other.dtype) if base is not None else other
            tensors[name] = ulp_subtracted(other, resized)
            if other.dtype is not main:
                dtypes[name] = other.dtype
        if not any(name in self.base.tensors for name in tensors):
            raise SpecError(
                f"{self.other.label} has no tensor of {self.base.label}: it holds {listing(copied)}; "
                f"expected tensors such as {listing(dropped)}",
                hint="give the model that was tuned from the base, in the same layout",
            )
        self._note_odd(copied, dropped)
        origin = self.base
        marker = Marker(main, origin.label, specs_digest(origin.tensors), len(origin.tensors), dtypes, tuple(copied))
        return tensors, marker

    def _is_comparable(self, base: Lazy | None, other: Lazy) -> bool:
        if base is None or not (base.dtype.is_float and other.dtype.is_float):
            return False
        return len(base.shape) == len(other.shape) and base.shape[1:] == other.shape[1:] and len(base.shape) > 0

    def _note_odd(self, copied: list[str], dropped: list[str]) -> None:
        if copied:
            self.notes.append(f"{len(copied)} tensors are stored whole, the base has none alike: {listing(copied)}")
        if dropped:
            self.notes.append(f"{len(dropped)} tensors of the base are not in the tuned model: {listing(dropped)}")

    def ulps(self, marker: Marker) -> dict[str, Lazy]:
        """Base + delta in ulps."""
        tensors: dict[str, Lazy] = {}
        missing = []
        for name, (base, other) in self._pairs("").items():
            if other is None:
                continue
            if name in marker.copied:
                tensors[name] = other
            elif base is None:
                missing.append(name)
            else:
                dtype = marker.dtype_of(name)
                self._check_ulps(name, base, other, dtype)
                resized = extended(base, other.spec.n_rows, NewRows.ZERO, dtype)
                tensors[name] = ulp_added(resized, other, dtype)
            if name in tensors and self.dtype is not None and tensors[name].dtype.is_float:
                tensors[name] = tensors[name].cast(self.dtype)
        if missing:
            raise SpecError(
                f"{len(missing)} tensors that the delta changes are not in {self.base.label}: {listing(missing)}",
                hint=f"give {marker.base_label}, from which the delta was made",
            )
        return tensors

    def _check_ulps(self, name: str, base: Lazy, other: Lazy, dtype: DType) -> None:
        if other.dtype is not ulp_dtype(dtype) or base.shape[1:] != other.shape[1:]:
            raise SpecError(
                f"{name}: {self.other.label} has {other.spec}; expected {ulp_dtype(dtype).name} of the base's shape, "
                f"{base.spec}, as its llmkit.json says",
                hint="the delta's files are not of one delta: take them again from where it was published",
            )


def _without_buffers(checkpoint: Checkpoint) -> dict[str, Lazy]:
    return {name: lazy for name, lazy in checkpoint.tensors.items() if not is_buffer(name)}
