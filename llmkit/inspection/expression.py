"""The expression that made a tensor, from the manifest, followed through the inputs that llmkit made too."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.manifest import load_manifest, node_of
from llmkit.errors import InputError, LlmkitError, listing, suggestion

_MAX_DEPTH = 10


def explain(folder: Path, tensor: str) -> dict[str, Any]:
    """How one tensor of an output folder was made: `{"op": …, parameters, "spec": …, "inputs": […]}`.

    A read from a folder that has a manifest of its own gets that folder's expression as its input. `tensor` is a name
    in the files, or one that the folder opens with (`inspect --tensors`), where that is one tensor of the files.

    Raises:
        InputError: no manifest, or no such tensor (the nearest name is in the hint).
    """
    manifest = load_manifest(folder)
    if tensor not in manifest["tensors"]:
        tensor = _stored_name(folder, tensor, manifest["tensors"])
    entry = manifest["tensors"].get(tensor)
    if not manifest["tensors"]:
        step = manifest["recipe"][-1].get("transform", "a run") if manifest["recipe"] else "a run"
        raise InputError(
            f"{folder} was written file by file ({step}): its manifest describes files, no tensors",
            hint=f"llmkit inspect {folder} --tensors",
        )
    if entry is None:
        module = tensor.removesuffix("weight")
        parts = [name for name in manifest["tensors"] if name.startswith(module) and name != f"{module}bias"]
        if module.endswith(".") and len(parts) > 1:
            raise InputError(
                f"{folder} has {tensor} in a quantized layout, as {listing(parts, 4)}",
                hint=f"llmkit explain {folder} {parts[0]}",
            )
        raise InputError(
            f"{folder} has no tensor {tensor!r}",
            hint=suggestion(tensor, manifest["tensors"], f"llmkit inspect {folder} --tensors"),
        )
    return {
        "tensor": tensor,
        "file": entry["file"],
        "dtype": entry["dtype"],
        "shape": entry["shape"],
        "xxh3": entry["xxh3"],
        "recipe": manifest["recipe"],
        "from": _followed(manifest, entry["from"], {}, _MAX_DEPTH),
    }


def _stored_name(folder: Path, tensor: str, stored: Container[str]) -> str:
    """What the files call a tensor that the folder opens with under another name; the name itself, where they do not.

    Raises:
        InputError: the files hold it in parts.
    """
    try:
        lazy = open_checkpoint(folder).tensors.get(tensor)
    except LlmkitError:
        return tensor
    reads = [] if lazy is None else lazy.reads()  # where a model is in several files, their names come first
    keys = [key for read in reads for key in (read.name, f"{read.source.path.name}/{read.name}")]
    parts = [key for key in keys if key in stored]
    if len(parts) > 1:
        raise InputError(
            f"{folder} holds {tensor} in parts, {listing(parts, 4)}", hint=f"llmkit explain {folder} {parts[0]}"
        )
    return parts[0] if parts else tensor


def _followed(
    manifest: Mapping[str, Any], reference: Any, manifests: dict[Path, Mapping[str, Any] | None], depth: int
) -> dict[str, Any]:
    """An expression of a manifest with its inputs within it, and below a read what that tensor was made from."""
    node = node_of(manifest, reference)
    if node["op"] == "read" and depth and "file" in node:
        other = _manifest_beside(Path(node["file"]), manifests)
        entry = other["tensors"].get(node.get("tensor")) if other is not None else None
        if other is not None and entry is not None:
            node["inputs"] = [_followed(other, entry["from"], manifests, depth - 1)]
    elif "inputs" in node:
        node["inputs"] = [_followed(manifest, i, manifests, depth) for i in node["inputs"]]
    return node


def _manifest_beside(file: Path, manifests: dict[Path, Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    folder = file.parent
    if folder not in manifests:
        try:
            manifests[folder] = load_manifest(folder)
        except InputError:
            manifests[folder] = None
    return manifests[folder]


def tree_lines(node: Mapping[str, Any]) -> list[str]:
    """An expression as a tree, one node a line."""
    inner = {k: v for k, v in node.items() if k not in ("op", "inputs", "spec")}
    if node["op"] == "read":
        words = f"{inner.pop('tensor', '')} of {inner.pop('file', '')}"
    else:
        words = ", ".join(f"{k}={v}" for k, v in inner.items() if v is not None)
    lines = [f"{node['op']} {words}".rstrip() + f"  → {node.get('spec', '')}"]
    inputs = node.get("inputs", ())
    for i, child in enumerate(inputs):
        is_last = i == len(inputs) - 1
        first, *rest = tree_lines(child)
        lines.append(("└─ " if is_last else "├─ ") + first)
        lines += [("   " if is_last else "│  ") + line for line in rest]
    return lines
