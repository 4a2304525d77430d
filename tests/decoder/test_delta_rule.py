"""The gated delta rule in chunks, token by token and as transformers computes it."""

from __future__ import annotations

import pytest
import torch

from llmkit.decoder.delta_rule import chunked, chunked_by_channel, delta_rule, recurrent


def _random(length: int, heads: int = 4, key: int = 8, value: int = 6, batch: int = 2):
    make = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, heads, *shape, generator=make)

    q, k = (torch.nn.functional.normalize(normal(length, key), dim=-1) for _ in range(2))
    decay, rate = -normal(length).exp(), normal(length).sigmoid()
    return q, k, normal(length, value), decay, rate, normal(key, value)


@pytest.mark.parametrize("length", [1, 7, 64, 65, 200])
def test_chunks_are_the_recurrence(length):
    given = _random(length)
    for ours, theirs in zip(chunked(*given), recurrent(*given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_small_chunks_and_any_cut_give_the_same():
    given = _random(50)
    whole, after = delta_rule(*given)
    for ours, theirs in zip(chunked(*given, chunk=8), (whole, after), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    *tokens, state = given
    parts = []
    for cut in (slice(0, 33), slice(33, 34), slice(34, 50)):
        part, state = delta_rule(*(x[:, :, cut] for x in tokens), state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, after, rtol=1e-5, atol=1e-5)


def test_no_decay_and_no_rate_leave_the_state_alone():
    q, k, v, decay, rate, state = _random(70)
    for rule in (chunked, recurrent):
        _, after = rule(q, k, v, decay * 0, rate * 0, state)
        torch.testing.assert_close(after, state)


def test_extreme_decays_stay_finite():
    q, k, v, decay, rate, state = _random(130)
    ours = chunked(q, k, v, decay * 1000, rate, state)
    theirs = recurrent(q, k, v, decay * 1000, rate, state)
    assert all(bool(x.isfinite().all()) for x in ours)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 100])
def test_transformers_computes_the_same(length):
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, decay, rate, state = _random(length)
    for function in (theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule):
        tokens = (x.transpose(1, 2) for x in (q, k, v, decay, rate))
        wanted, after = function(*tokens, initial_state=state, output_final_state=True)
        ours = delta_rule(q * q.shape[-1] ** -0.5, k, v, decay, rate, state)
        torch.testing.assert_close(ours[0].transpose(1, 2), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1], after, rtol=1e-5, atol=1e-5)


def _of_channels(length: int, speed: float = 1.0):
    """Decays of channels, of which some hardly fade and others are gone with the next token."""
    q, k, v, _, rate, state = _random(length)
    decay = -speed * torch.randn(k.shape, generator=torch.Generator().manual_seed(9)).mul(2).exp()
    return q, k, v, decay, rate, state


@pytest.mark.parametrize("speed", [1.0, 100.0])
@pytest.mark.parametrize("length", [1, 16, 17, 100])
def test_decays_of_channels_in_chunks_are_the_recurrence(length, speed):
    given = _of_channels(length, speed)
    # Sums of decays up to thousands are rounded to their last digits, 1e-4.
    for ours, theirs in zip(chunked_by_channel(*given), recurrent(*given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4 if speed > 1 else 1e-5)


def test_channels_that_decay_alike_are_one_decay():
    q, k, v, decay, rate, state = _random(70)
    found = delta_rule(q, k, v, decay[..., None].expand_as(k), rate, state)
    for ours, theirs in zip(found, delta_rule(q, k, v, decay, rate, state), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 100])
def test_transformers_computes_the_same_with_decays_of_channels(length):
    theirs = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    q, k, v, decay, rate, state = _of_channels(length)
    function = theirs.recurrent_kimi_delta_attention if length == 1 else theirs.chunk_kimi_delta_attention
    given = (x.transpose(1, 2).contiguous() for x in (q, k, v, decay, rate))
    wanted, after = function(*given, initial_state=state, output_final_state=True)
    found, left = delta_rule(q * q.shape[-1] ** -0.5, k, v, decay, rate, state)
    torch.testing.assert_close(found, wanted.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left, after, rtol=1e-5, atol=1e-5)
