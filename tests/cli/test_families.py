"""The table of families says what can be done, by doing it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from llmkit.architecture.kinds import Kind, RMSNorm, SlotShape
from llmkit.architecture.prompts import FORMATS
from llmkit.architecture.registry import default_registry
from llmkit.cli.families import abilities, families, gguf, prompts

PLUGINS = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}


@dataclass(frozen=True)
class Unread(Kind):
    """A norm that nothing reads."""

    def slots(self) -> dict[str, SlotShape]:
        return {"weight": SlotShape(("hidden",), "norm")}


@pytest.mark.slow
def test_a_row_for_each_plugin():
    rows = [line.split(" | ") for line in families().splitlines()]
    assert {len(row) for row in rows} == {10}
    assert [row[0].removeprefix("| ").strip("`") for row in rows[2:]] == list(PLUGINS)
    by_name = dict(zip(PLUGINS, rows[2:], strict=True))
    assert by_name["chatglm"][-1] == "chatglm |"
    assert "Vicuna" in by_name["llama"][1]


@pytest.mark.parametrize("name", PLUGINS)
def test_every_plugin_names_its_releases(name):
    assert PLUGINS[name].releases
    assert PLUGINS[name].matches


def test_what_no_reader_knows_is_not_claimed(monkeypatch):
    llama = replace(PLUGINS["llama"], variants={})
    assert set(abilities(llama).values()) == {"yes"}
    block = replace(llama.block, norm=Unread())
    strange = replace(llama, block=block, final_norm=RMSNorm(eps=1e-5))
    assert abilities(strange)["decoder"] == "-"
    partly = replace(
        llama, variants={"odd": {"rope_scaling": {"type": "okapi"}}, "tied": {"tie_word_embeddings": True}}
    )
    found = abilities(partly)
    assert (found["decoder"], found["quantize"]) == ("yes, not odd", "yes")


def test_transposed_layers_are_not_quantized():
    assert abilities(replace(PLUGINS["gpt2"], variants={}))["quantize"] == "-"


def test_gguf_and_prompts_come_from_the_architecture():
    llama = PLUGINS["llama"]
    assert gguf(replace(llama, gguf=None)) == "-"
    family = replace(llama.gguf, refuses=lambda model: "tied" if model.is_tied else None)
    assert gguf(replace(llama, gguf=family, variants={"tied": llama.variants["tied"]})) == f"`{family.arch}`, not tied"
    assert prompts(llama) == "template"
    assert prompts(replace(llama, prompt=FORMATS["vicuna"])) == "vicuna"
