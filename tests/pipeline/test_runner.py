"""The runner: same bytes as safetensors' own writer, whatever the workers, slices, shards or interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmkit
from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.errors import InputError, OutputError, SpecError
from llmkit.pipeline import plan as planning
from llmkit.pipeline.commit import Partial
from llmkit.pipeline.progress import NO_PROGRESS
from llmkit.pipeline.runner import run_plan
from llmkit.pipeline.target import Target, partial_path
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.moving import Concat
from llmkit.tensors.stopped import raise_if_stopped


def make_source(folder: Path, dtype: torch.dtype = torch.float16, rows: int = 37) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.w": torch.randn(rows, 16, generator=g).to(dtype) for i in range(12)}
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 4)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.fixture
def source(tmp_path):
    tensors = make_source(tmp_path / "in")
    return tmp_path / "in", tensors


def copy_of(folder: Path) -> Checkpoint:
    return open_checkpoint(folder).derive()


def test_a_copy_has_the_bytes_of_safetensors_own_writer(source, tmp_path):
    folder, _ = source
    manifest = llmkit.save(copy_of(folder), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not partial_path(tmp_path / "out").exists()
    assert set(manifest["tensors"]) == set(load_file(folder / "model.safetensors"))
    assert json.loads((tmp_path / "out/llmkit.json").read_text())["tensors"] == manifest["tensors"]


def test_a_tensor_under_two_names_is_read_once_and_has_one_hash(source, tmp_path):
    folder, tensors = source
    ckpt = copy_of(folder)
    stored = ckpt.tensors["layers.0.w"]
    manifest = llmkit.save(ckpt.derive(tensors={"a": stored, "b": stored}), tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[name], tensors["layers.0.w"]) for name in ("a", "b"))
    digests = {manifest["tensors"][name]["xxh3"] for name in ("a", "b")}
    assert digests == {manifest["inputs"][0]["tensors"]["layers.0.w"]}


@pytest.mark.parametrize("shard_nbytes", [1, 1500, 4000, 10**9])
def test_any_shard_size_gives_the_same_tensors(source, tmp_path, shard_nbytes):
    folder, tensors = source
    llmkit.save(copy_of(folder), tmp_path / "out", max_shard_size=shard_nbytes)
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)
    reopened = open_checkpoint(tmp_path / "out")
    assert list(reopened.tensors)[:3] == ["empty", "layers.0.w", "layers.1.w"]


def doubled(lazy: Lazy) -> Lazy:
    return Apply("double", [lazy], lazy.spec, lambda x: x * 2).output()


@pytest.mark.parametrize(("workers", "slice_nbytes"), [(1, 1), (1, 100), (2, 64), (8, 10**6)])
def test_slices_and_workers_do_not_change_the_bytes(source, tmp_path, workers, slice_nbytes):
    folder, tensors = source
    ckpt = copy_of(folder)
    mean = Apply(
        "mean", [ckpt.tensors["layers.3.w"]], ckpt.tensors["layers.3.w"].spec.with_rows(1),
        lambda x: x.float().mean(0, keepdim=True).to(x.dtype), row_step=None, input_rows=[0],
    ).output()  # fmt: skip
    new = {k: doubled(t) for k, t in ckpt.tensors.items()}
    new["layers.3.w"] = doubled(Concat([ckpt.tensors["layers.3.w"], mean]).output())
    plan = planning.make_plan(ckpt.derive(tensors=new), tmp_path / "out", slice_nbytes=slice_nbytes)
    manifest = run_plan(plan, workers=workers)
    found = load_file(tmp_path / "out/model.safetensors")
    old = tensors["layers.3.w"]
    expected = {k: v * 2 for k, v in tensors.items()}
    expected["layers.3.w"] = torch.cat([old, old.float().mean(0, keepdim=True).half()]) * 2
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    reads = manifest["inputs"][0]["tensors"]
    assert reads.keys() == tensors.keys()


def test_values_that_are_no_numbers_are_counted_where_something_is_computed(source, tmp_path):
    folder, tensors = source
    name = "layers.1.w"
    tensors[name].view(-1)[:3] = torch.tensor([60000.0, -60000.0, torch.nan])
    tensors["layers.0.w"].view(-1)[0] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    ckpt = copy_of(folder)
    manifest = llmkit.save(ckpt.derive(tensors={**ckpt.tensors, name: doubled(ckpt.tensors[name])}), tmp_path / "out")
    assert manifest["run"]["not_finite"] == {name: 3}
    assert "not_finite" not in llmkit.save(ckpt, tmp_path / "copy")["run"]


def test_siblings_are_written_together_in_slices(source, tmp_path):
    folder, tensors = source
    ckpt = copy_of(folder)
    w = ckpt.tensors["layers.0.w"]
    calls = []

    def split(x):
        calls.append(len(x))
        packed_rows = torch.stack([x[i : i + 8].float().sum() for i in range(0, len(x), 8)])[:, None]
        return x + 1, packed_rows, torch.tensor([37, 16])

    specs = [w.spec, planning.TensorSpec(llmkit_dtype("F32"), (5, 1)), planning.TensorSpec(llmkit_dtype("I64"), (2,))]
    group = Apply("split", [w], specs, split, row_step=8, output_rows=[1, 8, 0]).outputs()
    new = {"a": group[0], "b": group[1], "c": group[2]}
    run_plan(planning.make_plan(ckpt.derive(tensors=new), tmp_path / "out", slice_nbytes=300))
    found = load_file(tmp_path / "out/model.safetensors")
    x = tensors["layers.0.w"]
    assert calls == [8, 8, 8, 8, 5]
    assert torch.equal(found["a"], x + 1)
    assert torch.equal(found["b"], torch.stack([x[i : i + 8].float().sum() for i in range(0, 37, 8)])[:, None])
    assert found["c"].tolist() == [37, 16]


def llmkit_dtype(name):
    from llmkit.tensors.spec import DType

    return DType[name]


def test_a_result_that_is_not_what_the_plan_says_is_refused(source, tmp_path):
    folder, _ = source
    ckpt = copy_of(folder)
    w = ckpt.tensors["layers.0.w"]
    wrong = Apply("wrong", [w], w.spec, lambda x: x.float()).output()
    with pytest.raises(SpecError, match=r"layers.0.w: computed .* the plan says F16\[37, 16\]"):
        llmkit.save(ckpt.derive(tensors={"layers.0.w": wrong}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not partial_path(tmp_path / "out").exists()


def test_existing_output_is_refused_and_overwritten_only_when_asked(source, tmp_path):
    folder, _ = source
    llmkit.save(copy_of(folder), tmp_path / "out")
    with pytest.raises(OutputError, match="already exists") as error:
        llmkit.save(copy_of(folder), tmp_path / "out")
    assert "--overwrite" in error.value.hint
    llmkit.save(copy_of(folder), tmp_path / "out", overwrite=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="no checkpoint folder"):
        llmkit.save(copy_of(folder), tmp_path / "precious", overwrite=True)
    with pytest.raises(OutputError, match="holds an input"):
        llmkit.save(copy_of(folder), folder, overwrite=True)
    with pytest.raises(OutputError, match="does not exist"):
        llmkit.save(copy_of(folder), tmp_path / "no/such/out")


def test_an_input_that_shrinks_is_an_error_and_leaves_nothing(source, tmp_path):
    folder, _ = source
    ckpt = copy_of(folder)
    os.truncate(folder / "model.safetensors", 4000)
    with pytest.raises(InputError, match="ended at byte"):
        llmkit.save(ckpt, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not partial_path(tmp_path / "out").exists()


def test_a_full_disk_is_refused_in_one_line(source, tmp_path):
    """RLIMIT_FSIZE makes the reservation fail as a full disk does, and a disk that takes no file of this size."""
    folder, _ = source
    code = (
        "import resource, signal, sys, llmkit; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000));"
        "from llmkit.errors import OutputError\n"
        "try: llmkit.save(llmkit.open_checkpoint(sys.argv[1]).derive(), sys.argv[2])\n"
        "except OutputError as e: print(e.message, '|', e.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert "cannot write" in done.stdout, done.stderr
    assert "--max-shard-size 2GB" in done.stdout  # what ends a file that is too large for FAT32
    assert not (tmp_path / "out").exists()
    assert not partial_path(tmp_path / "out").exists()


def test_a_disk_too_small_is_refused_before_any_work(source, tmp_path, monkeypatch):
    import shutil

    folder, _ = source
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.raises(OutputError, match="the disk has 1 kB free"):
        llmkit.save(copy_of(folder), tmp_path / "out")
    assert not partial_path(tmp_path / "out").exists()


STOPPING_COPY = """
import itertools, sys, time, llmkit
from llmkit.tensors.lazy import Apply
ckpt, n, count = llmkit.open_checkpoint(sys.argv[1]), int(sys.argv[3]), itertools.count()
def copy(x):
    time.sleep(0 if next(count) < n else 600)  # to be killed in
    return x
