"""The runner: a graph in two halves, buffers that are written in place, prompts in stretches, padding on either side.

Each is held to the torch decoder of the same weights, and the scores of shared prefixes to those of the torch decoder.
"""

from __future__ import annotations

import onnx
import pytest
import torch

from llmkit.architecture.registry import default_registry
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.generate import generate
from llmkit.decoder.kv import KVCache
from llmkit.decoder.packed import Packed
from llmkit.decoder.sampling import Sampling
from llmkit.evaluation.prefix import Query
from llmkit.evaluation.scoring import Scorer
from llmkit.onnx.contract import decoder_of, initializer_bytes
from llmkit.onnx.model import build_graph
from llmkit.onnx.split import HIDDEN

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
FAMILIES = ("llama", "gemma2", "bloom", "rwkv", "chatglm", "gpt2", "baichuan")
OPS = ("gqa", "attention")


def made(name, attention, **changes):
    """The runner over both halves, the graph as it is, and the torch decoder."""
    registry = default_registry()
    architecture = registry.load(next(p for p in registry.plugins if p.name == name))
    config = architecture.tiny_config() | changes
    ckpt = random_checkpoint(architecture, config)
    model = architecture.bind(config)
    proto = build_graph(model, ckpt.tensors, initializer_bytes, attention=attention)
    plain = onnx.ModelProto.FromString(proto.SerializeToString())
    mark = next(entry for entry in plain.metadata_props if entry.key == HIDDEN)
    plain.metadata_props.remove(mark)
    return decoder_of(proto, model), decoder_of(plain, model), load_decoder(ckpt, architecture=architecture)


def tokens(*shape, seed=3):
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(seed))


def prompts(name, lengths):
    """Prompts that the family takes: ChatGLM's hold [gMASK] and <sop>."""
    registry = default_registry()
    architecture = registry.load(next(p for p in registry.plugins if p.name == name))
    ends = architecture.prompt_suffix_of(architecture.tiny_config())
    rows = [[t for t in tokens(n, seed=n).tolist() if t not in ends] for n in lengths]
    return [row[:2] + list(ends) + row[2:] for row in rows]


@pytest.mark.parametrize("attention", OPS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_halves_are_the_graph(name, attention):
    halves, whole, torch_decoder = made(name, attention)
    (row,) = prompts(name, [11])
    ids = torch.tensor([row])
    hidden = halves.hidden(ids)
    assert hidden.shape == (1, len(row), halves.model.dims.hidden)
    assert torch.equal(halves.logits(hidden), whole(ids))
    assert torch.allclose(halves.logits(hidden[:, -1]), torch_decoder(ids)[:, -1], atol=1e-5)


@pytest.mark.parametrize("attention", ["gqa", "attention", "flash"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "rwkv", "gpt2"])
def test_logits_of_the_last_column_alone(name, attention):
    """With padding before the tokens, from call to call, and nothing opened that is not needed."""
    decoder, _, torch_decoder = made(name, attention)
    ids, steps = tokens(3, 9), tokens(3, 4, seed=4)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :1] = 0
    caches = decoder.new_cache(5), torch_decoder.new_cache()
    for given in ((ids, mask), *((steps[:, i : i + 1], None) for i in range(3)), (steps, None)):
        found, wanted = (
            d.next_logits(given[0], c, given[1]) for d, c in zip((decoder, torch_decoder), caches, strict=True)
        )
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, atol=1e-5)
    is_lone = attention != "flash" or name == "rwkv"
    assert ("body" in vars(decoder.parts)) is not is_lone


@pytest.mark.parametrize("attention", OPS)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_of_a_padded_batch(name, attention):
    halves, _, torch_decoder = made(name, attention)
    batch = prompts(name, [9, 4, 13])
    found, wanted = (generate(d, batch, max_new_tokens=12, sampling=Sampling()) for d in (halves, torch_decoder))
    assert found == wanted
    assert found[1] == generate(halves, batch[1:2], max_new_tokens=12)[0]


