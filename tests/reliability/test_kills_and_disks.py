"""A few of the kill points and full disks, in a process of their own (it forks, which threads of others forbid)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the shim reads /proc")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("kills", "--command", "to hf --dtype|f16", "--every", "14"),
        ("disks", "--command", "quantize", "--count", "6", "--real", "1"),
    ],
    ids=("kills", "disks"),
)
def test_a_short_run_finds_nothing(words):
    module, *options = words
    line = [sys.executable, "-m", f"tests.reliability.{module}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"0 bad of (\d+)", done.stdout)
    assert found is not None
    assert int(found[1]) >= 7


def test_the_shim_sees_what_is_done(tmp_path):
    """Its counting is what the kill points stand on."""
    code = """
import os, sys
from pathlib import Path
from tests.reliability.shim import Shim
root = Path(sys.argv[1])
shim = Shim(root, log=root.parent / "log")
shim.install()
(root / "a").mkdir()
fd = os.open(root / "a/file", os.O_WRONLY | os.O_CREAT)
os.write(fd, b"x"); os.fsync(fd); os.close(fd)
(root / "text").write_text("y")
(root / "text").rename(root / "renamed")
from llmkit.pipeline.rename import rename_new
rename_new(root / "renamed", root / "new")
import shutil
shutil.rmtree(root / "a")
(root.parent / "elsewhere").mkdir()
(root / "new").read_text()
"""
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run([sys.executable, "-c", code, str(root)], cwd=ROOT, check=True)
    assert (tmp_path / "log").read_text().splitlines() == [
        "mkdir a", "open a/file", "write a/file", "fsync a/file", "close a/file", "open text", "rename renamed",
        "renameat2 new", "unlink a/file", "rmdir a",
    ]  # fmt: skip
