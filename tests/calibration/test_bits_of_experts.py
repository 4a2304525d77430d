"""Models with experts: what bits are chosen among, and what is told of experts."""

from __future__ import annotations

import pytest
import torch

from llmkit.architecture.registry import default_registry
from llmkit.calibration.bit_allocation import Target, choose_bits
from llmkit.calibration.block_quantizer import BlockQuantizer
from llmkit.calibration.ranks import Ranks
from llmkit.decoder.contract import random_checkpoint
from llmkit.errors import InputError
from llmkit.quantization.matrix import Grid
from llmkit.quantization.method import Task, method_named
from llmkit.tensors.constant import constant
from llmkit.tensors.spec import DType
from llmkit.transforms.candidates import Candidates, codec_candidates
from llmkit.transforms.convert import convert
from llmkit.transforms.convert.gguf_recipe import block_candidates

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture(scope="module")
def experts():
    """Mixtral with two layers of four experts, rows of 64 and 96 weights."""
    architecture = default_registry().load(next(p for p in default_registry().plugins if p.name == "mixtral"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4}
    return random_checkpoint(architecture, architecture.tiny_config() | sizes)


def candidates_of(ckpt, layout) -> Candidates:
    if layout == "gguf":
        return block_candidates(ckpt, convert(ckpt, to="gguf"), {})
    return codec_candidates(ckpt, layout, recipe={}, keep=(), only=())


def test_stacks_of_experts_have_a_choice_in_gguf_and_its_size(experts):
    found = candidates_of(experts, "gguf").matrices
    stacks = {f"blk.{i}.ffn_{part}_exps.weight" for i in (0, 1) for part in ("gate", "up", "down")}
    assert stacks < found.keys()
    for i in range(2):  # of the types that 32 divides
        recipe = {name: found[name][i].scheme for name in stacks}
        written = convert(experts, to="gguf", recipe=recipe)
        assert {name: found[name][i].nbytes for name in stacks} == {n: written.tensors[n].spec.nbytes for n in stacks}


@pytest.mark.parametrize(
    ("layout", "roles"),
    [
        ("compressed-tensors", {"model.layers.*.block_sparse_moe.experts.*.w1, w3, w2": "0-1"}),
        ("gguf", {f"blk.*.ffn_{part}_exps": "0-1" for part in ("gate", "up", "down")}),
    ],
)
def test_experts_are_told_by_all_their_layers_and_a_broken_one_by_its_name(experts, layout, roles):
    made = candidates_of(experts, layout)
    n, least = sum(lazy.spec.numel for lazy in experts.tensors.values()), made.fixed_nbytes
    least += sum(min(c.nbytes for c in options) for options in made.matrices.values())
    target = Target(bits=8 * (least + 100) / n)
    chosen = choose_bits(experts, target, made, None)
    assert roles.items() <= {choice.role: choice.layers for choice in chosen.choices}.items()
    tensors = {**experts.tensors, EXPERT: constant(torch.full(experts.tensors[EXPERT].shape, torch.nan))}
    broken = experts.derive(tensors=tensors)
    with pytest.raises(InputError, match=r"^layers\.1\.mlp\.experts\.2\.gate\.weight: the weights hold NaN"):
        choose_bits(broken, target, candidates_of(broken, layout), None)
    with pytest.raises(InputError, match="does not get as small") as caught:
        choose_bits(experts, Target(bits=0.5), made, None)
    assert ("--format gguf" in str(caught.value.hint)) == (layout != "gguf")


@pytest.mark.parametrize("method", ["gptq", "signround"])
def test_an_expert_that_no_token_reached_is_told(experts, method):
    task = Task(experts.tensors[EXPERT], method_named(method, is_calibrated=True), Grid(4, 32), DType.F32, EXPERT)
    hook = BlockQuantizer({EXPERT: task}, experts.require_model().tensors(), Ranks())
    hook.settle(["layers.1.mlp.experts.2.gate.weight"], task.weight.load())
    assert "no token of the text reached them" in hook.notes[EXPERT]
