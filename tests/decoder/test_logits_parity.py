"""The decoder against transformers on random tiny models: each variant, whole, in steps, padded, packed, a trie."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.decoder.kv import KVCache
from llmkit.decoder.packed import Packed
from llmkit.errors import InputError

LLAMA = next(default_registry().load(p) for p in default_registry().plugins if p.name == "llama")
VARIANTS = ["tiny", *LLAMA.variants]
TOLERANCE = 1e-5


def config_of(variant):
    return LLAMA.tiny_config(None if variant == "tiny" else variant)


def their_model(config, folder):
    """A transformers model with seeded weights of a size that makes every part matter, saved by transformers."""
    torch.manual_seed(7)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            elif name.endswith("bias"):
                weight.copy_(0.2 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * (1.5 * weight.shape[-1] ** -0.5))
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def get(variant):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            theirs = their_model(config_of(variant), folder)
            made[variant] = (load_decoder(open_checkpoint(folder)), theirs)
        return made[variant]

    return get


def ids_of(n, batch=1, seed=1):
    return torch.randint(3, 96, (batch, n), generator=torch.Generator().manual_seed(seed))


def expected(theirs, ids, **kwargs):
    with torch.inference_mode():
        # A fresh position table: transformers keeps the frequencies of the longest sequence it has seen.
        rotary = theirs.model.rotary_emb
        rotary.inv_freq, rotary.max_seq_len_cached = rotary.original_inv_freq, rotary.original_max_seq_len
        return theirs(ids, use_cache=False, **kwargs).logits


def close(found, wanted, tolerance=TOLERANCE):
    assert found.dtype is torch.float32
    assert found.shape == wanted.shape
    scale = max(1.0, float(wanted.abs().max()))
    assert float((found - wanted).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_sequence(pairs, variant):
    ours, theirs = pairs(variant)
    ids = ids_of(20, batch=2)
    close(ours(ids), expected(theirs, ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_matter(pairs, variant):
    """A variant that computed the same as the plain model would prove nothing."""
    if variant in ("tiny", "dynamic"):  # dynamic NTK is plain RoPE up to max_position; see the test of longer ones
        return
    config, plain = config_of(variant), config_of("tiny")
    assert config != plain
    ours = pairs(variant)[0]
    if ours.model.block.position != pairs("tiny")[0].model.block.position:
        assert not torch.allclose(ours(ids_of(20)), pairs("tiny")[0](ids_of(20)), atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_by_step(pairs, variant):
    ours, theirs = pairs(variant)
    ids = ids_of(20, batch=2)
    cache = KVCache()
    parts = [ours(ids[:, :7], cache), ours(ids[:, 7:12], cache)]
    parts += [ours(ids[:, i : i + 1], cache) for i in range(12, 20)]
    close(torch.cat(parts, 1), expected(theirs, ids))
    assert cache.length == 20


@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padded_batch(pairs, variant):
    ours, theirs = pairs(variant)
    short, long = ids_of(9, seed=2), ids_of(16, seed=3)
    ids = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.long), short], 1), long])
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :7] = 0
    cache = KVCache()
    first = ours(ids[:, :12], cache, mask[:, :12])
    rest = [ours(ids[:, i : i + 1], cache) for i in range(12, 16)]
    found = torch.cat([first, *rest], 1)
    close(found[:1, 7:], expected(theirs, short))
    close(found[1:], expected(theirs, long))
    close(ours(ids, mask=mask)[:1, 7:], expected(theirs, short))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("has_prefix", [True, False])
def test_packed_segments(pairs, variant, has_prefix):
    ours, theirs = pairs(variant)
    prefix = ids_of(8, seed=4) if has_prefix else ids_of(0)
    segments = [ids_of(n, seed=10 + n) for n in (3, 1, 6, 3)]
    cache = None
    if has_prefix:
        cache = KVCache()
        ours.hidden(prefix, cache)
    packed = Packed(cache, [s.shape[1] for s in segments])
    found = ours(torch.cat(segments, 1), packed)
    for start, end, segment in zip(packed.starts, packed.ends, segments, strict=True):
        whole = expected(theirs, torch.cat([prefix, segment], 1))
        close(found[:, start : end + 1], whole[:, prefix.shape[1] :])


@pytest.mark.parametrize("variant", ["tiny", "multi-head", "multi-query", "llama3", "yarn"])
def test_trie_of_depth_three(pairs, variant):
    ours, theirs = pairs(variant)
    root, level1 = ids_of(5, seed=1), [ids_of(4, seed=2), ids_of(2, seed=3)]
    level2 = [ids_of(3, seed=4), ids_of(5, seed=5), ids_of(1, seed=6)]
    top = Packed(None, [5], keep=True)
    ours.hidden(root, top)
    middle = Packed(top.segment(0), [4, 2], keep=True)
    ours.hidden(torch.cat(level1, 1), middle)
    for i, inner in enumerate(level1):
        leaves = Packed(middle.segment(i), [s.shape[1] for s in level2])
        found = ours(torch.cat(level2, 1), leaves)
        for start, end, leaf in zip(leaves.starts, leaves.ends, level2, strict=True):
            whole = expected(theirs, torch.cat([root, inner, leaf], 1))
            close(found[:, start : end + 1], whole[:, -leaf.shape[1] :])


def test_segments_are_independent_caches(pairs):
    ours, theirs = pairs("tiny")
    packed = Packed(None, [4, 6], keep=True)
    ids = ids_of(10)
    ours.hidden(ids, packed)
    one, again = packed.segment(1), packed.segment(1)
    ours.hidden(ids_of(3, seed=8), one)
    assert (one.length, again.length) == (9, 6)
    close(ours(ids_of(2, seed=9), again), expected(theirs, torch.cat([ids[:, 4:], ids_of(2, seed=9)], 1))[:, 6:])


def test_dynamic_ntk_beyond_its_context(pairs):
    """max_position is 24: the base grows with the sequence, each row by its own length."""
    ours, theirs = pairs("dynamic")
    for n in (24, 25, 40, 60):
        ids = ids_of(n, seed=n)
        close(ours(ids), expected(theirs, ids))
    assert not torch.allclose(ours(ids_of(40)), pairs("tiny")[0](ids_of(40)), atol=1e-3)
    long, short = ids_of(40, seed=5), ids_of(30, seed=6)
    packed = Packed(None, [40, 30])
    found = ours(torch.cat([long, short], 1), packed)
    close(found[:, :40], expected(theirs, long))
    close(found[:, 40:], expected(theirs, short))
    assert ours.exact_sharing_limit == 24
    assert pairs("yarn")[0].exact_sharing_limit is None


@pytest.mark.parametrize("length", [63, 64, 65, 130])
def test_prefill_across_blocks(pairs, length):
    """The CPU kernel works in blocks of 64 query rows."""
    ours, theirs = pairs("tiny")
    ids = ids_of(length + 70, batch=2)
    cache = KVCache(8)
    found = torch.cat([ours(ids[:, :length], cache), ours(ids[:, length:], cache)], 1)
    close(found, expected(theirs, ids))
    packed = Packed(None, [length], keep=True)
    ours.hidden(ids[:1, :length], packed)
    close(ours(ids[:1, length:], Packed(packed.segment(0), [70])), expected(theirs, ids)[:1, length:])


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision(pairs, tmp_path, dtype, tolerance):
    _, theirs = pairs("tiny")
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(open_checkpoint(tmp_path), dtype=dtype)
    ids = ids_of(20, batch=2)
    found = ours(ids)
    close(found, expected(theirs, ids), tolerance)
    assert ours.hidden(ids).dtype is getattr(torch, dtype)
    cache = KVCache()
    ours.hidden(ids[:, :15], cache)
    close(ours(ids[:, 15:], cache), found[:, 15:], tolerance)


def test_half_precision_logits_keep_float32_detail(pairs, tmp_path):
    """The head's products and sums are float32: equal to torch's on the same half-precision operands."""
    pairs("tied")[1].save_pretrained(tmp_path)
    ours = load_decoder(open_checkpoint(tmp_path), dtype="bfloat16")
    hidden = ours.hidden(ids_of(20))
    weight = pairs("tied")[1].get_input_embeddings().weight.to(torch.bfloat16).float()
    wanted = hidden.float() @ weight.T
    close(ours.logits(hidden), wanted.detach(), 1e-6)
    assert not torch.equal(ours.logits(hidden), ours.logits(hidden).to(torch.bfloat16).float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_equals_cpu(pairs, tmp_path, dtype):
    pairs("tiny")[1].save_pretrained(tmp_path)
    ours = load_decoder(open_checkpoint(tmp_path), dtype=dtype, device="cuda")
    cpu = load_decoder(open_checkpoint(tmp_path))
    ids, tolerance = ids_of(20), 1e-5 if dtype == "float32" else 0.05
    close(ours(ids).cpu(), cpu(ids), tolerance)
    cache = KVCache()
    ours.hidden(ids[:, :8], cache)
    found = ours(ids[:, 8:], Packed(cache, [5, 7])).cpu()
    close(found[:, :5], cpu(ids)[:, 8:13], tolerance)


def test_refusals(pairs):
    ours, _ = pairs("tiny")
    with pytest.raises(InputError, match=r"0\.\.95, found 5\.\.96"):
        ours(torch.tensor([[5, 96]]))
    with pytest.raises(InputError, match="whole numbers"):
        ours(torch.zeros(1, 3))
    cache = KVCache()
    ours.hidden(ids_of(4, batch=2), cache)
    with pytest.raises(InputError, match="2 sequences, the input 1"):
        ours(ids_of(1), cache)
    with pytest.raises(InputError, match="one sequence without padding"):
        Packed(cache, [2])
    with pytest.raises(InputError, match="at least one token"):
        Packed(None, [2, 0])
    with pytest.raises(InputError, match="expected \\[1, 5\\]"):
        ours(ids_of(4), Packed(None, [2, 3]))
    with pytest.raises(InputError, match="kept nothing"):
        Packed(None, [2]).segment(0)
    with pytest.raises(InputError, match="mask has shape"):
        ours(ids_of(4), mask=torch.ones(1, 3))


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ours = load_decoder(open_checkpoint(smollm2))
    ids = torch.randint(0, 49152, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = theirs(ids).logits
    close(ours(ids), wanted)
    cache = KVCache()
    ours.hidden(ids[:, :100], cache)
    packed = Packed(cache, [50, 20], keep=True)
    found = ours(torch.cat([ids[:, 100:], ids[:, 100:120]], 1), packed)
    close(found[:, :50], wanted[:, 100:])
    close(found[:, 50:], wanted[:, 100:120])
    close(ours(ids[:, 120:121], packed.segment(1)), wanted[:, 120:121])
