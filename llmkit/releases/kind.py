"""Which kind of coded release a path is, by names and first bytes."""

from __future__ import annotations

import re
from pathlib import Path

from llmkit.formats import safetensors, torch_pickle
from llmkit.formats.folder import INDEX_NAMES, is_weight_file
from llmkit.formats.unreadable import read_head

XORED, ENCRYPTED = "xor", "enc"
GZIP = b"\x1f\x8b\x08"
_SHARD = re.compile(r"consolidated\.\d\d\.pth")


def release_kind(path: Path) -> str | None:
    """`xor`, `enc`, or None for a plain checkpoint and whatever else."""
    if path.is_file():
        return ENCRYPTED if path.suffix == ".enc" else None
    if not path.is_dir():
        return None
    names = sorted(p.name for p in path.iterdir() if p.is_file())
    if any(n.endswith(".enc") for n in names):
        return ENCRYPTED
    weights = [n for n in names if is_weight_file(n) and n not in INDEX_NAMES]
    return XORED if any(_is_xored(read_head(path / n)) for n in weights) else None


def _is_xored(head: bytes) -> bool:
    """Two files of one format agree in their first bytes, so their exclusive or begins with zeros."""
    if safetensors.looks_like(head) or torch_pickle.looks_like(head) or head[8:9] == b"{":  # a header in clear
        return False
    return head[:4] == bytes(4) or head[:3] == GZIP or (len(head) >= 9 and head[4:9] == bytes(5))


def has_clear_config(path: Path) -> bool:
    """Whether a folder's config.json is not coded, as all files of a release are: weights of zeros are damaged then."""
    config = path / "config.json"
    return config.is_file() and read_head(config).lstrip()[:1] == b"{"


def command_for(kind: str, base: str, release: str) -> str:
    """The command that decodes a release, as a hint."""
    if kind == XORED:
        return f"llmkit delta xor {base} {release} -o OUT"
    folder = Path(base)
    shards = sorted(p.name for p in folder.iterdir() if _SHARD.fullmatch(p.name)) if folder.is_dir() else []
    key = f"{base}/{shards[0]}" if len(shards) == 1 else base if folder.is_file() else "KEY"
    return f"llmkit delta decrypt {key} {release} -o OUT"
