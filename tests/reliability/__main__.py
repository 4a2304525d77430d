"""Every check of this folder in one go, with one report at the end.

    python -m tests.reliability [--short] [NAME ...]

Each module here with a `main` is a part, and a command of its own; `--short` is handed to those that know it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

_FOLDER = Path(__file__).parent


def parts() -> dict[str, str]:
    """Name -> text of the modules that are commands."""
    texts = {p.stem: p.read_text(encoding="utf-8") for p in sorted(_FOLDER.glob("*.py")) if p.stem != "__main__"}
    return {n: t for n, t in texts.items() if re.search(r'^if __name__ == "__main__":', t, re.M)}


def main(argv: list[str] | None = None) -> int:
    """Run them one after the other; 1 when one of them found something."""
    known = parts()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="*", metavar="NAME", help="only these parts")
    parser.add_argument("--short", action="store_true", help="a minute rather than hours")
    options = parser.parse_args(argv)
    lines = []
    for name in options.name or known:
        print(f"== {name}", flush=True)
        short = ["--short"] if options.short and "--short" in known[name] else []
        started, last = time.monotonic(), ""
        command = [sys.executable, "-m", f"tests.reliability.{name}", *short]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with subprocess.Popen(
            command, cwd=_FOLDER.parents[1], env=environment, stdout=subprocess.PIPE, text=True
        ) as run:
            for line in run.stdout or ():
                print(line, end="", flush=True)
                last = line.strip() or last
        lines.append((name, run.returncode, time.monotonic() - started, last))
    print("\n== report")
    for name, code, seconds, last in lines:
        print(f"{'right' if code == 0 else 'WRONG':<6} {name:<24} {seconds:>6.0f} s  {last}")
    return int(any(code for _, code, _, _ in lines))


if __name__ == "__main__":
    sys.exit(main())