def test_keys_and_values_stay_where_they_are():
    decoder, _, torch_decoder = made("llama", "gqa")
    ids = tokens(2, 30)
    cache, wanted = decoder.new_cache(24), KVCache()
    places, sizes = set(), set()
    for start, stop in ((0, 5), (5, 6), (6, 9), (9, 10), (10, 24), (24, 25), (25, 30)):
        found = decoder(ids[:, start:stop], cache)
        assert torch.allclose(found, torch_decoder(ids[:, start:stop], wanted), atol=1e-5)
        key = cache.memory["past_key_values.0.key"]
        sizes.add(key.shape[2])
        if stop <= 24:
            places.add(key.data_ptr())
    assert len(places) == 1
    assert sizes == {24, 48}  # it grew once, to twice its room


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((n, a) for n in ("llama", "gemma2", "bloom", "gpt2") for a in OPS), ("llama", "flash"), ("gemma2", "flash")],
)
def test_long_prompts_are_computed_in_stretches(name, attention, monkeypatch):
    room = {"n_positions": 160} if name == "gpt2" else {}
    decoder, _, torch_decoder = made(name, attention, **room)
    ids = tokens(2, 150)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    wanted = torch_decoder(ids, mask=mask)
    calls, run = [], decoder.parts.body.run
    monkeypatch.setattr(decoder.parts.body, "run", lambda f, *to: calls.append(f["input_ids"].shape) or run(f, *to))
    decoder.scores_nbytes = 1
    found = decoder(ids, decoder.new_cache(), mask)
    assert max(shape[1] for shape in calls) == 64
    assert torch.allclose(found[0, 4:], wanted[0, 4:], atol=1e-5)
    assert torch.allclose(found[1], wanted[1], atol=1e-5)


@pytest.mark.parametrize("attention", OPS)
def test_what_later_tokens_change_is_not_cut(attention):
    decoder, _, torch_decoder = made("chatglm", attention)
    decoder.scores_nbytes = 1
    (row,) = prompts("chatglm", [150])
    ids = torch.tensor([row])
    assert decoder.exact_sharing_limit == torch_decoder.exact_sharing_limit == 0
    assert torch.allclose(decoder(ids), torch_decoder(ids), atol=1e-5)


@pytest.mark.parametrize("attention", OPS)
@pytest.mark.parametrize("name", ["llama", "bloom", "rwkv"])
def test_scores_of_shared_prefixes(name, attention):
    decoder, _, torch_decoder = made(name, attention)
    stem = tuple(tokens(40).tolist())
    queries = []
    for i, n in enumerate((5, 8, 5, 30)):
        own = stem[: 20 + 5 * i] + tuple(tokens(n, seed=i).tolist())
        queries += [Query(own, (7,)), Query(own, (9,)), Query((*own, 3), (7, 8))]
    found, wanted = (Scorer(d, batch_tokens=48, forward_cost=4) for d in (decoder, torch_decoder))
    scores, expected = found.score(queries), wanted.score(queries)
    assert [s.logprob for s in scores] == pytest.approx([s.logprob for s in expected], abs=1e-5)
    assert [s.is_greedy for s in scores] == [s.is_greedy for s in expected]
    assert (found.usage.tokens, found.usage.head_rows) == (wanted.usage.tokens, wanted.usage.head_rows)
    assert found.usage.tokens < found.usage.tokens_unshared


@pytest.mark.parametrize("attention", OPS)
def test_a_prefix_is_not_written_to(attention):
    decoder, _, _ = made("llama", attention)
    prefix = decoder.new_cache(64)
    decoder(tokens(1, 6), prefix)
    before = {name: held.clone() for name, held in prefix.memory.items()}
    packed = Packed(prefix, [3, 4], keep=True)
    decoder(tokens(1, 7, seed=9), packed)
    decoder(tokens(1, 2), packed.segment(0))
    assert all(torch.equal(held, before[name]) for name, held in prefix.memory.items())
