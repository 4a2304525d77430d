"""How the output of a block moves with those of its layers, beside the whole Jacobian of transformers' layer."""

from __future__ import annotations

import pytest
import torch
from test_learning import ARCHITECTURES
from transformers import LlamaConfig, LlamaForCausalLM

from llmkit.architecture.slots import is_of_expert
from llmkit.calibration.blocks import Blocks
from llmkit.calibration.output_moments import output_moments
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder.contract import random_checkpoint, random_ids
from llmkit.decoder.load import load_blocks
from llmkit.errors import RequirementError

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64}  # fmt: skip
THEIRS = {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
          "attn.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
          "mlp.down": "mlp.down_proj"}  # fmt: skip
N_TOKENS = 4


def test_they_are_those_of_the_jacobian(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)
    layer = model.model.layers[1]
    for weight in layer.parameters():
        weight.mul_(8)  # so that heads attend to some tokens more than to others
    model.save_pretrained(tmp_path)
    hidden = torch.randn(1, N_TOKENS, 16)
    outputs = {}
    for name, theirs in THEIRS.items():
        layer.get_submodule(theirs).register_forward_hook(lambda m, i, y, name=name: outputs.setdefault(name, y))
    table = model.model.rotary_emb(hidden, torch.arange(N_TOKENS)[None])
    out = layer(hidden.clone().requires_grad_(), position_embeddings=table)
    expected = {name: torch.zeros(2 * y.shape[-1:]) for name, y in outputs.items()}
    for k in range(out.numel()):
        for name, g in zip(outputs, torch.autograd.grad(out.flatten()[k], outputs.values(), retain_graph=True)):  # noqa: B905
            expected[name] += g[0].T @ g[0]

    n = 400
    decoder, weights = load_blocks(open_checkpoint(str(tmp_path)))
    ids = torch.randint(300, (n, N_TOKENS))
    n_rows = {f"layers.1.{name}.weight": y.shape[-1] for name, y in outputs.items()}
    blocks = Blocks(decoder, weights, ids)
    found = output_moments(blocks, 1, hidden.expand(n, -1, -1), range(n), n_rows, n_rows)
    assert set(found) == set(n_rows) - {"layers.1.mlp.down.weight"}  # which is added to what the block puts out
    for name, moments in expected.items():
        if name != "mlp.down":
            mean = found[f"layers.1.{name}.weight"] / n
            assert float((mean - moments).norm()) < 0.2 * float(moments.norm()), name
    torch.testing.assert_close(expected["mlp.down"], N_TOKENS * torch.eye(16))


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda a: a.name)
def test_every_family_has_them(architecture):
    """Of some of its layers in a block: symmetric, of finite numbers and with no negative eigenvalue."""
    ckpt = random_checkpoint(architecture, architecture.tiny_config())
    ids = random_ids(architecture, architecture.tiny_config()).repeat(3, 1)[:2]
    decoder, weights = load_blocks(ckpt)
    try:
        blocks = Blocks(decoder, weights, ids)
    except RequirementError as message:
        pytest.skip(message.message)
    with torch.inference_mode():
        hidden = torch.randn(blocks.embedded().shape, generator=torch.Generator().manual_seed(0))
    slots = ckpt.require_model().tensors().values()
    parts = {part.id: part for slot in slots if slot.kind == "linear" and slot.layer == 0 for part in slot.parts}
    n_rows = {name: part.shape[0] for name, part in parts.items()}
    asked = [name for name in parts if not is_of_expert(name)]
    found = output_moments(blocks, 0, hidden, [0, 1], asked, n_rows)
    assert found.keys() <= set(asked)
    assert found
    for name, moments in found.items():
        assert moments.shape == (n_rows[name], n_rows[name])
        least = float(torch.linalg.eigvalsh(moments.double())[0])
        assert least >= -1e-5 * float(moments.diagonal().sum()), name