slow = {k: Apply("slow", [t], t.spec, copy).output() for k, t in ckpt.tensors.items()}
m = llmkit.save(ckpt.derive(tensors=slow), sys.argv[2], workers=2, max_shard_size=4000)
print(m["run"]["steps_resumed"])
"""


def test_kill_9_then_resume_gives_identical_bytes(source, tmp_path):
    folder, _ = source
    args = [sys.executable, "-c", STOPPING_COPY, str(folder)]
    subprocess.run([*args, str(tmp_path / "whole"), "999"], check=True, capture_output=True)
    process = subprocess.Popen([*args, str(tmp_path / "out"), "6"], stdout=subprocess.PIPE, text=True)
    journal = partial_path(tmp_path / "out") / ".journal.jsonl"
    deadline = time.monotonic() + 300
    while not journal.exists() or journal.read_text().count("\n") < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    with journal.open("a") as file:
        file.write('{"step": "half a li')
    resumed = subprocess.run([*args, str(tmp_path / "out"), "999"], check=True, capture_output=True, text=True)
    assert int(resumed.stdout) >= 3
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "out").iterdir())
    for name in names:
        if name != "llmkit.json":
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    manifests = [json.loads((tmp_path / d / "llmkit.json").read_text()) for d in ("whole", "out")]
    for manifest in manifests:
        manifest.pop("run")
    assert manifests[0] == manifests[1]


def test_a_damaged_partial_output_is_computed_again(source, tmp_path):
    folder, _ = source
    args = [sys.executable, "-c", STOPPING_COPY, str(folder), str(tmp_path / "out")]
    process = subprocess.Popen([*args, "6"], stdout=subprocess.PIPE)
    partial = partial_path(tmp_path / "out")
    while not (partial / ".journal.jsonl").exists() or (partial / ".journal.jsonl").read_text().count("\n") < 5:
        time.sleep(0.02)
    process.kill()
    process.wait()
    for file in partial.glob("*.safetensors"):
        with file.open("r+b") as f:
            f.seek(600)
            f.write(b"\xff" * 3000)
    subprocess.run([*args, "999"], check=True, capture_output=True)
    expected = load_file(folder / "model.safetensors")
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_another_plan_does_not_resume(source, tmp_path):
    folder, _ = source
    partial = partial_path(tmp_path / "out")
    partial.mkdir()
    (partial / ".journal.jsonl").write_text('{"plan": "other"}\n{"step": "layers.0.w", "tensors": {}, "reads": []}\n')
    (partial / "stale.safetensors").write_bytes(b"x")
    llmkit.save(copy_of(folder), tmp_path / "out")
    assert not (tmp_path / "out/stale.safetensors").exists()


def test_planning_reads_no_data(source, tmp_path, monkeypatch):
    from llmkit.tensors.source import SourceFile

    folder, _ = source
    ckpt = copy_of(folder)
    monkeypatch.setattr(SourceFile, "read_tensor", lambda *_: pytest.fail("the plan read tensor data"))
    plan = llmkit.plan(ckpt.derive(tensors={k: doubled(t) for k, t in ckpt.tensors.items()}), tmp_path / "out")
    assert plan.write_nbytes > plan.read_nbytes == ckpt.nbytes
    assert not any(tmp_path.glob("out*"))


def test_interrupted_again_before_any_step_is_done_resumes(source, tmp_path):
    folder, _ = source
    plan = llmkit.plan(copy_of(folder), tmp_path / "out")
    for _ in range(2):
        Partial(Target(plan.out), plan.digest).close()
    llmkit.save(copy_of(folder), tmp_path / "out")
    assert (tmp_path / "out/llmkit.json").is_file()


def test_a_step_amid_its_arithmetic_ends_when_the_user_interrupts(source, tmp_path):
    """And the same command goes on from the steps that were done."""
    folder, _ = source
    ckpt, begun = copy_of(folder), threading.Event()
    is_slow = [True]

    def slow(values):
        begun.set()
        until = time.monotonic() + 30
        while is_slow[0] and time.monotonic() < until:
            raise_if_stopped()
            time.sleep(0.01)
        return values

    class Interrupts(type(NO_PROGRESS)):
        def advance(self, n, note=""):
            if note == "layers.0.w" and begun.wait(30):
                raise KeyboardInterrupt

    last = ckpt.tensors["layers.11.w"]
    changed = Apply("slow", [last], last.spec, slow).output()
    ckpt = ckpt.derive(tensors={**ckpt.tensors, "layers.11.w": changed})
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        llmkit.save(ckpt, tmp_path / "out", workers=2, progress=Interrupts())
    assert time.monotonic() - began < 20
    assert (tmp_path / "out.partial").is_dir()
    is_slow[0] = False
    llmkit.save(ckpt, tmp_path / "out", workers=2)
    llmkit.save(ckpt, tmp_path / "fresh", workers=2)
    (written,) = (tmp_path / "out").glob("*.safetensors")
    assert written.read_bytes() == (tmp_path / "fresh" / written.name).read_bytes()
