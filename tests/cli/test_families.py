"""The table of families says what can be done, by doing it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from gguf import MODEL_ARCH_NAMES

from llmkit.architecture.architecture import NOT_IN_GGUF
from llmkit.architecture.kinds import Kind, RMSNorm, SlotShape
from llmkit.architecture.prompts import FORMATS
from llmkit.architecture.registry import default_registry
from llmkit.cli.families import Ability, abilities, prompts
from llmkit.cli.reference import FAMILIES

PLUGINS = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}


@dataclass(frozen=True)
class Unread(Kind):
    """A norm that nothing reads."""

    def slots(self) -> dict[str, SlotShape]:
        return {"weight": SlotShape(("hidden",), "norm")}


def test_a_row_for_each_plugin():
    """In the generated reference, of which .ci/run checks that it is what `families()` gives today."""
    text = FAMILIES.read_text(encoding="utf-8").partition("<!-- families -->\n\n")[2]
    table, _, reasons = text.partition("\n\nWhat is not possible, and why:\n\n")
    rows = [line.split(" | ") for line in table.splitlines()]
    assert {len(row) for row in rows} == {10}
    assert [row[0].removeprefix("| ").strip("`") for row in rows[2:]] == list(PLUGINS)
    by_name = dict(zip(PLUGINS, rows[2:], strict=True))
    assert by_name["chatglm"][-1] == "chatglm |"
    assert "Vicuna" in by_name["llama"][1]
    unexplained = [
        (name, verb)
        for name, row in by_name.items()
        for verb, cell in zip(("decoder", "delta", "LoRA", "quantize", "ONNX", "GGUF"), row[3:9], strict=True)
        if (cell == "-" or ", not " in cell)
        and not any(line.startswith(f"- {verb}: ") and f"`{name}`" in line for line in reasons.splitlines())
    ]
    assert not unexplained


@pytest.mark.parametrize("name", PLUGINS)
def test_every_plugin_names_its_releases(name):
    assert PLUGINS[name].releases
    assert PLUGINS[name].matches


@pytest.mark.parametrize("name", [name for name, plugin in PLUGINS.items() if plugin.gguf is None])
def test_no_family_that_llama_cpp_knows_is_passed_over_in_silence(name):
    known = {arch.replace("-", "").replace("_", "") for arch in MODEL_ARCH_NAMES.values()}
    plugin = PLUGINS[name]
    own = {model_type.replace("_", "") for model_type in plugin.model_types}
    assert plugin.no_gguf != NOT_IN_GGUF or not own & known or plugin.model_types == ("chatglm",)  # ChatGLM2's


def test_what_no_reader_knows_is_not_claimed(monkeypatch):
    llama = replace(PLUGINS["llama"], variants={})
    assert {ability.cell for ability in abilities(llama).values()} == {"yes", "`llama`"}
    block = replace(llama.block, norm=Unread())
    strange = replace(llama, block=block, final_norm=RMSNorm(eps=1e-5))
    assert abilities(strange)["decoder"] == Ability("-", ("the torch decoder has no reader for the kind Unread",))
    partly = replace(
        llama, variants={"odd": {"rope_scaling": {"type": "okapi"}}, "tied": {"tie_word_embeddings": True}}
    )
    found = abilities(partly)
    assert (found["decoder"].cell, found["quantize"].cell) == ("yes, not odd", "yes")


def test_transposed_layers_are_not_quantized():
    assert abilities(replace(PLUGINS["gpt2"], variants={}))["quantize"].cell == "`gptq`"


def test_gguf_and_prompts_come_from_the_architecture():
    llama = PLUGINS["llama"]
    none = replace(llama, gguf=None, no_gguf="not written", variants={})
    assert abilities(none)["GGUF"] == Ability("-", ("not written",))
    some = replace(llama, variants={name: llama.variants[name] for name in ("tied", "dynamic")})
    reason = "rope_scaling is 'dynamic', here 'none'"  # what a file would be read back as
    assert abilities(some)["GGUF"] == Ability("`llama`, not dynamic", (reason,))
    nemotron = replace(PLUGINS["nemotron"], variants={"tied": PLUGINS["nemotron"].variants["tied"]})
    assert abilities(nemotron)["GGUF"] == Ability("`nemotron`", ())
    assert prompts(llama) == "template"
    assert prompts(replace(llama, prompt=FORMATS["vicuna"])) == "vicuna"
