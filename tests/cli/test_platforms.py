"""Linux and macOS run it; what one of them lacks is done without, and Windows is refused. (Renames: test_target.py.)"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from llmkit.pipeline.cores import limit_threads, n_cores, quota
from llmkit.pipeline.pool import all_cores

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


VERSION_2 = {"proc/self/cgroup": "0::/pod/llm\n", "sys/fs/cgroup/pod/cpu.max": "150000 100000\n"}
VERSION_1 = {
    "proc/self/cgroup": "9:name=systemd:/\n4:cpu,cpuacct:/docker/1\n0::/\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",  # a container sees its own group as the root
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (VERSION_2, 2),
        (VERSION_2 | {"sys/fs/cgroup/pod/llm/cpu.max": "max 100000\n"}, 2),
        (VERSION_2 | {"sys/fs/cgroup/pod/llm/cpu.max": "50000 100000\n"}, 1),
        (VERSION_1, 4),
        (VERSION_1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "no such form\n"}, None),
        ({}, None),
    ],
)
def test_cores_that_a_control_group_gives(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == expected


def test_threads_are_as_many_as_omp_num_threads_says(monkeypatch):
    monkeypatch.delenv("OMP_THREAD_LIMIT", raising=False)
    for said, expected in (("3", 3), ("2,1", 2), ("0", n_cores()), ("many", n_cores())):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        limit_threads()
        assert os.environ["OMP_NUM_THREADS"] == said
        with all_cores():
            assert torch.get_num_threads() == expected


@pytest.mark.parametrize(("limit", "expected"), [("", 3), ("2", 2), ("8", 3), ("0", 3), ("many", 3)])
def test_torch_gets_no_more_threads_than_openmp_starts(monkeypatch, limit, expected):
    """With two threads of which one is never started, oneDNN computes half of a product and reports no error."""
    monkeypatch.setenv("OMP_THREAD_LIMIT", limit)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with all_cores():
        assert torch.get_num_threads() == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads()
    if expected == 2:  # else control groups may say something
        assert os.environ["OMP_NUM_THREADS"] == str(min(2, n_cores()))


def test_files_are_synced_without_fdatasync():
    """macOS has none; a process of its own, for the choice is made at import."""
    script = "import os; del os.fdatasync; from llmkit.pipeline import commit; assert commit.sync_data is os.fsync"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
