"""Every built-in plugin keeps the contract that `llmkit plugins check` runs, and the contract bites."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers

from llmkit.architecture.kinds import GatedMLP, Head
from llmkit.architecture.prompts import Instruction
from llmkit.architecture.registry import default_registry
from llmkit.decoder.contract import TOLERANCE, check_architecture

# transformers has none of these: recorded outputs of the originals in test_golden.py stand for it.
IS_4 = transformers.__version__.startswith("4.")
RECORDED = {"baichuan", "baichuan13b", "chatglm", "chatglm2", "internlm2", "moss", "qwen", "rwkv5", "rwkv6",
            "rwkv7", "yi"}  # fmt: skip
# Configs whose padded batch is another model's in transformers' own class: it does not look at the mask
# (RecurrentGemma: in its convolution), or (LFM2) lets the bias of padding through.
UNPADDED = {"llama4": 1, "recurrent_gemma": 3, "rwkv": 3, "lfm2": 3 if IS_4 else 1, "lfm2_moe": 3 if IS_4 else 1}
# What transformers 4's class does otherwise than the original and transformers 5.
OTHER_IN_4 = {
    "apertus": "keeps the weights of its activation in bfloat16, whatever the model's dtype",
    "gemma3n": "wants keys in layers that take those of others",
    "llama4": "has no biases",
    "recurrent_gemma": "has no window within a prompt",
}
PLUGINS = [default_registry().load(p) for p in default_registry().plugins if p.is_builtin]


def test_no_two_plugins_clash():
    assert PLUGINS
    assert default_registry().clashes() == []
    assert len({a.name for a in PLUGINS}) == len(PLUGINS)


@pytest.mark.parametrize("architecture", PLUGINS, ids=lambda a: a.name)
def test_contract(architecture):
    if IS_4 and architecture.name in OTHER_IN_4:
        pytest.skip(f"transformers {transformers.__version__}'s class {OTHER_IN_4[architecture.name]}")
    # The other clauses depend on torch alone, which is the same in both passes of CI.
    checks = check_architecture(architecture, of="transformers'" if IS_4 else "")
    assert [f"{c.name}: {c.problem}" for c in checks if not c.is_ok] == []
    compared = [c for c in checks if c.name.endswith("logits") and c.difference is not None]
    if architecture.name in RECORDED:
        return
    if not compared and IS_4:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture.matches[0]}")
    configs = [architecture.tiny_config(variant) for variant in (None, *architecture.variants)]
    known = [c for c in configs if "rope_parameters" not in c or not IS_4]
    assert len(compared) == len(known)
    assert all(c.difference <= TOLERANCE for c in compared)
    padded = [c for c in checks if c.name.endswith("padded batch") and c.difference is not None]
    assert len(padded) == len(compared) - UNPADDED.get(architecture.name, 0)


@pytest.mark.parametrize(
    ("changes", "clause"),
    [
        ({"block": "act"}, "transformers' logits"),
        ({"head": Head(tied=True)}, "transformers' logits"),
        ({"names": "swap"}, "transformers' logits"),
        ({"names": "lose"}, "names and shapes"),
        ({"prompt": Instruction("Answer:", "{input}")}, "prompt"),
    ],
    ids=["activation", "tying", "swapped names", "lost name", "prompt"],
)
def test_the_contract_bites(changes, clause):
    right = next(a for a in PLUGINS if a.name == "llama")
    if changes.get("block") == "act":
        changes = {"block": replace(right.block, mlp=GatedMLP("relu"))}
    if changes.get("names") == "swap":
        slots = dict(right.names.slots)
        slots["mlp.gate"], slots["mlp.up"] = slots["mlp.up"], slots["mlp.gate"]
        changes = {"names": replace(right.names, slots=slots)}
    if changes.get("names") == "lose":
        changes = {"names": replace(right.names, slots={k: v for k, v in right.names.slots.items() if k != "attn.o"})}
    wrong = replace(right, variants={}, **changes)
    bad = [c.name for c in check_architecture(wrong) if not c.is_ok]
    assert any(name.endswith(clause) for name in bad)
