"""Nobody outside plugins/ branches on a family's name.

Families may be named where people read (docstrings, messages, examples) and where releases are data (delta profiles,
prompt formats). They may not be named by code: not in an identifier, and not in a string that something is compared
with, looked up by, or matched against.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "llmkit"
FAMILIES = "llama|vicuna|chatglm|bloom|baichuan|falcon|rwkv|gpt2|gpt_neox|gptj|qwen|gemma|mistral|opt|stablelm|phi"
IN_TEXT = re.compile(rf"\b(?:{FAMILIES})\d?(?=For[A-Z]|Model|\b)", re.IGNORECASE)
IN_IDENTIFIER = re.compile(rf"(?:^|_)(?:{FAMILIES})(?:_|$)", re.IGNORECASE)
# The published name of a RoPE scaling method is the value of `rope_type`, whatever the family that uses it.
METHODS = {"llama3"}
# Releases and formats as data: published delta recipes, and the adapter files of one published project.
DATA = {"transforms/delta/profiles.py", "architecture/prompts.py", "formats/adapter_other.py"}
MATCHERS = {"startswith", "endswith", "removeprefix", "removesuffix", "get", "index", "count", "match", "fullmatch",
            "search", "fnmatch", "fnmatchcase"}  # fmt: skip


def strings(node: ast.AST):
    return (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def deciding(tree: ast.AST):
    """The strings that decide something, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.MatchValue):
            places = [node]
        elif isinstance(node, ast.Set):
            places = node.elts
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            places = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MATCHERS:
            places = node.args
        else:
            continue
        for place in places:
            yield from ((text, node.lineno) for text in strings(place))


def identifiers(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno


def offences(source: str) -> list[str]:
    tree = ast.parse(source)
    found = [f"{n}: {t!r}" for t, n in deciding(tree) if t not in METHODS and IN_TEXT.search(t)]
    return found + [f"{n}: {t}" for t, n in identifiers(tree) if IN_IDENTIFIER.search(t)]


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if str(p.relative_to(PACKAGE)) not in DATA],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_no_branch_on_a_family(path):
    assert offences(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "if config['model_type'] == 'llama': pass",
        "x = name in ('BloomForCausalLM', 'other')",
        "name.startswith('qwen2')",
        "TABLE['gpt2']",
        "KNOWN = frozenset({'gemma', 'other'})",
        "def read_llama(): pass",
        "is_falcon = True",
        "match name:\n    case 'rwkv': pass",
    ],
)
def test_the_rule_bites(source):
    assert offences(source)


def test_the_rule_lets_people_read():
    assert offences('"""As LLaMA does."""\nraise ValueError("a llama checkpoint")\nx == "option"\noptions = 1') == []
