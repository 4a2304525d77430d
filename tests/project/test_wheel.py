"""The wheel: built without a warning, it holds what the tree holds, and runs where the checkout is not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"llmkit": "llmkit", "plugins": "llmkit_plugins", "evalsets": "llmkit_evalsets"}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def names() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z", *PACKAGES], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name]


@pytest.fixture(scope="module")
def wheel(names, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: a build leaves folders behind
    for name in [*names, "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder), str(source)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # setuptools warns of it
    done = subprocess.run(build, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # Of what pip says itself: folders of wheels that are not there.
    said = [line for line in (done.stdout + done.stderr).splitlines() if "WARNING: Location" not in line]
    assert [line for line in said if re.search("warning|deprecat", line, re.I)] == []
    (made,) = folder.glob("*.whl")
    return made


def test_it_holds_what_the_tree_holds(wheel, names):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    top = {name: name.partition("/") for name in names}
    assert held == {f"{PACKAGES[first]}/{rest}" for first, _, rest in top.values()}


def test_its_commands_run_in_another_folder(wheel, tmp_path):
    """`--target` puts it before the checkout's own installation, whose finder is asked last."""
    site, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for package in PACKAGES.values():
        where = run(sys.executable, "-c", f"import {package}; print({package}.__file__)")
        assert where.startswith(str(site)), package
    llmkit = str(site / "bin" / "llmkit")
    assert "problem" not in {finding["state"] for finding in json.loads(run(llmkit, "doctor", "--json"))["findings"]}
    base = site / "llmkit_evalsets" / "mini" / "base"
    found = json.loads(run(llmkit, "eval", str(base), "--bench", "mini", "--limit", "4", "--shots", "0", "--json"))
    assert found["model"]["path"] == str(base)
    assert list(home.iterdir()) == []
