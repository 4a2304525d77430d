"""`llmkit_delta.json`: how a delta made by llmkit is applied, and how its base is recognised."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import MARKER_NAME
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.manifest import load_manifest, node_of
from llmkit.errors import InputError
from llmkit.formats.json_text import parse_object
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import DType
from llmkit.transforms.delta.profiles import is_buffer

MARKER_FORMAT = 1


@dataclass(frozen=True)
class Marker:
    """The contents of `llmkit_delta.json`.

    Attributes:
        dtype: dtype of the tuned model's float tensors, but for those in `dtypes`.
        dtypes: name -> dtype where it is another.
        copied: names stored as full values.
        base_label: what the base was called.
        base_specs: digest of the base's names, dtypes and shapes (the content is in the delta's manifest).
        base_n_tensors: how many tensors it had.
    """

    dtype: DType
    base_label: str
    base_specs: str
    base_n_tensors: int
    dtypes: Mapping[str, DType] = field(default_factory=dict)
    copied: tuple[str, ...] = ()

    def dtype_of(self, name: str) -> DType:
        """The dtype that the result has under `name`."""
        return self.dtypes.get(name, self.dtype)

    def file(self) -> FileContent:
        """The file that goes with the delta."""
        body = {
            "format": MARKER_FORMAT,
            "arithmetic": "ulp",
            "dtype": self.dtype.name,
            "dtypes": {name: dtype.name for name, dtype in self.dtypes.items()},
            "copied": list(self.copied),
            "base": {"label": self.base_label, "specs": self.base_specs, "tensors": self.base_n_tensors},
        }
        return FileContent.of_json(body)

    @classmethod
    def of(cls, delta: Checkpoint) -> Marker:
        """The marker of a delta.

        Raises:
            InputError: there is none, it is malformed, or a later version wrote it.
        """
        if MARKER_NAME not in delta.files:
            raise InputError(
                f"{delta.label} has no {MARKER_NAME}: it is no delta of profile llmkit",
                hint="leave --profile out, or name the convention it was published in",
            )
        where = f"{delta.label}/{MARKER_NAME}"
        try:
            body = parse_object(delta.files[MARKER_NAME].read(), where)
            if (body["format"], body["arithmetic"]) != (MARKER_FORMAT, "ulp"):
                raise InputError(
                    f"{where}: format {body['format']}, arithmetic {body['arithmetic']!r}; "
                    f"expected {MARKER_FORMAT} and 'ulp'",
                    hint="a later llmkit made this delta: upgrade",
                )
            base = body["base"]
            return cls(
                DType[body["dtype"]],
                str(base["label"]),
                str(base["specs"]),
                int(base["tensors"]),
                {str(k): DType[v] for k, v in body["dtypes"].items()},
                tuple(map(str, body["copied"])),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where} is malformed: {error!r}", hint="fetch the delta again") from error


def specs_digest(tensors: Mapping[str, Lazy]) -> str:
    """SHA-256 over the sorted names, dtypes and shapes; rotary tables, which no reader needs, do not count."""
    return _digest(tensors, [name for name in tensors if not is_buffer(name)])


def is_of_specs(tensors: Mapping[str, Lazy], digest: str) -> bool:
    """Whether that is their digest; until llmkit 0.2 rotary tables counted, too."""
    return digest in (specs_digest(tensors), _digest(tensors, list(tensors)))


def _digest(tensors: Mapping[str, Lazy], names: list[str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {tensors[name].spec}" for name in sorted(names)).encode()).hexdigest()


def recorded_hashes(delta: Checkpoint) -> dict[str, str]:
    """Name -> XXH3 of the base's tensor, as noted when the delta was made; empty where no manifest is beside it."""
    if delta.origin is None or not delta.origin.is_dir():
        return {}
    try:
        manifest = load_manifest(delta.origin)
    except InputError:
        return {}
    hashes = {str(entry["path"]): entry.get("tensors", {}) for entry in manifest.get("inputs", ())}
    recorded: dict[str, str] = {}
    for name, tensor in manifest.get("tensors", {}).items():
        first = _base_read(manifest, tensor["from"])
        digest = None if first is None else hashes.get(str(first["file"]), {}).get(first["tensor"])
        if digest is not None:
            recorded[name] = digest
    return recorded


def is_recorded_base(base: Checkpoint, delta: Checkpoint) -> bool:
    """Whether the manifests say so: `base` was written with the tensors that the delta was made from."""
    recorded = recorded_hashes(delta)
    try:
        written = load_manifest(base.origin)["tensors"] if recorded and base.origin is not None else {}
    except InputError:
        return False
    return bool(recorded) and all(written.get(n, {}).get("xxh3") == digest for n, digest in recorded.items())


def _base_read(manifest: Mapping[str, Any], reference: Any) -> dict[str, Any] | None:
    """The base's part of `ulp_subtract(base, tuned)`, when it is a plain read."""
    expression = node_of(manifest, reference)
    if expression["op"] != "ulp_subtract" or not expression.get("inputs"):
        return None
    first = node_of(manifest, expression["inputs"][0])
    return first if first["op"] == "read" and "file" in first and "tensor" in first else None
