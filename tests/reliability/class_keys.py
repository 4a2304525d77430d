"""Which keys of a config the class of a family reads, by the source of its modeling file."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import transformers

from reliability.against_transformers import PLUGINS, described

__all__ = ["keys_read"]

_ALL = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_CONFIGS = ("config", "text_config")
_OF_OTHER_INPUTS = re.compile("Vision|Audio|MultiModal|Multimodal")  # classes for images and sounds


@cache
def keys_read(name: str, models: Path | None = None) -> dict[str, str]:
    """Key -> `file:line` where the class of a family reads it, or a class or function that it uses.

    Args:
        models: the folder `models` of another release; that of the installed one by default. What it has no file for
            reads nothing.
    """
    theirs = described(PLUGINS[name], PLUGINS[name].tiny_config())
    assert theirs is not None
    known = [n for n in theirs.get("architectures") or () if hasattr(transformers, n)]
    root = known[0] if known else _ALL[theirs["model_type"]]
    path = Path(inspect.getsourcefile(getattr(transformers, root)) or "")
    path = models / path.parent.name / path.name if models else path
    return dict(_reads(path, root)) if path.exists() else {}


def _reads(path: Path, root: str) -> Iterator[tuple[str, str]]:
    defined: dict[str, ast.AST] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    seen, left = set(), [root]
    while left:
        name = left.pop()
        if name in seen or name not in defined or _OF_OTHER_INPUTS.search(name):
            continue
        seen.add(name)
        for node in ast.walk(defined[name]):
            if isinstance(node, ast.Name):
                left.append(node.id)
            key = _key(node)
            if key is not None:
                yield key, f"{path.name}:{node.lineno}"


def _key(node: ast.AST) -> str | None:
    """The key that an expression takes from a config: `config.key`, or `getattr(config, "key", …)`."""
    if isinstance(node, ast.Attribute) and _is_config(node.value):
        return node.attr
    is_asked = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
    if is_asked and _is_config(node.args[0]) and isinstance(node.args[1], ast.Constant):
        return str(node.args[1].value)
    return None


def _is_config(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in _CONFIGS
    return isinstance(node, ast.Attribute) and node.attr in _CONFIGS
