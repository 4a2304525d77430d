"""Every family's graph against its torch decoder: each op for attention, each variant of the tiny model.

The torch decoders are held to transformers and to recordings of the originals elsewhere; ONNX Runtime is the judge of
the graph. `Packed` and `KVCache` are the ones that evaluation and generation use.
"""

from __future__ import annotations

import pytest
import torch

from llmkit.architecture.scaling import DynamicNTK, LongRope
from llmkit.decoder.kv import KVCache
from llmkit.decoder.packed import Packed
from llmkit.errors import RequirementError
from llmkit.onnx.parity import compare_decoders

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
from rotation import EVERY_WAY, rotated
from tiny_graphs import CASES, PLUGINS, is_refused, made

TOLERANCE = 1e-5


# Every variant is in test_onnx_contract.py (with GQA) and in test_onnx_padding.py (with Attention).
@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name, variant in CASES if variant is None or name in EVERY_WAY],
    ids=lambda x: str(x).replace(" ", "-"),
)
def test_logits(name, variant):
    found, wanted, ends = made(name, variant, check=True)
    # Beyond its border longrope turns earlier keys anew, which no cache can: such steps are not one computation.
    skipped = ("cached steps",) if wanted.exact_sharing_limit and wanted.exact_sharing_limit < 12 else ()
    worst = {d.case: d.largest for d in compare_decoders(found, wanted, suffix=ends) if d.case not in skipped}
    assert all(x <= TOLERANCE for x in worst.values()), worst


@pytest.mark.parametrize(("name", "attention"), rotated(PLUGINS, ["gqa", "flash", "mha"]))
def test_other_ops_for_attention(name, attention):
    if is_refused(name, attention):
        with pytest.raises(RequirementError) as caught:
            made(name, attention=attention)
        assert "--attention attention" in caught.value.hint
        return
    found, wanted, ends = made(name, attention=attention)
    worst = {d.case: d.largest for d in compare_decoders(found, wanted, suffix=ends)}
    assert all(x <= TOLERANCE for x in worst.values()), worst


@pytest.mark.parametrize("attention", ["attention", "gqa"])
@pytest.mark.parametrize(("name", "kind"), [("llama", DynamicNTK), ("phi3", LongRope)])
def test_angles_change_beyond_the_border_and_not_before(name, kind, attention):
    variants = [v for n, v in CASES if n == name and isinstance(scaling_of(n, v), kind)]
    assert variants
    for variant in variants:
        border = scaling_of(name, variant).max_position
        found, wanted, _ = made(name, variant, attention=attention)
        for n in (border - 1, border, border + 1, 2 * border):
            ids = torch.randint(0, 90, (2, n), generator=torch.Generator().manual_seed(n))
            for padding in (0, 2):  # the first row is as long as before
                mask = torch.ones_like(ids)
                mask[1, :padding] = 0
                difference = (found(ids, mask=mask) - wanted(ids, mask=mask))[mask != 0].abs().max()
                assert float(difference) <= TOLERANCE, (variant, n, padding)


def scaling_of(name, variant):
    """How the rotary positions of a tiny model reach further; None without any."""
    position = PLUGINS[name].bind(PLUGINS[name].tiny_config(variant)).block.position
    return getattr(position, "bound_scaling", None)


@pytest.mark.parametrize("attention", ["gqa", "flash", "mha"])
@pytest.mark.parametrize("variant", ["by-layer", "unscaled"])
def test_scales_of_scores_that_are_not_the_ops_own(variant, attention):
    """GPT-2's: a scale of its own for each layer, or none. The ops take 1 / sqrt(head size) where nothing is said."""
    found, wanted, _ = made("gpt2", variant, attention=attention)
    worst = {d.case: d.largest for d in compare_decoders(found, wanted)}
    assert all(x <= TOLERANCE for x in worst.values()), worst


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "rwkv", "chatglm2"])
def test_a_shared_prefix_is_the_plain_computation(name):
    found, wanted, _ = made(name)
    ids = torch.randint(0, 90, (1, 16), generator=torch.Generator().manual_seed(5))
    results = []
    for decoder in (found, wanted):
        prefix = KVCache()
        decoder(ids[:, :6], prefix)
        packed = Packed(prefix, [5, 3, 5], keep=True)
        row = torch.cat([ids[:, 6:11], ids[:, 6:9], ids[:, 9:14]], 1)
        first = decoder(row, packed)
        after = decoder(ids[:, 9:12], packed.segment(1))
        results.append(torch.cat([first, after], 1))
    assert torch.allclose(*results, atol=1e-5)
    whole = wanted(ids[:, :12])
    assert torch.allclose(results[0][:, -3:], whole[:, 9:12], atol=1e-5)


def test_prompts_of_a_prefix_lm_lie_side_by_side():
    found, wanted, ends = made("chatglm")
    assert found.exact_sharing_limit == 0
    one, other = [5, 6, *ends, 7, 8, 9], [4, *ends, 3]
    row = torch.tensor([one + other])
    a, b = (d(row, Packed(None, [len(one), len(other)])) for d in (found, wanted))
    assert torch.allclose(a, b, atol=1e-5)
