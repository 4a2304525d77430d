"""Bytes moved without torch are those that torch moves, for any slices; and a plan that only moves needs no torch."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmkit.formats.folder import read_file
from llmkit.tensors.lazy import Apply, Context
from llmkit.tensors.moving import Concat, TakeRows
from llmkit.tensors.rearrange import gather_rows, join_columns, permute_blocks, split_columns, take_columns, transpose


@pytest.fixture(scope="module")
def state():
    g = torch.Generator().manual_seed(0)
    half = {f"m{i}": torch.randn(24, 12, generator=g).half() for i in range(3)}
    return half | {"v": torch.randn(7, generator=g), "s": torch.tensor(2.0), "e": torch.empty(0, 4)}


@pytest.fixture(scope="module")
def stored(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("moving") / "model.safetensors"
    save_file(state, path)
    return read_file(path)


def permuted(x, order):
    return x.view(-1, len(order), *x.shape[1:])[:, order].reshape(x.shape)


def expressions(t, state):
    """Lazy tensors, and what plain torch makes of the stored ones."""
    a, b, c = t["m0"], t["m1"], t["m2"]
    x, y, z = state["m0"], state["m1"], state["m2"]
    swapped, reordered = permute_blocks(a, [1, 3, 0, 2]), permuted(x, [1, 3, 0, 2])
    doubled = Apply("double", [b], b.spec, lambda x: x * 2).output()
    return {
        "read": (a, x), "scalar": (t["s"], state["s"]), "vector": (t["v"], state["v"]), "empty": (t["e"], state["e"]),
        "take": (TakeRows(a, 3, 17).output(), x[3:17]),
        "concat": (Concat([a, TakeRows(b, 1, 6).output(), c]).output(), torch.cat([x, y[1:6], z])),
        "gather": (gather_rows([a, b], [(1, 4, 9), (0, 0, 3), (1, 0, 2), (1, 20, 24)]),
                   torch.cat([y[4:9], x[:3], y[:2], y[20:]])),
        "permute": (swapped, reordered),
        "permute twice": (permute_blocks(swapped, [1, 0, 2]), permuted(reordered, [1, 0, 2])),
        "take of permute": (TakeRows(swapped, 8, 20).output(), reordered[8:20]),
        "take across blocks": (TakeRows(swapped, 3, 10).output(), reordered[3:10]),
        "take up to inside a block": (TakeRows(swapped, 4, 10).output(), reordered[4:10]),
        "gather of permute": (gather_rows([swapped, b], [(0, 1, 7), (1, 0, 5), (0, 20, 24)]),
                              torch.cat([reordered[1:7], y[:5], reordered[20:]])),
        "beside": (join_columns([a, b, c]), torch.cat([x, y, z], 1)),
        "columns": (take_columns(join_columns([a, b]), 5, 19), torch.cat([x, y], 1)[:, 5:19]),
        "piece": (split_columns(a, 3)[1], x[:, 4:8]),
        "take of piece": (TakeRows(split_columns(a, 2)[1], 2, 11).output(), x[2:11, 6:]),
        "permute of gather": (permute_blocks(gather_rows([a, b], [(0, 0, 6), (1, 2, 8)]), [2, 0, 1]),
                              permuted(torch.cat([x[:6], y[2:8]]), [2, 0, 1])),
        "concat of computed": (Concat([a, doubled, t["m2"]]).output(), torch.cat([x, y * 2, z])),
        "permute of computed": (permute_blocks(doubled, [2, 0, 1]), permuted(y * 2, [2, 0, 1])),
        "beside computed": (join_columns([a, transpose(transpose(doubled))]), torch.cat([x, y * 2], 1)),
    }  # fmt: skip


TORCH = {"take across blocks", "take up to inside a block", "take of piece"}  # rows that no slice falls on
TORCH |= {"concat of computed", "permute of computed", "beside computed"}


def raw(x):
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_bytes_are_what_torch_moves(state, stored, seed):
    chance = random.Random(seed)
    for name, (lazy, want) in expressions(stored, state).items():
        node = lazy.node
        assert node.is_moved == (name not in TORCH), name
        assert raw(lazy.load()) == raw(want), name
        assert lazy.shape == want.shape, name
        seen = []
        context = Context(lambda read, rows, data, seen=seen: seen.append((read, rows, bytes(data))))
        step, at, pieces = node.row_step or node.n_rows, 0, []
        while at < node.n_rows:
            stop = min(at + step * chance.randint(1, 5), node.n_rows)
            pieces.append(bytes(context.row_bytes(lazy, (at, stop))))
            assert pieces[-1] == raw(Context().rows(lazy, (at, stop))), name
            at = stop
        assert b"".join(pieces) == raw(want), name
        for read, rows, data in seen:  # what is hashed as read is what the file has
            x = state[read.name]
            assert data == raw(x[rows[0] : rows[1]] if x.dim() else x)


def test_what_computes_is_not_moved(stored):
    a = stored["m0"]
    assert not Apply("double", [a], a.spec, lambda x: x * 2).is_moved
    assert not a.cast(stored["v"].dtype).node.is_moved
    assert not transpose(a).node.is_moved
    same = Apply("same", [a], a.spec, lambda x: x).output()
    assert not gather_rows([a, transpose(transpose(a)), same], [(0, 0, 1), (2, 0, 1)]).node.is_moved


def test_a_plan_that_only_moves_runs_without_torch(tmp_path):
    g = torch.Generator().manual_seed(0)
    (tmp_path / "in").mkdir()
    state = {f"t{i}": torch.randn(40, 16, generator=g) for i in range(6)}
    save_file(state, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    code = """
