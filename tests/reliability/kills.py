"""kill -9 at every file-system operation of every writing command, with and without --overwrite.

    python -m tests.reliability.kills [--command PATTERN] [--every N] [-v]

Each command is run once undisturbed. Then, for each operation that it did, it is killed just before it (and writes once
more after half of their bytes), and the same command is run again. What must hold: OUT is at no time half an output;
with --overwrite it is at all times the old or the new one; the rerun ends with exit 0 (or finds that OUT is whole);
OUT has then the bytes of the undisturbed run; nothing else is left beside it; the inputs are as they were.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.reliability.world import Command, World, snapshot

__all__ = ["killed", "main", "problems"]

_JOURNAL = ".journal.jsonl"


def killed(
    world: World, command: Command, *, overwrite: bool, every: int = 1, first: int = 1
) -> Iterator[tuple[str, list[str]]]:
    """(the operation, what was wrong) for each kill point of a command."""
    world.reset(command, overwrite=overwrite)
    out = world.trial / command.out
    old = snapshot(out)
    whole = world.run(command, overwrite=overwrite)
    if whole.code != 0:
        yield "undisturbed", [f"exit {whole.code}: {whole.text.strip()[-300:]}"]
        return
    new = snapshot(out)
    inputs = snapshot(world.inputs)
    for at, operation in enumerate(whole.operations, 1):
        if (at - first) % every:
            continue
        for is_torn in (False, True) if "write" in operation.split()[0] else (False,):
            world.reset(command, overwrite=overwrite)
            ended = world.run(command, at, overwrite=overwrite, is_torn=is_torn)
            wrong = []
            if ended.code != -9:
                wrong.append(f"not killed: exit {ended.code}")
            wrong += problems(world, command, old, new, overwrite=overwrite)
            if snapshot(world.inputs) != inputs:
                wrong.append("inputs changed")
            yield f"{at} {operation}{' (half)' * is_torn}", wrong


def problems(
    world: World, command: Command, old: dict[str, bytes], new: dict[str, bytes], *, overwrite: bool
) -> Iterator[str]:
    """What is wrong with the trial after a disturbed run, and after the same command is run again."""
    out = world.trial / command.out
    found = snapshot(out)
    found.pop(_JOURNAL, None)
    if found not in ({}, old, new) or (overwrite and not found):
        yield f"OUT is neither what was there nor what it should be: {sorted(found)}"
    was_whole = found == new
    again = world.run(command, overwrite=overwrite)
    if again.code != 0 and not (was_whole and again.code == 2 and "already exists" in again.text):
        yield f"rerun: exit {again.code}: {again.text.strip()[-300:]}"
    if (found := snapshot(out)) != new:
        differ = sorted(k for k in found.keys() | new.keys() if found.get(k) != new.get(k))
        yield f"rerun: other bytes than those of an undisturbed run: {differ}"
    left = sorted(p.name for p in world.trial.iterdir() if p.name != command.out)
    if left:
        yield f"left beside OUT: {left}"


def main(argv: list[str] | None = None) -> int:
    """Run all and report; 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--command", default="", help="only commands that this pattern is found in")
    parser.add_argument("--every", type=int, default=1, help="only every n-th operation")
    parser.add_argument("--first", type=int, default=1, help="with --every: the first of them")
    parser.add_argument("--short", action="store_true", help="a few points of each command")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each command")
    options = parser.parse_args(argv)
    every = 9 if options.short else options.every
    started, n_points, bad = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        world = World(Path(folder) / "world")
        for command in world.commands(with_eval=not options.short):
            if not re.search(options.command, command.name):
                continue
            for overwrite in (False, True) if command.can_overwrite else (False,):
                points = list(killed(world, command, overwrite=overwrite, every=every, first=options.first))
                wrongs = [(at, wrong) for at, wrong in points if wrong]
                n_points, bad = n_points + len(points), bad + len(wrongs)
                label = command.name + " --overwrite" * overwrite
                if options.verbose or wrongs:
                    print(f"{len(points):>4} kill points, {len(wrongs)} bad: {label}", flush=True)
                for at, wrong in wrongs[:3]:
                    print(f"       {at}: {'; '.join(wrong)}", flush=True)
    print(f"kills: {bad} bad of {n_points} kill points, {time.monotonic() - started:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
