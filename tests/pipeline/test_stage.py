"""An ordered stage: state passes on, blocks are kept, and a rerun goes on behind the last whole one."""

from __future__ import annotations

import contextlib

import pytest
import torch

from llmkit.pipeline.stage import Stage


def step(stage):
    """One block: the state doubles and counts, the result is what it was."""
    state = stage.state().get("x", torch.ones(3))
    stage.commit({"seen": state.clone()}, {"x": state * 2}, {"n": stage.n_done})


@pytest.mark.parametrize("in_memory", [True, False])
def test_state_passes_from_block_to_block(tmp_path, in_memory):
    stage = Stage(None if in_memory else tmp_path / "work", "d")
    for _ in range(4):
        step(stage)
    assert [stage.results(i)["seen"][0].item() for i in range(4)] == [1, 2, 4, 8]
    assert [stage.note(i)["n"] for i in range(4)] == [0, 1, 2, 3]
    assert stage.state()["x"][0].item() == 16


def test_a_rerun_goes_on_and_says_how_much_it_reused(tmp_path):
    first = Stage(tmp_path / "work", "d")
    step(first), step(first)
    again = Stage(tmp_path / "work", "d")
    assert (again.n_done, again.n_reused) == (2, 2)
    step(again)
    assert again.results(2)["seen"][0].item() == 4
    assert sorted(p.name for p in (tmp_path / "work").glob("*.state.safetensors")) == ["000002.state.safetensors"]


def test_other_work_begins_anew(tmp_path):
    step(Stage(tmp_path / "work", "d"))
    assert Stage(tmp_path / "work", "other").n_done == 0


@pytest.mark.parametrize("kind", ["results", "state"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_blocks_are_not_trusted(tmp_path, kind, damage):
    step(Stage(tmp_path / "work", "d"))
    path = tmp_path / f"work/000000.{kind}.safetensors"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
    stage = Stage(tmp_path / "work", "d")
    assert stage.n_done == 0
    step(stage)
    assert Stage(tmp_path / "work", "d").n_done == 1


@pytest.mark.parametrize("at", range(8))
def test_killed_anywhere_a_block_is_done_or_not_done(tmp_path, monkeypatch, at):
    """Every write, sync, append and removal of the second commit fails in turn; a rerun ends with the same bytes."""
    from llmkit.pipeline import stage as module

    whole = Stage(tmp_path / "whole", "d")
    for _ in range(3):
        step(whole)
    stage = Stage(tmp_path / "work", "d")
    step(stage)
    calls = iter(range(100))

    def failing(real):
        def call(*args, **kwargs):
            if next(calls) == at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_synced", failing(module.write_synced))
        patched.setattr(module, "sync_folder", failing(module.sync_folder))
        patched.setattr(module.Journal, "append", failing(module.Journal.append))
        patched.setattr(module.Path, "unlink", failing(module.Path.unlink))
        with contextlib.suppress(KeyboardInterrupt):
            step(stage)
    again = Stage(tmp_path / "work", "d")
    while again.n_done < 3:
        step(again)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "work" / path.name).read_bytes() == path.read_bytes(), path.name
