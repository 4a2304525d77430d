"""An ordered stage goes on where it was killed, with the state that the next block needs, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from llmkit.errors import OutputError
from llmkit.pipeline.stage import BlockResult, Stage
from llmkit.tensors.lazy import Lazy

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = ["start", "one", "two", "three"]


def compute(name: str, state: Mapping[str, Lazy]) -> BlockResult:
    """Two batches of activations, each block a function of those of the block before; and their sums."""
    counted: dict[str, float] = {}

    def batches() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(2):
            x = torch.arange(6.0).reshape(2, 3) + i if name == "start" else state[f"batch {i}"].load() * 2 + len(name)
            counted[f"batch {i}"] = float(x.sum())
            yield f"batch {i}", x

    kept = [] if name == "start" else [("moments", state["batch 1"].load().T.to(torch.bfloat16))]
    return BlockResult(counted, batches(), kept)


def found(path: Path | None, calls: list[str] | None = None, **options) -> list[tuple[object, ...]]:
    """Everything that the stage gives; `calls` collects the blocks that are computed."""

    def noted(name: str, state: Mapping[str, Lazy]) -> BlockResult:
        if calls is not None:
            calls.append(name)
        return compute(name, state)

    with Stage(path, "digest", **options) as stage:
        return [
            (b.name, dict(b.result), {k: t.load().tolist() for k, t in b.kept.items()})
            for b in stage.run(BLOCKS, noted)
        ]


def test_blocks_get_the_state_of_the_one_before_and_only_the_last_state_stays(tmp_path):
    whole = found(None)
    assert [name for name, *_ in whole] == BLOCKS
    x = torch.arange(6.0).reshape(2, 3) + 1
    for (name, result, kept), n in zip(whole, [0, 3, 3, 5], strict=True):
        if name != "start":
            assert kept == {"moments": x.T.bfloat16().tolist()}
            x = x * 2 + n
        assert result["batch 1"] == float(x.sum())
    assert found(tmp_path / "s") == whole
    assert sorted(p.name for p in (tmp_path / "s.data").iterdir()) == ["1.kept", "2.kept", "3.kept", "3.state"]
    calls: list[str] = []
    assert found(tmp_path / "s", calls) == whole
    assert calls == []
    with Stage(tmp_path / "s", "digest") as stage:
        stage.remove()
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys
from pathlib import Path
import torch
from tests.pipeline.test_stage import found
from tests.reliability.shim import Shim
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
import os
torch.set_num_threads(1)
found(None)  # imports what the children need
n, code = 0, -1
while code:  # killed before its n-th operation (a write also after half of its bytes), until there is no n-th
    n += 1
    for torn in (False, True):
        if torn and not log.read_text().splitlines()[-1].startswith("write"):
            continue
        home = folder / f"{n}-{torn}"
        home.mkdir()
        pid = os.fork()
        if not pid:
            Shim(home, n, is_torn=torn, log=log).install()
            found(home / "s")
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(n)
"""


@pytest.mark.slow
def test_killed_anywhere_the_same_stage_goes_on_and_computes_no_finished_block_again(tmp_path):
    (tmp_path / "k").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "k", tmp_path / "log"], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 25
    whole, reused = found(None), set()
    for home in (tmp_path / "k").iterdir():
        journal = home / "s"
        n_done = max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0
        calls: list[str] = []
        assert found(journal, calls) == whole
        assert calls == BLOCKS[n_done:]
        assert {p.name for p in (home / "s.data").iterdir()} == {"1.kept", "2.kept", "3.kept", "3.state"}
        reused.add(n_done)
    assert reused == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("damaged", "want"),
    [("1.state", BLOCKS), ("1.kept", BLOCKS), ("nothing", BLOCKS[2:])],
)
def test_a_block_whose_files_are_not_as_written_is_computed_again(tmp_path, damaged, want):
    with Stage(tmp_path / "s", "digest") as stage:
        for _ in zip(range(2), stage.run(BLOCKS, compute), strict=False):
            pass
    (tmp_path / "s.data" / "mine").write_text("mine")
    if damaged != "nothing":
        path = tmp_path / "s.data" / damaged
        path.write_bytes(b"\xff" + path.read_bytes()[1:])
    calls: list[str] = []
    assert found(tmp_path / "s", calls) == found(None)
    assert calls == want
    calls.clear()
    found(tmp_path / "s", calls)
    assert calls == []
    found(tmp_path / "s", calls, resume=False)
    assert calls == BLOCKS
    assert (tmp_path / "s.data" / "mine").read_text() == "mine"


def test_other_work_starts_anew_and_another_process_waits(tmp_path):
    with Stage(tmp_path / "s", "digest") as stage:
        list(stage.run(BLOCKS, compute))
        with pytest.raises(OutputError, match="another llmkit process"):
            Stage(tmp_path / "s", "digest")
    with Stage(tmp_path / "s", "other") as stage:
        assert stage.entries == []
        assert not (tmp_path / "s.data").exists()
