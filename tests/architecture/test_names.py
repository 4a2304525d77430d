"""The name table is one to one, for every plugin and every variant, and reads transformers' names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.architecture.names import Names, NameTable
from llmkit.architecture.registry import default_registry
from llmkit.errors import PluginError

PLUGINS = [default_registry().load(p) for p in default_registry().plugins]
CASES = [(a, v) for a in PLUGINS for v in (None, *a.variants)]
TABLE = NameTable(
    Names(embed="m.tok", final_norm="m.norm", head="out", block="m.h.{i}.", slots={"attn.q": "a.q", "attn": "rest"})
)


@pytest.mark.parametrize(("architecture", "variant"), CASES, ids=[f"{a.name}-{v or 'tiny'}" for a, v in CASES])
def test_bijective(architecture, variant):
    model = architecture.bind(architecture.tiny_config(variant))
    assert model.table.faults(model.slots) == []
    assert len(model.tensors()) == len(model.slots)
    for name, slot in model.tensors().items():
        assert model.table.slot(name) == slot.id
        assert model.name_of(slot.id) == name


def test_both_directions():
    assert TABLE.name("embed.weight") == "m.tok.weight"
    assert TABLE.name("layers.12.attn.q.bias") == "m.h.12.a.q.bias"
    assert TABLE.slot("m.h.12.a.q.bias") == "layers.12.attn.q.bias"
    assert TABLE.slot("m.h.3.rest.k.weight") == "layers.3.attn.k.weight"
    assert TABLE.slot("out.weight") == "head.weight"
    for unknown in ("m.h.01.a.q.weight", "m.h.x.a.q.weight", "m.tokens.weight", "m.h.1.b.weight", "nothing"):
        assert TABLE.slot(unknown) is None


@given(st.integers(0, 200), st.sampled_from(["attn.q", "attn.k", "attn.qq"]), st.sampled_from(["weight", "bias"]))
def test_slots_survive_the_round_trip(i, stem, leaf):
    slot = f"layers.{i}.{stem}.{leaf}"
    assert TABLE.slot(TABLE.name(slot)) == slot


def test_faulty_tables_are_refused():
    with pytest.raises(PluginError, match=r"'attn\.k' are both named 'x'"):
        NameTable(Names("e", "n", "h", "b.{i}.", {"attn.q": "x", "attn.k": "x"}))
    with pytest.raises(PluginError, match="exactly one"):
        NameTable(Names("e", "n", "h", "b.", {}))
    with pytest.raises(PluginError, match=r"no entry for slot 'layers\.0\.mlp\.up\.weight'"):
        TABLE.name("layers.0.mlp.up.weight")
    clash = NameTable(Names("e", "n", "h", "b.{i}.", {"attn.q": "x.y", "attn": "x"}))
    faults = clash.faults(["layers.0.attn.y.weight", "layers.0.attn.q.weight"])
    assert any("both named" in fault for fault in faults)