import sys, json, llmkit
from llmkit.transforms.convert import convert
from llmkit.tensors.rearrange import permute_blocks
ckpt = llmkit.open_checkpoint(sys.argv[1])
tensors = dict(ckpt.tensors) | {"t3": permute_blocks(ckpt.tensors["t3"], [1, 0])}
manifest = llmkit.save(convert(ckpt.derive(tensors=tensors), to="bin"), sys.argv[2], max_shard_size=6000)
assert not [m for m in ("torch", "numpy") if m in sys.modules]
print(json.dumps(manifest["inputs"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "in", tmp_path / "out"], capture_output=True, text=True, check=True
    )
    found = {}
    for path in (tmp_path / "out").glob("*.bin"):
        found |= torch.load(path, weights_only=True)
    want = state | {"t3": state["t3"].view(-1, 2, 16).flip(1).reshape(40, 16)}
    assert found.keys() == want.keys()
    assert all(torch.equal(found[k], want[k]) for k in want)
    assert json.loads(done.stdout)[0]["tensors"].keys() == state.keys()


def test_interrupted_while_bytes_move_it_resumes(tmp_path):
    import llmkit
    from llmkit.transforms.convert import convert

    g = torch.Generator().manual_seed(0)
    (tmp_path / "in").mkdir()
    save_file({f"t{i}": torch.randn(40, 16, generator=g) for i in range(8)}, tmp_path / "in/model.safetensors")

    class Interrupts:
        n = 0

        def begin(self, total, label, unit="B"):
            pass

        def advance(self, n, note=""):
            self.n += 1
            if self.n == 4:
                raise KeyboardInterrupt

        def end(self):
            pass

    def ckpt():
        opened = llmkit.open_checkpoint(tmp_path / "in")
        return convert(
            opened.derive(tensors={k: permute_blocks(t, [1, 0]) for k, t in opened.tensors.items()}), to="bin"
        )

    with pytest.raises(KeyboardInterrupt):
        llmkit.save(ckpt(), tmp_path / "out", workers=1, progress=Interrupts())
    assert not (tmp_path / "out").exists()
    llmkit.save(ckpt(), tmp_path / "out", workers=1)
    resumed = json.loads((tmp_path / "out/llmkit.json").read_text())["run"]["steps_resumed"]
    assert 3 <= resumed < 8
    llmkit.save(ckpt(), tmp_path / "fresh")
    assert (tmp_path / "out/pytorch_model.bin").read_bytes() == (tmp_path / "fresh/pytorch_model.bin").read_bytes()
