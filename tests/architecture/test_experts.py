"""However files store experts, the weights of the kinds are matrices of one expert each; routers bind what they can."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmkit.architecture.experts import Router
from llmkit.architecture.names import Stacked
from llmkit.architecture.registry import default_registry
from llmkit.architecture.storage import part_of, parts_of, stored, tensors_of, weights_of
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.experts import build_router
from llmkit.errors import SpecError
from llmkit.tensors.constant import constant
from llmkit.tensors.lazy import Context
from llmkit.tensors.moving import Stack

E, H, F = 4, 32, 48
MIXTRAL = default_registry().load(next(p for p in default_registry().plugins if p.name == "mixtral"))


def spelled(**form):
    own = {slot: name for slot, name in MIXTRAL.names.slots.items() if ".experts." not in slot}
    stacks = {
        "mlp.experts.gate_up": Stacked("mlp.experts.gate_up_proj", ("gate", "up"), **form),
        "mlp.experts.down": Stacked("mlp.experts.down_proj", ("down",), **{**form, "rows": "stacked"}),
    }
    config = MIXTRAL.tiny_config()
    model = MIXTRAL.bind(config)
    return random_checkpoint(MIXTRAL, config), model, model.spelled(replace(MIXTRAL.names, slots={**own, **stacks}))


def test_experts_one_by_one():
    model = MIXTRAL.bind(MIXTRAL.tiny_config())
    slot = model.slots["layers.1.mlp.experts.3.up.weight"]
    assert (slot.name, slot.shape) == ("model.layers.1.block_sparse_moe.experts.3.w3.weight", (F, H))
    assert model.table.slot("model.layers.1.block_sparse_moe.experts.3.w3.weight") == slot.id
    assert model.table.slot("model.layers.1.block_sparse_moe.experts.3.w4.weight") is None


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rows", ["stacked", "interleaved"])
def test_stacks_are_what_published_models_have(rows, is_transposed):
    ckpt, model, other = spelled(rows=rows, is_transposed=is_transposed)
    weights = weights_of(ckpt.tensors, model)
    tensors = tensors_of(weights, other)
    gates = torch.stack([weights[f"layers.0.mlp.experts.{e}.gate.weight"].load() for e in range(E)])
    ups = torch.stack([weights[f"layers.0.mlp.experts.{e}.up.weight"].load() for e in range(E)])
    expected = torch.cat([gates, ups], 1) if rows == "stacked" else torch.stack([gates, ups], 2).flatten(1, 2)
    fused = tensors["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(fused.load(), expected.mT if is_transposed else expected)
    assert torch.equal(Context().rows(fused, (1, 3)), (expected.mT if is_transposed else expected)[1:3])
    assert not other.table.faults(other.slots)
    # Read back from what a file holds, whole and one by one.
    held = {name: constant(lazy.load()) for name, lazy in tensors.items()}
    back = weights_of(held, other)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name].load(), lazy.load()) for name, lazy in weights.items())
    slot = other.slots["layers.0.mlp.experts.gate_up.weight"]
    assert torch.equal(part_of(held[slot.name], slot, "layers.0.mlp.experts.2.up.weight").load(), ups[2])


def test_biases_of_interleaved_stacks():
    slot = spelled(rows="interleaved")[2].slots["layers.0.mlp.experts.gate_up.weight"]
    bias = slot._replace(shape=(E, 2 * F), parts=tuple(p._replace(shape=(F,)) for p in slot.parts))
    data = torch.arange(E * 2 * F, dtype=torch.float32).view(E, 2 * F)
    parts = parts_of(constant(data), bias)
    assert torch.equal(parts["layers.0.mlp.experts.1.up.weight"].load(), data[1, 1::2])
    assert torch.equal(stored(parts, bias).load(), data)


def test_only_equal_tensors_are_stacked():
    with pytest.raises(SpecError, match="cannot stack"):
        Stack([constant(torch.zeros(2, 3)), constant(torch.zeros(3, 2))])


@pytest.mark.parametrize(
    "values",
    [
        {"count": 4, "top_k": 5},
        {"count": 10**9, "top_k": 2},
        {"count": 4, "top_k": 0},
        {"count": 4, "top_k": 1.5},
        {"count": 6, "top_k": 2, "groups": 4},
        {"count": 8, "top_k": 3, "groups": 4, "top_groups": 1},
    ],
)
def test_a_router_that_cannot_be(values):
    with pytest.raises(SpecError, match="experts"):
        Router(**values).bind({})


class Given:
    """Weights by leaf name."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def __call__(self, leaf):
        return self.tensors[leaf]

    def has(self, leaf):
        return leaf in self.tensors


def test_groups_and_correction_choose_and_scores_weigh():
    """By hand: group {2, 3} wins by its best two, though expert 0 has the highest score; 3 wins by its correction."""
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0]])
    weights = Given(weight=torch.eye(4), correction=torch.tensor([0.0, 0.0, 0.0, 0.5]))
    router = Router(
        4, 1, scores="sigmoid", is_normalized=False, scale=2.0, correction=True, groups=2, top_groups=1,
        group_score="top2",
    )  # fmt: skip
    chosen, shares = build_router(router, weights)(logits)
    assert chosen.tolist() == [[3]]
    assert torch.allclose(shares, 2 * torch.sigmoid(torch.tensor([[2.0]])))


def test_softmax_of_the_chosen_is_the_normalised_softmax():
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    weights = Given(weight=torch.eye(8))
    after = build_router(Router(8, 3, scores="chosen_softmax"), weights)(logits)
    before = build_router(Router(8, 3, is_normalized=True), weights)(logits)
    assert torch.equal(after[0], before[0])
    assert torch.allclose(after[1], before[1])
