"""Generation against transformers' own `generate` and its logits warpers."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.decoder.generate import generate, generate_from, stream
from llmkit.decoder.packed import Packed
from llmkit.decoder.sampling import Sampling, choose_tokens, filter_logits
from llmkit.errors import InputError

CONFIG = next(default_registry().load(p) for p in default_registry().plugins if p.name == "llama").tiny_config()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**CONFIG)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 2 * weight.shape[-1] ** -0.5)
    folder = tmp_path_factory.mktemp("generate")
    theirs.save_pretrained(folder)
    return load_decoder(open_checkpoint(folder)), theirs


PROMPTS = [[5, 9, 40], [7, 30, 31, 32, 33, 8, 12], [60]]


def theirs_greedy(theirs, prompt, n, eos=None, **options):
    ids = torch.tensor([prompt])
    options |= {"attention_mask": torch.ones_like(ids), "eos_token_id": eos, "pad_token_id": 0}
    out = theirs.generate(ids, max_new_tokens=n, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


def test_greedy_batch_equals_transformers_one_by_one(pair):
    ours, theirs = pair
    found = generate(ours, PROMPTS, max_new_tokens=12)
    assert found == [theirs_greedy(theirs, p, 12) for p in PROMPTS]
    assert len({tuple(f) for f in found}) == 3


def test_an_end_token_ends_its_row_only(pair):
    ours, theirs = pair
    free = generate(ours, PROMPTS, max_new_tokens=12)
    eos = free[0][3]
    found = generate(ours, PROMPTS, max_new_tokens=12, eos=[eos])
    for text, whole in zip(found, free, strict=True):
        assert text == (whole[: whole.index(eos)] if eos in whole else whole)
    assert theirs_greedy(theirs, PROMPTS[0], 12, eos)[:-1] == found[0]


def test_the_callback_sees_every_token_and_can_stop(pair):
    ours, _ = pair
    seen = {0: [], 1: [], 2: []}

    def on_token(i, token):
        seen[i].append(token)
        return i == 1 and len(seen[1]) == 2

    found = generate(ours, PROMPTS, max_new_tokens=6, on_token=on_token)
    assert [seen[i] for i in range(3)] == found
    assert [len(f) for f in found] == [6, 2, 6]


def test_stream_equals_generate(pair):
    ours, _ = pair
    how = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=4)
    streamed = list(stream(ours, PROMPTS[1], how, max_tokens=8))
    assert [streamed] == generate(ours, [PROMPTS[1]], max_new_tokens=8, sampling=how)
    assert streamed == list(stream(ours, PROMPTS[1], how, max_tokens=8))
    others = [list(stream(ours, PROMPTS[1], Sampling(0.8, 20, 0.9, seed), max_tokens=8)) for seed in range(5, 9)]
    assert any(other != streamed for other in others)
    assert (
        list(stream(ours, PROMPTS[1], how, max_tokens=8, end_ids=[streamed[4]]))
        == streamed[: streamed.index(streamed[4])]
    )


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.7), (10, 0.5), (0, 1.0), (200, 0.99)])
def test_filters_equal_transformers(top_k, top_p):
    logits = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)) * 3
    scores = transformers.TemperatureLogitsWarper(0.7)(None, logits)
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None and top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    assert torch.equal(filter_logits(logits, Sampling(0.7, top_k, top_p)), scores)


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, 3)
    tokens = choose_tokens(logits, Sampling(temperature=1.0), torch.Generator().manual_seed(0), [])
    shares = torch.bincount(tokens, minlength=3) / 4000
    assert torch.allclose(shares, torch.softmax(logits[0], -1), atol=0.03)


def test_a_repetition_penalty_is_transformers(pair):
    ours, theirs = pair
    how = Sampling(repetition_penalty=1.8)
    wanted = [theirs_greedy(theirs, prompt, 6, repetition_penalty=1.8) for prompt in PROMPTS]
    assert generate(ours, PROMPTS, max_new_tokens=6, sampling=how) == wanted
    assert generate(ours, PROMPTS, max_new_tokens=6) != wanted
    assert list(stream(ours, PROMPTS[0], how, max_tokens=6)) == wanted[0]
    stem = PROMPTS[0]
    tails = [[5, 9], [5], [7, 8, 3]]
    alone = [generate(ours, [[*stem, *tail]], max_new_tokens=6, sampling=how)[0] for tail in tails]
    packed = Packed(None, [len(stem)], keep=True)
    ours.hidden(torch.tensor([stem]), cache=packed)
    options = {"start": stem, "batch_tokens": 64, "max_new_tokens": 6, "sampling": how}
    assert generate_from(ours, packed.segment(0), tails, **options) == alone


def test_a_bound_that_no_text_reaches_takes_no_memory(pair):
    ours, _ = pair
    tokens = stream(ours, PROMPTS[0], Sampling(), max_tokens=10**18)
    assert [next(tokens) for _ in range(4)] == list(stream(ours, PROMPTS[0], Sampling(), max_tokens=4))


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), 1e-320])
def test_temperatures_that_leave_no_probabilities_are_refused(temperature):
    with pytest.raises(InputError, match="temperature"):
        Sampling(temperature)


def test_refusals(pair):
    with pytest.raises(InputError, match="no tokens"):
        generate(pair[0], [[1], []], max_new_tokens=2)
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"repetition_penalty": 0.0}):
        with pytest.raises(InputError):
            Sampling(**wrong)


def test_a_sequence_that_outgrows_the_first_set_of_frequencies_is_computed_anew(tmp_path, monkeypatch):
    """longrope: greedy text across the border (16 tokens here) equals transformers', one by one and in a batch."""
    phi3 = next(default_registry().load(p) for p in default_registry().plugins if p.name == "phi3")
    config = phi3.tiny_config("128k-long")
    torch.manual_seed(5)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 2 * weight.shape[-1] ** -0.5)
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(open_checkpoint(tmp_path))
    assert ours.recompute_beyond == 16
    prompts = [[5, 9, 40, 11, 17, 23, 8, 3, 12], [7, 30, 31, 32, 33, 8, 12], list(range(20, 34)), list(range(3, 23))]
    wanted = [theirs_greedy(theirs, p, 14) for p in prompts]
    assert generate(ours, prompts, max_new_tokens=14) == wanted
    assert list(stream(ours, prompts[0], Sampling(), max_tokens=14)) == wanted[0]
    # The border matters: without computing anew the text is another.
    monkeypatch.setattr(type(ours), "recompute_beyond", None)
    assert generate(ours, prompts, max_new_tokens=14) != wanted
