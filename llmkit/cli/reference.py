"""Generates the parts of the documentation that follow from the code: `python -m llmkit.cli.reference [--check]`.

The command reference, made from the help texts, and the table of families.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

_WIDTH = "100"
_REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
COMMANDS, FAMILIES = _REFERENCE / "commands.md", _REFERENCE / "families.md"


def command_paths() -> list[tuple[str, ...]]:
    """Every command, groups before their members, in the order of `--help`."""
    from typer.main import get_command

    from llmkit.cli.app import app

    return list(_walk(get_command(app), ()))


def _walk(group: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in getattr(group, "commands", {}).items():
        yield from _walk(inner, (*path, name))


def help_text(path: Sequence[str]) -> str:
    """What `llmkit PATH --help` prints, at a fixed width."""
    from llmkit.cli.app import main as run

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _WIDTH
    try:
        with redirect_stdout(StringIO()) as printed:
            run([*path, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def render() -> str:
    """The reference as markdown."""
    parts = []
    for path in command_paths():
        title = " ".join(["llmkit", *path])
        parts.append(f"## `{title}`\n\n```text\n{help_text(path)}\n```\n")
    return "\n".join(parts)


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a generated part."""
    return f"<!-- {name} -->", f"<!-- end {name} -->"


def replaced(page: str, text: str, name: str = "reference") -> str:
    """A page with the text between a pair of markers replaced; they are added at the end where there are none."""
    begin, end = markers(name)
    head, marker, rest = page.partition(begin)
    if not marker:
        head, rest = page.rstrip("\n") + "\n\n", ""
    tail = rest.partition(end)[2] or "\n"
    return f"{head}{begin}\n\n{text}\n{end}{tail}"


def main(args: Sequence[str]) -> int:
    """Write both, or with `--check` report whether they are up to date."""
    from llmkit.cli.families import families

    stale = []
    for path, name, make in ((COMMANDS, "reference", render), (FAMILIES, "families", families)):
        page = path.read_text(encoding="utf-8")
        fresh = replaced(page, make(), name)
        if page != fresh:
            stale.append(path.name)
            if "--check" not in args:
                path.write_text(fresh, encoding="utf-8")
    if stale and "--check" in args:
        sys.stderr.write(f"error: docs/reference: {', '.join(stale)} stale\nhint: python -m llmkit.cli.reference\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
