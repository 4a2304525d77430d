"""Changed inputs for every reader: whatever a file holds, llmkit ends with a documented code, in time and memory.

    python -m tests.reliability.mutations --count 20000 --seed 0

Each input is a sound one of `seeds` with something changed by `mutators`, given to one command. It is bad when the
command ends with 3 or a signal, or with 1 where that is no answer; takes more than the seconds or the memory; prints a
control character; leaves something where OUT should not be; or changes its input. Number i of a seed is always the
same input: `--only i` runs it alone and shows what it says.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import selectors
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.mutators import mutate
from tests.reliability.seeds import COMMANDS, make_seeds

__all__ = ["Report", "run_mutations"]

SECONDS = 30.0  # of one input, on a machine that others use, too
MEMORY_NBYTES = 1_500_000_000  # above what a worker has when it starts
BATCH = 200
_ANSWERS = ("verify", "diff")  # their exit code 1 is an answer


@dataclass(frozen=True)
class Bad:
    """One input that did harm."""

    number: int
    what: str
    words: str
    change: str
    text: str


@dataclass(frozen=True)
class Report:
    """What a run found.

    Attributes:
        codes: exit code -> number of inputs.
        bad: inputs that broke the rule.
    """

    count: int
    codes: Counter[str]
    bad: tuple[Bad, ...]
    elapsed_s: float


def run_mutations(
    count: int,
    seed: int,
    *,
    workers: int = 2,
    first: int = 0,
    folder: Path | None = None,
    show: bool = False,
    kinds: Collection[str] = (),
) -> Report:
    """Run inputs `first` to `first + count` of a seed, of some kinds or of all."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmkit-mutations-", dir=folder) as name:
        work = Path(name)
        _in_child(lambda: make_seeds(work / "seeds", lambda words: _call(words)[0]))
        _import()
        batches = [range(i, min(i + BATCH, first + count)) for i in range(first, first + count, BATCH)]
        codes: Counter[str] = Counter()
        bad: list[Bad] = []
        for found in _watched(batches, seed, work, workers, sorted(kinds or COMMANDS)):
            codes[found.what] += 1
            if sum(codes.values()) % 1000 == 0:
                print(f"{sum(codes.values())} of {count}, {time.monotonic() - started:.0f} s", flush=True)
            if not found.what.startswith("exit") or show:
                bad.append(found)
                print(
                    f"#{found.number} {found.what}\n  llmkit {found.words}\n  {found.change}\n  {found.text}",
                    flush=True,
                )
    return Report(count, codes, tuple(bad), time.monotonic() - started)


def _import() -> None:
    """Everything once, before the forks."""
    import onnx
    import onnxruntime
    import torch
    import transformers.models.llama.modeling_llama

    import llmkit.cli.app
    import llmkit.evaluation.runner
    import llmkit.onnx.opening
    import llmkit.onnx.session

    torch.set_num_threads(1)
    _ = onnx, onnxruntime, transformers, llmkit


def _call(words: list[str]) -> tuple[int, str]:
    from llmkit.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue() + err.getvalue()


def _in_child(work) -> None:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the child must not go on as the parent
            import traceback

            traceback.print_exc()
        os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the seeds could not be made")


def _state(folder: Path) -> str:
    """A hash of names, kinds and contents."""
    digest = hashlib.blake2b()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode("utf-8", "surrogateescape"))
        mode = path.lstat().st_mode
        digest.update(str(mode >> 12).encode())
        if mode >> 12 == 0o10:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _one(number: int, seed: int, work: Path, home: Path, kinds: list[str]) -> Bad:
    """Make one input, run it, judge it."""
    rng = random.Random(f"{seed}/{number}")
    kind = rng.choice(kinds)
    seeds, x, out = work / "seeds", home / "x", home / "out"
    for path in (x, out):
        shutil.rmtree(path, ignore_errors=True)
    for path in home.glob("out*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    shutil.copytree(seeds / kind, x)
    change = f"{kind}: {mutate(x, rng, seeds)}"
    names = {
        "x": x,
        "out": out,
        "seeds": seeds,
        "base": seeds / "hf",
        "delta": seeds / "delta",
        "adapter": seeds / "adapter",
    }
    line = rng.choice(COMMANDS[kind])
    words = [w.format(**names, corpus=seeds / "texts/text.txt") for w in line.split()]
    if rng.random() < 0.1:
        words.append("--json")
    before = _state(x)
    started = time.monotonic()
    code, text = _call(words)
    seconds = time.monotonic() - started
    what = f"exit {code}"
    left = sorted(p.name for p in home.iterdir() if p.name.startswith("out"))
    if code not in (0, 1, 2) or (code == 1 and words[0] not in _ANSWERS):
        what = f"code {code}"
    elif code == 2 and "error" not in text:
        what = "silent"
    elif set(text) & {"\x1b", "\x07", "\x9b"} and words[0] != "generate":
        what = "control characters"
    elif _state(x) != before:
        what = "changed its input"
    elif left and (code != 0 or "--dry-run" in words):
        what = f"left {left}"
    elif seconds > SECONDS / 3:
        what = f"slow {seconds:.0f} s"
    return Bad(number, what, " ".join(words), change, " ".join(text.split())[-400:])


def _work(numbers: Iterable[int], seed: int, work: Path, home: Path, pipe: int, kinds: list[str]) -> None:
    silent = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(silent, fd)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(home / "tmp"), "LLMKIT_NO_PROGRESS": "1"}
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(home / "tmp")
    for number in numbers:
        os.write(pipe, f'{{"begin": {number}}}\n'.encode())
        try:
            found = _one(number, seed, work, home, kinds)
        except BaseException as error:  # noqa: BLE001 - a fault of this program
            found = Bad(number, f"broken {type(error).__name__}", "", "", str(error)[:300])
        os.write(pipe, json.dumps(vars(found)).encode() + b"\n")
    os._exit(0)


