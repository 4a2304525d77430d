"""RoPE in every spelling of a config, and its frequencies against transformers' own functions."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmkit.architecture.activations import ACTIVATIONS, same_activation
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import GatedMLP, RMSNorm, Rope
from llmkit.architecture.scaling import (
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    NoScaling,
    UnknownScaling,
    Yarn,
    scaling_of,
)
from llmkit.decoder.gated import activation
from llmkit.decoder.positions import frequencies
from llmkit.errors import RequirementError, SpecError

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({}, 1e4, NoScaling()),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, NoScaling()),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}, 5e5, LinearScaling(4.0)),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1e6, NoScaling()),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}}, 1e6, LinearScaling(2.0)),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 1e4, DynamicNTK(2.0, 64)),
        ({"rope_scaling": LLAMA3}, 1e4, Llama3Scaling(8.0, 1.0, 4.0, 64)),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}}, 1e4, Llama3Scaling(8.0, 1.0, 4.0, 32)),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 1e4, Yarn(4.0, 64)),
        (
            {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 16}},
            1e4,
            Yarn(4.0, 16),
        ),
        (
            {
                "rope_scaling": {
                    "type": "su",
                    "short_factor": [1.0, 2.0],
                    "long_factor": [3.0, 4.0],
                    "attention_factor": 1.5,
                    "original_max_position_embeddings": 16,
                }
            },
            1e4,
            LongRope((1.0, 2.0), (3.0, 4.0), 16, 1.5),
        ),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, 1e4, UnknownScaling("spiral")),
    ],
)
def test_spellings(config, theta, scaling):
    bound = Rope().bind({"max_position_embeddings": 64, **config})
    assert bound.theta == theta
    assert bound.bound_scaling == scaling


@pytest.mark.parametrize("params", [{"type": "linear"}, {"type": "llama3", "factor": 8.0}, ["linear"]])
def test_a_missing_parameter_is_an_error(params):
    with pytest.raises(SpecError, match=r"config\.json"):
        scaling_of(params, {"max_position_embeddings": 64})
    with pytest.raises(SpecError, match="max_position_embeddings"):
        scaling_of({"type": "dynamic", "factor": 2.0}, {})


SCALINGS = {
    "linear": [{"factor": 4.0}, {"factor": 1.5}],
    "dynamic": [{"factor": 2.0}],
    "llama3": [
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ],
    "yarn": [
        {"factor": 4.0, "original_max_position_embeddings": 64},
        {"factor": 16.0, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2},
        {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7},
        {"factor": 8.0, "original_max_position_embeddings": 32, "attention_factor": 1.3, "truncate": False},
        {"factor": 1.0, "original_max_position_embeddings": 256},
    ],
}
CASES = [(name, params) for name, many in SCALINGS.items() for params in many]


@pytest.mark.parametrize(("name", "params"), CASES, ids=str)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("length", [None, 100, 1000])
def test_frequencies_equal_transformers(name, params, theta, length):
    config = {"max_position_embeddings": 256, "rope_theta": theta, "rope_scaling": {"rope_type": name, **params}}
    theirs = transformers.LlamaConfig(hidden_size=128, num_attention_heads=4, head_dim=32, **config)
    wanted, factor = ROPE_INIT_FUNCTIONS[name](theirs, "cpu", seq_len=length)
    bound = Rope().bind(config)
    found, ours = frequencies(theta, 32, bound.bound_scaling, length)
    assert torch.allclose(found, wanted, rtol=2e-6, atol=0)
    assert ours == pytest.approx(factor, rel=1e-12)


def test_what_the_reader_does_not_know_is_refused_by_name():
    with pytest.raises(RequirementError, match="RoPE scaling 'spiral'") as caught:
        frequencies(1e4, 32, UnknownScaling("spiral"))
    assert "longrope, proportional and yarn" in caught.value.hint
    with pytest.raises(RequirementError, match="no activation is called 'gelu_nwe'") as caught:
        activation("gelu_nwe")
    assert caught.value.hint == "did you mean 'gelu_new'?"
    with pytest.raises(RequirementError, match="'xielu' has weights of its own"):
        activation("xielu")


def test_a_kind_without_a_reader_is_refused_and_a_plugins_own_reader_is_used():
    from dataclasses import dataclass

    from llmkit.architecture.kinds import Kind
    from llmkit.decoder.norms import build_norm

    @dataclass(frozen=True)
    class Strange(Kind):
        pass

    @dataclass(frozen=True)
    class Own(Kind):
        def torch_reader(self, weights):
            return lambda x: 2 * x

    with pytest.raises(RequirementError, match="no reader for the kind Strange"):
        build_norm(Strange(), None)
    assert build_norm(Own(), None)(torch.tensor(3)) == 6


def test_binding_reads_keys_strings_and_constants():
    assert RMSNorm(eps="norm_eps").bind({"norm_eps": 1e-6}).eps == 1e-6
    assert RMSNorm(eps=1e-5).bind({}).eps == 1e-5
    assert RMSNorm(eps=Key(("a", "b.c"), 3.0)).bind({"b": {"c": 2.0}}).eps == 2.0
    assert GatedMLP("silu").bind({"silu": "no"}).act == "silu"
    with pytest.raises(SpecError, match="expected true or false"):
        GatedMLP("silu", bias="mlp_bias").bind({"mlp_bias": "yes"}).slots()


WITH_WEIGHTS = {"prelu", "xielu"}


@pytest.mark.parametrize("name", sorted(transformers.activations.ACT2FN.keys() - WITH_WEIGHTS))
def test_activations_equal_transformers(name):
    x = torch.linspace(-15, 15, 301)
    wanted = transformers.activations.ACT2FN[name](x)
    assert torch.allclose(activation(name)(x.clone()), wanted, atol=1e-6)
    assert GatedMLP(name).bind({}) == GatedMLP(same_activation(name)).bind({})


# transformers 4.57 lacks two of ours.
@pytest.mark.parametrize("name", sorted(transformers.activations.ACT2FN.keys() & set(ACTIVATIONS)))
def test_activations_of_graphs_equal_transformers(name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
    from llmkit.onnx.gated import activation as emit
    from llmkit.onnx.graph import Graph

    graph = Graph("activation")
    x = torch.linspace(-15, 15, 301)
    made = emit(graph, name, graph.input("x", "FLOAT", (301,)))
    graph.output(graph.op("Identity", made), "y", "FLOAT", (301,))
    (found,) = onnxruntime.InferenceSession(graph.model().SerializeToString()).run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), transformers.activations.ACT2FN[name](x), atol=2e-6)
