"""Every command that a message of llmkit's names is one: its words, and its options."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import llmkit
from llmkit.cli.app import app

FOLDER = Path(llmkit.__file__).parent
ROOT = typer.main.get_command(app)


def texts(tree: ast.AST) -> Iterator[str]:
    """The strings of a module without its docstrings; what is filled in is X."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in docs or id(node) in parts:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def named() -> list[tuple[str, str]]:
    """Each command that a string begins with or quotes, with the file."""
    found = {}
    sources = {path: path.read_text() for path in sorted(FOLDER.rglob("*.py"))}
    for path, source in sources.items():
        for text in texts(ast.parse(source)) if re.search("llmkit [a-z]", source) else ():
            quoted = re.findall(r"`(llmkit [^`]*)`", text)
            for line in quoted or ([text.partition(";")[0]] if re.match(r"llmkit [a-z]", text) else []):
                found[line] = str(path.relative_to(FOLDER))
    return list(found.items())


NAMED = named()


def test_there_are_some():
    assert len(NAMED) > 60


@pytest.mark.parametrize(("line", "file"), NAMED, ids=lambda text: text[:60])
def test_a_named_command_is_one(line, file):
    node, words = ROOT, line.split()[1:]
    while hasattr(node, "commands"):
        if words[:1] == ["COMMAND"] or words[0].startswith("-"):
            break
        two = " ".join(words[:2])
        name = two if two in node.commands else words[0]
        assert name in node.commands, f"{file}: {line}"
        node, words = node.commands[name], words[len(name.split()) :]
    known = {flag for parameter in node.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    given = {match[1] for word in words if (match := re.match(r"[(\[]?(--?[a-z][a-z-]*)", word))}
    assert given <= known | {"--help"}, f"{file}: {line}"
    needed = [p.opts for p in node.params if p.required and p.param_type_name == "option"]
    if "-o" in given:  # it can be copied
        assert all(given.intersection(flags) for flags in needed), f"{file}: {line}"
