"""A short run of changed inputs; the long one is a command of its own (see `mutations`)."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

from tests.reliability.mutators import mutate

ROOT = Path(__file__).resolve().parents[2]  # a process of its own: it forks, which threads of others forbid


def test_a_short_run_finds_nothing() -> None:
    line = [sys.executable, "-m", "tests.reliability.mutations", "--short"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-2000:]
    assert re.search(r"exit 2: \d\d", made.stdout)
    assert re.search(r"exit 0: \d\d", made.stdout)
    assert made.stdout.splitlines()[-1].startswith("0 bad of 120 ")


def test_changes_follow_the_seed(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"a": [1, 2, {"b": "c"}], "d": 5}))
        (folder / "model.bin").write_bytes(bytes(range(256)))
        words = mutate(folder, random.Random(3), folder)
        made.append((words, sorted((p.name, p.read_bytes()) for p in folder.iterdir())))
    assert made[0] == made[1]
