"""The gradient of a block's error by its stored weights, in every family, beside what moving the weights does."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.registry import default_registry
from llmkit.calibration.blocks import Blocks
from llmkit.calibration.learning import BlockOutputError
from llmkit.decoder.contract import random_checkpoint, random_ids
from llmkit.decoder.load import load_blocks
from llmkit.errors import RequirementError

ARCHITECTURES = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}


def error_of(architecture, index=1, seed="0 1"):
    """The error of a block whose targets are its own outputs, and its linear weights by name."""
    config = architecture.tiny_config()
    experts = [b.mlp for b in architecture.bind(config).blocks if isinstance(getattr(b, "mlp", None), Experts)]
    if experts and "num_experts_per_tok" in config:  # each token to all of them: a choice that changes is no slope
        config |= {"num_experts_per_tok": experts[0].n_experts, "topk_group": config.get("n_group")}
    ckpt = random_checkpoint(architecture, config)
    ids = random_ids(architecture, config).repeat(3, 1)[:5]
    decoder, weights = load_blocks(ckpt)
    blocks = Blocks(decoder, weights, ids)
    index = min(index, len(blocks) - 1)
    with torch.inference_mode():
        shape = blocks.embedded().shape  # as wide as what layers hand on, which may be more than hidden states
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        targets = blocks.outputs(index, hidden, weights, list(range(5)))
    slots = ckpt.require_model().tensors()
    names = [n for n, slot in slots.items() if slot.kind == "linear" and slot.layer == index and not slot.is_transposed]
    compute = partial(blocks.outputs, index, hidden)
    error = BlockOutputError(compute, weights, targets, slots, seed, lambda done, text: None, None)
    return error, {name: ckpt.tensors[name].load() for name in names}


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda a: a.name)
def test_gradients_are_the_slopes_of_the_error(architecture):
    blocks = architecture.bind(architecture.tiny_config()).blocks
    if any(isinstance(getattr(b, "mlp", None), Experts) and not isinstance(b.mlp.router, Router) for b in blocks):
        pytest.skip(f"the router of {architecture.name} has steps, where there is no slope")
    try:
        error, weights = error_of(architecture)
    except RequirementError as message:
        pytest.skip(message.message)
    if not weights:
        pytest.skip(f"{architecture.name} stores its linear layers transposed, which no layout of codes holds")
    assert error.value(weights, [0, 3]) == pytest.approx([0.0, 0.0], abs=1e-15)
    generator = torch.Generator().manual_seed(1)
    moved = {n: w + 0.05 * w.std() * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    _, gradients = error.gradient(moved, [0, 3])
    assert {n: tuple(g.shape) for n, g in gradients.items()} == {n: tuple(w.shape) for n, w in weights.items()}
    for name, gradient in gradients.items():
        norm = gradient.norm()
        if name.split(".")[-3] == "indexer":  # it chooses tokens, of which there are too few for a choice
            assert norm == 0
            assert error.value({**moved, name: -moved[name]}, [0, 3]) == error.value(moved, [0, 3])
            continue
        assert norm > 0, name
        step = 0.0003 * weights[name].norm() * gradient / norm
        above, below = (sum(error.value(moved | {name: moved[name] + sign * step}, [0, 3])) / 2 for sign in (1, -1))
        assert (above - below) / 2 == pytest.approx(float((gradient * step).sum()), rel=0.05), name


def test_samples_are_drawn_equally_often_and_alike_for_a_seed():
    (one, _), (two, _) = error_of(ARCHITECTURES["llama"]), error_of(ARCHITECTURES["llama"])
    drawn = [one.draw(2) for _ in range(10)]
    assert drawn == [two.draw(2) for _ in range(10)]
    assert sorted(k for each in drawn for k in each) == sorted(list(range(5)) * 4)
    assert drawn != [error_of(ARCHITECTURES["llama"], seed="1 1")[0].draw(2) for _ in range(10)]


def test_weights_that_stand_beside_are_computed_with():
    error, weights = error_of(ARCHITECTURES["llama"])
    name = "model.layers.1.mlp.down_proj.weight"
    moved = weights[name] * 1.1
    rest = {n: w for n, w in weights.items() if n != name}
    beside = error.with_weights({"layers.1.mlp.down.weight": moved})
    assert beside.value(rest, [1]) == pytest.approx(error.value(weights | {name: moved}, [1]))
    assert error.value(rest, [1]) == [0.0]
