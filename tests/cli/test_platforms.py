"""Linux and macOS run it; what one of them lacks is done without, and Windows is refused. (Renames: test_target.py.)"""

from __future__ import annotations

import os
import subprocess
import sys

from llmkit.pipeline.pool import n_cores

AS_WINDOWS = """
import sys
sys.platform = "win32"
sys.modules["fcntl"] = None
from llmkit.cli.app import run
run()
"""


def test_windows_is_refused_in_a_sentence():
    done = subprocess.run([sys.executable, "-c", AS_WINDOWS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: llmkit runs on Linux and macOS\nhint: ")
    assert done.stderr.count("\n") == 2


def test_cores_where_no_process_is_bound_to_some(monkeypatch):
    """macOS has no sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert n_cores() == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert n_cores() == 1


def test_files_are_synced_without_fdatasync():
    """macOS has none; a process of its own, for the choice is made at import."""
    script = "import os; del os.fdatasync; from llmkit.pipeline import commit; assert commit.sync_data is os.fsync"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
