"""What a wheel holds: every module and every file that the packages read, as git has them."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"llmkit": "llmkit", "plugins": "llmkit_plugins", "evalsets": "llmkit_evalsets"}


@pytest.mark.slow
def test_a_wheel_holds_what_the_tree_holds(tmp_path):
    listed = subprocess.run(["git", "ls-files", "-z", *PACKAGES], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.split("\0") if name]
    source = tmp_path / "source"  # a copy: a build leaves folders behind
    for name in [*names, "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    top = {name: name.partition("/") for name in names}
    assert held == {f"{PACKAGES[first]}/{rest}" for first, _, rest in top.values()}
