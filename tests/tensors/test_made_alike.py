"""Tensors that are made alike are those that each would be, made when they are asked for."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from llmkit.errors import SpecError
from llmkit.formats.safetensors import read
from llmkit.tensors.alike import Alike
from llmkit.tensors.lazy import Apply, Lazy, reads_below
from llmkit.tensors.moving import TakeRows
from llmkit.tensors.nodes import NodeTable
from llmkit.tensors.spec import DType, TensorSpec


@pytest.fixture
def stored(tmp_path) -> dict[str, Lazy]:
    """Six matrices of one shape, and one of another."""
    tensors = {f"w{i}": torch.arange(12.0).reshape(4, 3) + i for i in range(6)} | {"other": torch.ones(2, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    return read(tmp_path / "model.safetensors")[0]


class Making:
    """Doubles a tensor, and its row sums; counts how often."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, lazy: Lazy, name: str) -> dict[str, Lazy]:
        self.names.append(name)
        specs = [lazy.spec, TensorSpec(DType.F32, (lazy.spec.n_rows,))]
        doubled, sums = Apply("double", [lazy], specs, lambda x: (2 * x, x.sum(1)), {"by": 2}).outputs()
        return {"doubled": doubled, "sums": sums, "same": lazy}


def test_only_the_first_of_a_kind_are_made_until_another_is_asked_for(stored):
    making = Making()
    alike = Alike(making)
    made = {name: alike("double", (lazy,), name) for name, lazy in stored.items()}
    assert making.names == ["other", "w0", "w1"]  # two of a shape
    for name, tensors in made.items():
        assert tensors["doubled"].spec == stored[name].spec
        assert tensors["sums"].shape == stored[name].shape[:1]
        assert tensors["same"] is stored[name]
        assert tensors["doubled"].origin is tensors["sums"].origin
        assert [read.name for read in reads_below([tensors["sums"].origin])] == [name]
    assert making.names == ["other", "w0", "w1"]
    assert made["w3"]["sums"].load().tolist() == stored["w3"].load().sum(1).tolist()
    assert making.names == ["other", "w0", "w1", "w3"]
    assert made["w3"]["doubled"].node is made["w3"]["sums"].node
    assert making.names == ["other", "w0", "w1", "w3"]


def test_what_is_deferred_has_the_values_forms_and_words_of_what_is_made_at_once(stored):
    alike = Alike(Making())
    table, expected = NodeTable(), NodeTable()
    for name, lazy in stored.items():
        deferred, made = alike("double", (lazy,), name), Making()(lazy, name)
        for part in made:
            assert deferred[part].origin.form() == made[part].node.form()
            assert deferred[part].formula() == made[part].formula()
            assert torch.equal(deferred[part].load(), made[part].load())
            assert table.add(deferred[part]) == expected.add(made[part])
    assert table.nodes == expected.nodes


def test_fingerprints_tell_inputs_and_kinds_apart_and_stay_when_a_node_is_made(stored):
    def times(lazy: Lazy, factor: int) -> dict[str, Lazy]:
        return {"y": Apply("times", [lazy], lazy.spec, lambda x: factor * x, {"by": factor}).output()}

    alike = Alike(times)
    lazies = [alike(by, (stored[f"w{i}"],), by)["y"] for by in (2, 3) for i in range(3)]
    before = [lazy.origin.fingerprint() for lazy in lazies]
    assert len(set(before)) == 6
    for lazy in lazies:
        lazy.load()
    assert [lazy.origin.fingerprint() for lazy in lazies] == before
    again = Alike(times)
    assert before == [again(by, (stored[f"w{i}"],), by)["y"].origin.fingerprint() for by in (2, 3) for i in range(3)]


def test_what_is_computed_from_something_computed_is_made_at_once(stored):
    making = Making()
    alike = Alike(making)
    for name in ("w0", "w1"):
        alike("double", (stored[name].cast(DType.F16),), name)
    assert making.names == ["w0", "w1"]


def test_one_that_is_not_made_as_the_first_is_an_error(stored):
    def odd(lazy: Lazy, dtype: DType) -> dict[str, Lazy]:
        return {"y": lazy.cast(dtype)}

    alike = Alike(odd)
    for name in ("w0", "w1"):
        alike("cast", (stored[name],), DType.F16)
    third = alike("cast", (stored["w2"],), DType.F64)["y"]
    with pytest.raises(SpecError, match="is not made as the first of its pattern"):
        third.load()


def test_what_has_no_form_in_common_is_made_at_once(stored):
    names = []

    def taken(lazy: Lazy, name: str) -> dict[str, Lazy]:
        names.append(name)
        return {"y": TakeRows(lazy, 1, 3).output()}

    alike = Alike(taken)
    for i in range(4):
        assert torch.equal(alike("rows", (stored[f"w{i}"],), f"w{i}")["y"].load(), stored[f"w{i}"].load()[1:3])
    assert names == ["w0", "w1", "w2", "w3"]
