"""A disk that is full at random operations of every writing command, and small disks that are really full.

    python -m tests.reliability.disks [--count 240] [--seed 0] [--short]

From a random operation on, everything that needs space is refused (ENOSPC; a write goes half through first). Where the
system lets a small file system be mounted (`unshare -rm`), commands also run on such ones of random sizes. What must
hold: exit 2 with a hint, or 0 where the output was whole; no traceback, no half of an output at OUT, with --overwrite
the old one or the new one there; when there is space again the same command ends with the bytes of an undisturbed run
and leaves nothing else; the inputs are as they were.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.reliability.kills import problems
from tests.reliability.shim import NEEDS_SPACE
from tests.reliability.world import Ended, World, snapshot

__all__ = ["main"]


def _wrong(ended: Ended) -> Iterator[str]:
    if ended.code not in (0, 2):
        yield f"exit {ended.code}: {ended.text.strip()[-300:]}"
    elif ended.code == 2 and not ("error: " in ended.text and "hint: " in ended.text):
        yield f"no error with a hint: {ended.text.strip()[-300:]}"
    if "Traceback" in ended.text:
        yield f"a traceback: {ended.text.strip()[-300:]}"


def full(world: World, count: int, seed: int, word: str, *, with_eval: bool) -> Iterator[tuple[str, list[str]]]:
    """(what was tried, what was wrong) for `count` random operations; each command gets its share."""
    rng = random.Random(seed)
    tries = [
        (command, overwrite)
        for command in world.commands(with_eval=with_eval)
        for overwrite in ((False, True) if command.can_overwrite else (False,))
        if word in command.name
    ]
    inputs = snapshot(world.inputs)
    for i, (command, overwrite) in enumerate(tries):
        share = count // len(tries) + (i < count % len(tries))
        if not share:
            continue
        world.reset(command, overwrite=overwrite)
        old = snapshot(world.trial / command.out)
        whole = world.run(command, overwrite=overwrite)
        assert whole.code == 0, f"{command.name}: {whole.text}"
        new = snapshot(world.trial / command.out)
        points = [at for at, o in enumerate(whole.operations, 1) if o.split()[0] in NEEDS_SPACE]
        for at in sorted(rng.sample(points, min(share, len(points)))):
            world.reset(command, overwrite=overwrite)
            ended = world.run(command, at, overwrite=overwrite, is_full=True)
            wrong = [*_wrong(ended), *problems(world, command, old, new, overwrite=overwrite)]
            if snapshot(world.inputs) != inputs:
                wrong.append("inputs changed")
            yield f"{command.name}{' --overwrite' * overwrite}, {at} {whole.operations[at - 1]}", wrong


_SMALL = r"""
mount -t tmpfs -o size=$SIZE tmpfs "$PLACE" || exit 99
cd "$PLACE" && "$@"; code=$?
if [ -e out ]; then [ $code -eq 0 ] || exit 98; fi
[ $code -eq 0 ] && exit 0
[ $code -eq 2 ] || exit $code
mount -o remount,size=64m "$PLACE" && "$@" > /dev/null 2>&1 || exit 97
[ "$(ls -A)" = out ] || exit 96
exit 2
"""


def small(world: World, count: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    """The same on real file systems, too small by a random amount, and larger at the second try."""
    rng = random.Random(seed)
    place = world.folder / "small"
    place.mkdir(exist_ok=True)
    llmkit = Path(sys.executable).with_name("llmkit")
    commands = [c for c in world.commands(with_eval=False) if c.out == "out"]
    for _ in range(count):
        command, kilobytes = rng.choice(commands), rng.randrange(8, 1200, 4)
        line = ["unshare", "-rm", "sh", "-c", _SMALL, "sh", str(llmkit), *command.line(overwrite=False)]
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "SIZE": f"{kilobytes}k",
            "PLACE": str(place),
            "HOME": str(world.folder),
            "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", ""),  # else torch is compiled each time
        }
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        ended = Ended(done.returncode, done.stdout + done.stderr, ())
        yield f"{command.name} on {kilobytes} kB", list(_wrong(ended))


def can_mount() -> bool:
    """Whether a small file system can be had."""
    if shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as place:
        line = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", place]
        return subprocess.run(line, capture_output=True, check=False).returncode == 0


def main(argv: list[str] | None = None) -> int:
    """Run all and report; 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=240, help="full disks under the shim")
    parser.add_argument("--real", type=int, default=24, help="real small disks")
    parser.add_argument("--command", default="", help="under the shim, only commands that contain this word")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="few of both")
    options = parser.parse_args(argv)
    count, real = (24, 2) if options.short else (options.count, options.real)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="disks-") as folder:
        world = World(Path(folder) / "world")
        found = list(full(world, count, options.seed, options.command, with_eval=not options.short))
        n_real = 0
        if can_mount():
            found += small(world, real, options.seed)
            n_real = real
    bad = [(what, wrong) for what, wrong in found if wrong]
    for what, wrong in bad[:20]:
        print(f"bad: {what}: {'; '.join(wrong)}", flush=True)
    kinds = ", ".join(f"{n} {kind}" for kind, n in _counted(what for what, _ in found if re.search(r", \d+ ", what)))
    print(f"operations that found it full: {kinds}")
    print(
        f"disks: {len(bad)} bad of {len(found)} full disks ({n_real} of them real), "
        f"{time.monotonic() - started:.0f} s, seed {options.seed}"
    )
    return int(bool(bad))


def _counted(found: Iterator[str]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for what in found:
        kind = re.findall(r", \d+ (\w+)", what)[-1]
        counts[kind] = counts.get(kind, 0) + 1
    return sorted(counts.items())


if __name__ == "__main__":
    sys.exit(main())