class _Worker:
    """A forked process with a batch of inputs, watched from outside."""

    def __init__(self, numbers: list[int], seed: int, work: Path, slot: int, kinds: list[str]) -> None:
        self.left, self.slot, self.buffer = numbers, slot, b""
        home = work / f"w{slot}"
        home.mkdir(exist_ok=True)
        self.pipe, end = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.pipe)
            os.setpgid(0, 0)
            _work(numbers, seed, work, home, end, kinds)
        os.close(end)
        self.began, self.current = time.monotonic(), numbers[0]
        self.base = self.resident()
        self.home = home

    def resident(self) -> int:
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        except (OSError, IndexError):
            return 0

    def lines(self) -> Iterator[dict]:
        *lines, self.buffer = (self.buffer + os.read(self.pipe, 1 << 16)).split(b"\n")
        yield from map(json.loads, lines)

    def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return self.close()

    def close(self) -> int:
        os.close(self.pipe)
        return os.waitpid(self.pid, 0)[1]


def _watched(batches: list[range], seed: int, work: Path, n_workers: int, kinds: list[str]) -> Iterator[Bad]:
    waiting = [list(b) for b in reversed(batches)]
    free = list(range(n_workers))
    running: list[_Worker] = []
    with selectors.DefaultSelector() as selector:
        while waiting or running:
            while waiting and free:
                worker = _Worker(waiting.pop(), seed, work, free.pop(), kinds)
                running.append(worker)
                selector.register(worker.pipe, selectors.EVENT_READ, worker)
            ready = {key.data for key, _ in selector.select(0.2)}
            for worker in list(running):
                what = None
                if worker in ready:
                    before = len(worker.left)
                    got = b""
                    for entry in worker.lines():
                        got = b"x"
                        if "begin" in entry:
                            worker.began, worker.current = time.monotonic(), entry["begin"]
                        else:
                            worker.left.remove(entry["number"])
                            yield Bad(**entry)
                    if not got and not worker.buffer and before == len(worker.left):
                        what = "ended"
                if what is None and time.monotonic() - worker.began > SECONDS:
                    what = f"hangs over {SECONDS:.0f} s"
                if what is None and worker.resident() - worker.base > MEMORY_NBYTES:
                    what = "memory"
                if what is None:
                    continue
                selector.unregister(worker.pipe)
                running.remove(worker)
                free.append(worker.slot)
                status = worker.kill()
                if worker.left:
                    if what == "ended":
                        what = f"signal {status & 127}" if status & 127 else f"code {status >> 8} of the process"
                    yield Bad(worker.current, what, f"(--only {worker.current} --seed {seed} shows it)", "", "")
                    worker.left.remove(worker.current)
                    if worker.left:
                        waiting.append(worker.left)


def main() -> int:
    """Run, print the report, and answer 1 where an input was bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--kind", action="append", choices=sorted(COMMANDS), help="only these: numbers are theirs")
    parser.add_argument("--short", action="store_true", help="120 inputs")
    options = parser.parse_args()
    if options.short:
        options.count = 120
    first, count = (options.first, options.count) if options.only is None else (options.only, 1)
    report = run_mutations(
        count,
        options.seed,
        workers=options.workers,
        first=first,
        show=options.only is not None,
        kinds=options.kind or (),
    )
    print(", ".join(f"{what}: {n}" for what, n in report.codes.most_common()))
    n_bad = sum(n for what, n in report.codes.items() if not what.startswith("exit"))
    of = f"{len(options.kind or COMMANDS)} kinds, seed {options.seed}, {report.elapsed_s:.0f} s"
    print(f"{n_bad} bad of {report.count} changed inputs of {of}")
    return int(n_bad > 0)


if __name__ == "__main__":
    sys.exit(main())
