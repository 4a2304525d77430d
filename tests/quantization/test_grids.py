"""Grids: validation, and a config that compressed-tensors itself accepts."""

import pytest
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy

from llmkit.errors import RequirementError, SpecError
from llmkit.quantization.codecs.compressed_groups import grid_of
from llmkit.quantization.codecs.compressed_tensors import CODEC
from llmkit.quantization.matrix import Grid
from tests.quantization.lazies import zeros_on


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_other_bits_are_refused(bits):
    with pytest.raises(SpecError, match=f"weights of {bits} bits"):
        Grid(bits)


def test_group_size_is_positive():
    with pytest.raises(SpecError, match="group size 0"):
        Grid(4, 0)


@pytest.mark.parametrize("grid", [Grid(4, 64), Grid(4, None, False), Grid(8), Grid(3, 128, False)], ids=str)
def test_the_config_is_what_compressed_tensors_understands(grid):
    written = CODEC.describe({"a": zeros_on(grid), "b": zeros_on(grid)}, ["lm_head"], are_all=True)
    written.pop("run_compressed", None)  # transformers takes it out before
    parsed = QuantizationConfig.model_validate(written)
    args = parsed.config_groups["group_0"].weights
    assert (args.num_bits, args.group_size, args.symmetric) == (grid.bits, grid.group_size, grid.is_symmetric)
    is_channel = grid.group_size is None
    assert args.strategy == (QuantizationStrategy.CHANNEL if is_channel else QuantizationStrategy.GROUP)
    assert parsed.config_groups["group_0"].targets == ["Linear"]
    assert parsed.ignore == ["lm_head"]
    assert parsed.format == "pack-quantized"
    assert grid_of(parsed.model_dump()["config_groups"]["group_0"]["weights"]) == grid


def test_several_grids_are_several_groups():
    grids = {"a": zeros_on(Grid(4, 64)), "b": zeros_on(Grid(8)), "c": zeros_on(Grid(4, 64))}
    groups = CODEC.describe(grids, [], are_all=True)["config_groups"]
    assert [(g["targets"], g["weights"]["num_bits"]) for g in groups.values()] == [(["Linear"], 4), (["b"], 8)]
    groups = CODEC.describe(grids, [], are_all=False)["config_groups"]
    assert [g["targets"] for g in groups.values()] == [["a", "c"], ["b"]]


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
    with pytest.raises(RequirementError, match="are not read; expected int, group or channel, static"):
        grid_of(weights)


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
        grid_of(weights)
