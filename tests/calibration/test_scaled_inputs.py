"""Scales of inputs: which layers of each family's wiring take them, and that a model with them is the same function."""

from __future__ import annotations

import pytest
import torch

from llmkit.architecture.folds import Fold, folds
from llmkit.architecture.kinds import LayerNorm, RMSNorm
from llmkit.architecture.registry import default_registry
from llmkit.architecture.storage import stored
from llmkit.calibration.learning import KeptWeights
from llmkit.calibration.scaling import folded_weights
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint, random_ids
from llmkit.decoder.load import load_blocks
from llmkit.tensors.constant import constant

ARCHITECTURES = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}
CASES = [(a, v) for a in ARCHITECTURES.values() for v in (None, *a.variants)]
NORMS = {"attn_norm": "q k v", "mlp_norm": "gate up"}
PLAIN = {"attn_norm": "q k v", "mlp_norm": "up", "v": "o"}
LLAMA = {**NORMS, "v": "o", "up": "down"}
# Source -> readers in the first layer. BLOOM (one way) and ChatGLM add to what their norms give; OPT-350m norms the
# sum; RWKV is no attention; GPT-J and Falcon have one norm for both; GELU is not homogeneous, ReLU is.
EXPECTED = {
    "llama": LLAMA, "bloom": PLAIN, "gemma2": LLAMA, "phi3": LLAMA, "chatglm2": LLAMA, "gpt_neox": PLAIN, "gpt2": PLAIN,
    "bloom-normed-residual": {"v": "o"}, "chatglm": {"v": "o"}, "rwkv": {}, "opt": {**PLAIN, "up": "down"},
    "opt-350m": {"v": "o", "up": "down"}, "gptj": {"attn_norm": "q k v up", "v": "o"},
    "falcon": {"attn_norm": "q k v up", "v": "o"},
}  # fmt: skip


def scaled(ckpt, seed=0):
    """The float checkpoint with a random scale in every fold, and how many folds there were."""
    model = ckpt.require_model()
    weights = KeptWeights(load_blocks(ckpt)[1], {})
    dtypes = {part: ckpt.tensors[model.slots[slot].name].dtype.torch for part, slot in model.stored_in.items()
              if model.slots[slot].name in ckpt.tensors}  # fmt: skip
    generator, given, n = torch.Generator().manual_seed(seed), {}, 0
    for fold in [fold for layer in range(len(model.blocks)) for fold in folds(model, layer)]:
        n_in = weights(fold.weights[0]).shape[1]
        scale = (2 * torch.randn(n_in // fold.repeats, generator=generator)).exp()
        given |= folded_weights(fold, scale, weights.replaced(given), dtypes)
        n += 1
    new, tensors = weights.replaced(given), dict(ckpt.tensors)
    for slot in {model.stored_in[leaf] for leaf in given}:
        parts = {part.id: constant(new(part.id)) for part in model.slots[slot].parts}
        name = model.slots[slot].name
        tensors[name] = stored(parts, model.slots[slot]).cast(ckpt.tensors[name].dtype)
    return ckpt.derive(tensors=tensors), n


@pytest.mark.parametrize(("architecture", "variant"), CASES, ids=lambda x: getattr(x, "name", x) or "tiny")
def test_a_scaled_model_gives_the_same_logits(architecture, variant):
    config = architecture.tiny_config(variant)
    ckpt, ids = random_checkpoint(architecture, config), random_ids(architecture, config)
    changed, n = scaled(ckpt)
    before, after = load_decoder(ckpt)(ids), load_decoder(changed)(ids)
    assert (after - before).abs().max() < 2e-4 * before.abs().max().clamp(min=1)
    differing = sum(not torch.equal(changed.tensors[name].load(), ckpt.tensors[name].load()) for name in ckpt.tensors)
    assert differing >= n  # a scale that nobody puts in place would change nothing, too
    expected = EXPECTED.get(f"{architecture.name}-{variant}" if variant else architecture.name)
    if expected is not None:
        found = {
            fold.source.rpartition(".")[2]: " ".join(reader.rpartition(".")[2] for reader in fold.readers)
            for fold in folds(ckpt.require_model(), 0)
        }
        assert found == expected


class Given:
    """Weights by id."""

    def __init__(self, weights):
        self.weights = weights
        self.has = weights.__contains__

    def __call__(self, leaf):
        return self.weights[leaf]


@pytest.mark.parametrize("kind", [RMSNorm(1e-5), RMSNorm(1e-5, offset=1.0), LayerNorm(1e-5)], ids=repr)
def test_columns_are_multiplied_by_what_a_rounded_norm_takes_off(kind):
    """A norm in half precision holds no quotient exactly; 0 takes nothing off, nor does what float16 cannot hold."""
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn((2, 16), generator=g).half().float()
    weight[3], weight[5] = -getattr(kind, "offset", 0.0), 6e4
    given = {"n.weight": weight, "n.bias": bias, "m.q.weight": torch.randn((8, 16), generator=g)}
    given = given if isinstance(kind, LayerNorm) else {k: v for k, v in given.items() if k != "n.bias"}
    scale = torch.randn(16, generator=g).exp()
    scale[5] = 1e-3
    made = folded_weights(Fold("n", ("m.q",), kind), scale, Given(given), dict.fromkeys(given, torch.float16))
    offset = getattr(kind, "offset", 0.0)
    before = (weight + offset) * given["m.q.weight"]
    torch.testing.assert_close((made["n.weight"] + offset) * made["m.q.weight"], before, rtol=1e-6, atol=0)
    assert made["n.weight"].half().float().equal(made["n.weight"])
    columns = (made["m.q.weight"] / given["m.q.weight"])[0]
    assert columns[3] == columns[5] == 1
    rest = [i for i in range(16) if i not in (3, 5)]
    torch.testing.assert_close(columns[rest], scale[rest], rtol=0.02, atol=0)
    if "n.bias" in given:
        torch.testing.assert_close(
            made["n.bias"] * made["m.q.weight"], bias * given["m.q.weight"], rtol=2e-3, atol=1e-6
        )
