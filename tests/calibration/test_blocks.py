"""Blocks one at a time: what hooks see is what hooks on transformers' modules see; chunks change nothing."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmkit.architecture.registry import default_registry
from llmkit.architecture.slots import is_of_expert
from llmkit.calibration.blocks import Blocks
from llmkit.calibration.observers import Observer
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint, random_ids
from llmkit.decoder.foreign import transformers_model
from llmkit.decoder.load import load_blocks
from llmkit.errors import InputError, RequirementError

ARCHITECTURES = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}


class Recorder:
    """Second moments of the inputs of every linear layer, by weight; weights stay or are scaled."""

    def __init__(self, factor=1.0):
        self.observers: dict[str, Observer] = {}
        self.settled: list[tuple[str, ...]] = []
        self.factor = factor

    def see(self, weights, x, float_x):
        for weight in weights:
            self.observers.setdefault(weight, Observer({"second_moments", "maxima"})).see(x)

    def settle(self, weights, values):
        self.settled.append(weights)
        return values * self.factor


def passed(ckpt, ids, hook, **options):
    decoder, weights = load_blocks(ckpt)
    blocks = Blocks(decoder, weights, ids, **options)
    hidden = blocks.embedded()
    for i in range(len(blocks)):
        hidden = blocks.run(i, hidden, hook)
    return hidden


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda a: a.name)
def test_inputs_are_those_that_hooks_in_transformers_see(architecture):
    config = architecture.tiny_config()
    ckpt, ids = random_checkpoint(architecture, config), random_ids(architecture, config)
    recorder = Recorder()
    try:
        passed(ckpt, ids, recorder)
    except RequirementError as error:
        pytest.skip(error.message)
    model = ckpt.require_model()
    linear = [slot for slot in model.slots.values() if slot.kind == "linear" and slot.layer is not None]
    weights_of_layers = {part.id for slot in linear for part in slot.parts}
    assert set(recorder.observers) <= weights_of_layers
    # There may be experts to which no token goes.
    assert all(is_of_expert(weight) for weight in weights_of_layers - set(recorder.observers))
    if transformers.__version__.startswith("4.") and architecture.name in ("apertus", "gemma3n", "recurrent_gemma"):
        pytest.skip(f"transformers {transformers.__version__} computes {architecture.name} otherwise: test_contract.py")
    try:
        reference = dict(architecture.reference_config(config)) if architecture.reference_config else dict(config)
        weights = {n: t.load() for n, t in ckpt.tensors.items()}
        theirs = transformers_model(
            reference, weights, ckpt.label, dtype=torch.float32, attention=architecture.reference_attention
        )
    except RequirementError:
        pytest.skip(f"transformers has no class for {architecture.name}")
    seen = {}

    def hook(name):
        return lambda module, args: seen.__setitem__(name, args[0].flatten(0, -2))

    def experts_hook(module, args, named):
        """What each expert is given, of all that are stacked in one module."""
        x, chosen = args[0].flatten(0, -2), named["router_indices"] if "router_indices" in named else args[1]
        for e in range(int(chosen.max()) + 1):
            given.setdefault(e, []).append(x[(chosen == e).any(-1)])

    given = {}
    modules = dict(theirs.named_modules())
    stacks = [name for name in modules if name.endswith((".mlp.experts", ".feed_forward.experts"))]
    if stacks and architecture.name != "llama4":  # its stack is given all tokens for each expert, times their weights
        modules[stacks[0]].register_forward_pre_hook(experts_hook, with_kwargs=True)
    linear = [slot for slot in linear if ".experts." not in slot.id]
    for slot in linear:
        name = slot.name.removesuffix(".weight")
        modules[model.names.loaded(name)].register_forward_pre_hook(hook(slot.name))
    with torch.inference_mode():
        theirs(ids)
    for e, (x,) in given.items():
        for part in ("gate", "up", "down"):
            stem = stacks[0].removeprefix("model.").replace(".feed_forward.", ".mlp.")
            if not len(x):
                assert f"{stem}.{e}.{part}.weight" not in recorder.observers
                continue
            ours = recorder.observers[f"{stem}.{e}.{part}.weight"].statistics()
            assert ours.n_tokens == len(x)
            if part != "down":
                torch.testing.assert_close(ours.second_moments, x.T @ x, rtol=1e-4, atol=1e-4)
    for slot in linear:
        x = seen[slot.name]
        for part in slot.parts:
            ours = recorder.observers[part.id].statistics()
            assert ours.n_tokens == ids.numel()
            moments = x.T @ x  # of inputs that rounding carries through the layers before
            torch.testing.assert_close(ours.second_moments, moments, rtol=1e-4, atol=1e-5 * float(moments.abs().max()))
            torch.testing.assert_close(ours.maxima, x.abs().amax(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2", "falcon", "rwkv", "chatglm2", "qwen3_moe", "deepseek3"])
@pytest.mark.parametrize("factor", [1.0, 0.9])
@pytest.mark.parametrize("experts_nbytes", [1, 2**30])
def test_chunks_give_what_the_whole_gives(name, factor, experts_nbytes):
    """With weights that stay, and with weights that change as soon as their inputs are complete; of experts one is seen
    at a time or all beside each other, and each chunk reaches others."""
    architecture = ARCHITECTURES[name]
    config = architecture.tiny_config()
    ckpt = random_checkpoint(architecture, config)
    ids = random_ids(architecture, config).repeat(3, 1)[:5]
    whole, cut = Recorder(factor), Recorder(factor)
    expected = passed(ckpt, ids, whole, experts_nbytes=experts_nbytes)
    found = passed(ckpt, ids, cut, chunk_nbytes=1, experts_nbytes=experts_nbytes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert cut.observers.keys() == whole.observers.keys()
    for weight, observer in whole.observers.items():
        mine, theirs = cut.observers[weight].statistics(), observer.statistics()
        assert mine.n_tokens == theirs.n_tokens
        torch.testing.assert_close(mine.second_moments, theirs.second_moments, rtol=1e-4, atol=1e-4)
    assert cut.settled == whole.settled  # in one order: processes that share the samples add up what they saw
    assert len(set(cut.settled)) == len(cut.settled)
    assert set(whole.observers) <= {weight for weights in whole.settled for weight in weights}


def six_sequences(chunk_nbytes):
    architecture = ARCHITECTURES["llama"]
    config = architecture.tiny_config()
    ids = random_ids(architecture, config).repeat(3, 1)
    return Blocks(*load_blocks(random_checkpoint(architecture, config)), ids, chunk_nbytes)


@pytest.mark.parametrize("chunk_nbytes", [1, 2**31])
def test_hidden_states_after_a_block_take_the_memory_of_those_before_it(chunk_nbytes):
    blocks = six_sequences(chunk_nbytes)
    hidden, floats = blocks.embedded(), blocks.embedded()
    places = hidden.data_ptr(), floats.data_ptr()
    after, (recorded, inputs) = blocks.run(0, hidden, Recorder()), blocks.recorded(0, floats)
    assert (after.data_ptr(), recorded.data_ptr()) == places
    torch.testing.assert_close(after, recorded, rtol=1e-5, atol=1e-5)
    assert all(len(x) == len(blocks.ids) for x in inputs.values())


@pytest.mark.parametrize("chunk_nbytes", [1, 2**31])
def test_inputs_in_the_float_model_are_forgotten_as_layers_are_settled(chunk_nbytes):
    blocks = six_sequences(chunk_nbytes)
    _, inputs = blocks.recorded(0, blocks.embedded())
    known, held = dict(inputs), []

    class Hook(Recorder):
        seen = 0

        def see(self, weights, x, float_x):
            self.seen += float_x is not None
            assert float_x.shape == x.shape

        def settle(self, weights, values):
            held.append(len(inputs))
            return values

    hook = Hook()
    blocks.run(0, blocks.embedded(), hook, inputs)
    assert held == list(range(len(known) - 1, -1, -1))
    assert hook.seen == len(known) * (len(blocks.ids) if chunk_nbytes == 1 else 1)


def test_weights_that_stay_give_the_hidden_states_of_the_decoder():
    architecture = ARCHITECTURES["llama"]
    config = architecture.tiny_config()
    ckpt, ids = random_checkpoint(architecture, config), random_ids(architecture, config)
    decoder = load_decoder(ckpt)
    with torch.inference_mode():
        hidden = decoder.final_norm(passed(ckpt, ids, Recorder()))
    torch.testing.assert_close(hidden, decoder.hidden(ids), rtol=0, atol=0)


def test_tokens_that_have_no_row_are_refused():
    """transformers 4.57 gives a folder without tokenizer_config.json special tokens behind the vocabulary."""
    architecture = ARCHITECTURES["llama"]
    ckpt = random_checkpoint(architecture, config := architecture.tiny_config())
    with pytest.raises(InputError, match=f"token ids must lie in 0..{config['vocab_size'] - 1}, found 3.."):
        passed(ckpt, torch.tensor([[3, config["vocab_size"]]]), Recorder())
