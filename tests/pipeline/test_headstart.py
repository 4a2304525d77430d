"""Copies made while torch is imported: the same bytes as without, for any layout, and nothing lost when they fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmkit
from llmkit.pipeline.headstart import HeadStart, copied_tensor, find_stretches
from llmkit.tensors.lazy import Apply

CONFIG = {"architectures": ["NobodyKnowsThisOne"], "model_type": "nobody"}


@pytest.fixture
def folder(tmp_path):
    """Nine tensors in two files."""
    g = torch.Generator().manual_seed(0)
    state = {f"t{i}": torch.randn(40 + i, 8, generator=g) for i in range(9)}
    home = tmp_path / "in"
    home.mkdir()
    parts = {"a.safetensors": list(state)[:5], "b.safetensors": list(state)[5:]}
    for file, names in parts.items():
        save_file({n: state[n] for n in names}, home / file, metadata={"format": "pt"})
    weight_map = {n: file for file, names in parts.items() for n in names}
    (home / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (home / "config.json").write_text(json.dumps(CONFIG))
    return home


def changed(folder, names=("t2", "t7")):
    """The checkpoint with some tensors doubled: the others only move."""
    ckpt = llmkit.open_checkpoint(folder)
    tensors = dict(ckpt.tensors)
    for name in names:
        old = tensors[name]
        tensors[name] = Apply("double", (old,), old.spec, lambda x: x * 2).output()
    return ckpt.derive(tensors=tensors)


def run_copies(plan, max_gap, tmp_path):
    """All stretches copied into zeroed files; the descriptors are closed."""
    paths = {f.name: tmp_path / f"{max_gap}-{f.name}" for f in plan.files}
    descriptors = {}
    for file in plan.files:
        paths[file.name].write_bytes(bytes(file.nbytes))
        descriptors[file.name] = os.open(paths[file.name], os.O_RDWR)
    with HeadStart(find_stretches(plan.steps, max_gap), descriptors) as head:
        head._thread.join()
    for fd in descriptors.values():
        os.close(fd)
    return head, {name: path.read_bytes() for name, path in paths.items()}


@pytest.mark.parametrize("size", [2**30, 4000])
@pytest.mark.parametrize("max_gap", [0, 10_000])
def test_what_is_said_to_have_moved_is_where_the_written_file_has_it(folder, tmp_path, size, max_gap):
    ckpt = changed(folder)
    llmkit.save(ckpt, tmp_path / "out", max_shard_size=size)
    plan = llmkit.plan(ckpt, tmp_path / "other", max_shard_size=size)
    head, copied = run_copies(plan, max_gap, tmp_path)
    n_moved = 0
    for step in plan.steps:
        place = step.placements[0]
        assert head.has_copied(step) == (copied_tensor(step) is not None)
        if head.has_copied(step):
            n_moved += 1
            cut = slice(place.offset, place.offset + place.spec.nbytes)
            assert copied[place.file][cut] == (tmp_path / "out" / place.file).read_bytes()[cut]
    assert n_moved == 7


def test_a_gap_is_copied_along_only_up_to_its_limit(folder, tmp_path):
    plan = llmkit.plan(changed(folder), tmp_path / "out")
    assert len(find_stretches(plan.steps, 10_000)) == 2  # one an input file
    assert len(find_stretches(plan.steps, 0)) == 4  # each file is cut by its computed tensor


@pytest.mark.parametrize("failure", ["refused", "nothing", "half"])
def test_what_the_kernel_does_not_copy_is_not_said_to_have_moved(folder, tmp_path, monkeypatch, failure):
    real, calls = os.copy_file_range, []

    def fails(*args):
        calls.append(args)
        if failure == "refused":
            raise OSError(18, "cross-device link")
        return 0 if failure == "nothing" or len(calls) > 1 else real(args[0], args[1], args[2] // 2, *args[3:])

    monkeypatch.setattr(os, "copy_file_range", fails)
    plan = llmkit.plan(changed(folder), tmp_path / "out")
    head, copied = run_copies(plan, 10_000, tmp_path)
    moved = [s for s in plan.steps if head.has_copied(s)]
    assert bool(moved) == (failure == "half")
    assert len(moved) < 7
    want = {s.name: llmkit.open_checkpoint(folder).tensors[s.name].load() for s in moved}
    for step in moved:
        place = step.placements[0]
        data = copied[place.file][place.offset : place.offset + place.spec.nbytes]
        assert data == want[step.name].numpy().tobytes()


SCRIPT = """
import os, sys
assert "torch" not in sys.modules
import llmkit, llmkit.pipeline.headstart as h
from llmkit.transforms import lora
ckpt = llmkit.open_checkpoint(sys.argv[1])
merged = lora.merge(ckpt, [lora.open_adapter(sys.argv[2])])
assert "torch" not in sys.modules
done = []
moved = h.HeadStart.has_copied
h.HeadStart.has_copied = lambda self, step: done.append(moved(self, step)) or done[-1]
if sys.argv[4:]:  # a kernel that says it has copied, and has not
    def lies(source, target, n, a, b):
        os.pwrite(target, b"x" * min(n, 1000), b)
        return n
    os.copy_file_range = lies
llmkit.save(merged, sys.argv[3], max_shard_size=1_000_000)
print(sum(done))
"""


@pytest.mark.parametrize("lies", [False, True])
def test_a_fresh_process_writes_the_same_bytes_and_hashes(tmp_path, lies):
    from importlib.resources import files

    from llmkit.transforms import lora

    mini = files("llmkit_evalsets") / "mini"
    base, adapter = str(mini / "base"), str(mini / "adapter")
    merged = lora.merge(llmkit.open_checkpoint(base), [lora.open_adapter(adapter)])
    llmkit.save(merged, tmp_path / "here", max_shard_size=1_000_000)
    command = [sys.executable, "-c", SCRIPT, base, adapter, str(tmp_path / "there"), *["lies"] * lies]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0  # embedding, head and norms only move
    manifests = [json.loads((tmp_path / d / "llmkit.json").read_text()) for d in ("here", "there")]
    here, there = ({k: v for k, v in m.items() if k != "run"} for m in manifests)
    assert here == there
    shards = sorted(p.name for p in (tmp_path / "here").glob("*.safetensors"))
    assert len(shards) > 1
    for name in shards:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
        assert load_file(tmp_path / "there" / name)
