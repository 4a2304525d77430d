"""Schemes: validation, sizes, and a config that compressed-tensors itself accepts."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy

from llmkit.errors import SpecError
from llmkit.quantization import rtn
from llmkit.quantization.schemes import Scheme


@pytest.mark.parametrize("bits", [2, 3, 16, 0])
def test_other_bits_are_refused(bits):
    with pytest.raises(SpecError, match=f"weights of {bits} bits"):
        Scheme(bits)


def test_group_size_is_positive():
    with pytest.raises(SpecError, match="group size 0"):
        Scheme(4, 0)


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(4, 32, False), Scheme(8), Scheme(8, 128, False)], ids=str)
@pytest.mark.parametrize("shape", [(64, 256), (20, 384)])
def test_bits_per_weight_are_those_of_the_tensors(scheme, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    stored = sum(t.nbytes for t in rtn.quantize_packed(w, scheme, torch.float16)) + 16
    assert scheme.bits_per_weight(shape, 16) == pytest.approx(8 * stored / w.numel())


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(4, None, False), Scheme(8), Scheme(8, 128, False)], ids=str)
def test_the_config_is_what_compressed_tensors_understands(scheme):
    written = scheme.quantization_config(ignore=["lm_head"])
    written.pop("run_compressed", None)  # transformers takes it out before
    parsed = QuantizationConfig.model_validate(written)
    args = parsed.config_groups["group_0"].weights
    assert (args.num_bits, args.group_size, args.symmetric) == (scheme.bits, scheme.group_size, scheme.is_symmetric)
    is_channel = scheme.group_size is None
    assert args.strategy == (QuantizationStrategy.CHANNEL if is_channel else QuantizationStrategy.GROUP)
    assert parsed.ignore == ["lm_head"]
    assert parsed.format == "pack-quantized"
    assert Scheme.from_weights(parsed.model_dump()["config_groups"]["group_0"]["weights"]) == scheme


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "int", "strategy": "tensor"},
        {"num_bits": 8, "type": "int"},
        {"num_bits": 8, "type": "int", "strategy": "block", "block_structure": [128, 128]},
        {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "dynamic": True},
    ],
)
def test_what_is_not_read_is_refused_by_name(weights):
    with pytest.raises(SpecError, match="are not read; expected int, group or channel, static"):
        Scheme.from_weights(weights)


@pytest.mark.parametrize(
    "weights",
    [
        "x", 5, [], {"type": "int", "strategy": "channel"}, {"num_bits": "8", "strategy": "channel"},
        {"num_bits": True, "strategy": "channel"}, {"num_bits": 8, "strategy": "group", "group_size": "32"},
        {"num_bits": 8, "strategy": "group", "group_size": 0}, {"num_bits": 8, "group_size": [32]},
    ],
)  # fmt: skip
def test_values_of_other_types_are_refused(weights):
    with pytest.raises(SpecError, match="compressed-tensors weights"):
        Scheme.from_weights(weights)
