"""What a plan says of servers: layers that vLLM fuses, and rows that it cuts among GPUs."""

import pytest
from compressed_tensors.quantization import QuantizationArgs

import llmkit
from llmkit.errors import InputError
from llmkit.transforms.quantize import quantize
from llmkit.transforms.recipe import Scheme
from tests.transforms.test_quantize import write_model

MLP = "model.layers.0.mlp."


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path / "m", hidden=256, ffn=384)
    return llmkit.open_checkpoint(tmp_path / "m")


def of_vllm(ckpt):
    return [note for note in ckpt.notes if note.startswith("vLLM ")]


def test_fused_layers_are_quantized_alike_or_it_is_said(model):
    assert of_vllm(quantize(model, bits=4, group_size="channel", symmetric=True, keep=["*.self_attn.*"]))[1:] == []
    (found,) = [n for n in of_vllm(quantize(model, bits=8, group_size=32, keep=["*.up_proj"])) if "fuses" in n]
    assert found == (
        f"vLLM fuses gate and up, which have to be quantized alike: {MLP}gate_proj.weight is int8 group 32 asymmetric, "
        f"{MLP}up_proj.weight is floats (2 such places)"
    )
    mixed = quantize(model, bits=4, group_size=32, symmetric=True, recipe={"*.0.*.v_proj": Scheme(8)})
    (found,) = [n for n in of_vllm(mixed) if "fuses" in n]
    assert "fuses q, k and v" in found
    assert "v_proj.weight is int8 group 32 symmetric" in found
    assert "such places" not in found


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_rows_that_are_cut_have_whole_groups_or_it_is_said(model, layout):
    notes = of_vllm(quantize(model, bits=4, group_size=32, symmetric=True, format=layout))
    assert [n for n in notes if "split" in n] == [
        f"vLLM cannot split rows among more than 4 GPUs: {MLP}down_proj.weight has 12 groups in a row, which stay whole"
    ]
    assert not [n for n in of_vllm(quantize(model, bits=4, group_size=16, symmetric=True)) if "split" in n]
    assert not [n for n in of_vllm(quantize(model, bits=8, group_size="channel", symmetric=True)) if "split" in n]


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "activations"),
    [(4, 32, True, None), (4, 128, False, None), (8, "channel", True, None), (8, "channel", True, "int8")],
)
def test_what_vllm_makes_room_for_in_compressed_tensors(model, bits, group, symmetric, activations):
    """Names, shapes and dtypes of the parameters that its loader fills, and what it reads of config.json.

    `CompressedTensorsWNA16.create_weights` (schemes/compressed_tensors_wNa16.py at 519b90d4), the same of
    `CompressedTensorsW8A8Int8` (at 00ba7ff1; its scales are float32, which others are cast to), and
    `_is_wNa16_group_channel` and `_is_dynamic_token_w8a8` of compressed_tensors.py at be696453.
    """
    made = quantize(model, bits=bits, group_size=group, symmetric=symmetric, activations=activations)
    name, n_out, n_in, per = f"{MLP}down_proj.weight", 256, 384, 32 // bits
    found = {key.removeprefix(name): str(lazy.spec) for key, lazy in made.tensors.items() if key.startswith(name)}
    n_groups = 1 if group == "channel" else n_in // group
    wanted = {"_scale": f"F32[{n_out}, {n_groups}]"}
    if activations:
        wanted[""] = f"I8[{n_out}, {n_in}]"
    else:
        wanted |= {"_packed": f"I32[{n_out}, {n_in // per}]", "_shape": "I64[2]"}
    if not symmetric:
        wanted["_zero_point"] = f"I32[{n_out // per}, {n_groups}]"
    assert found == wanted
    entry = made.config["quantization_config"]
    assert entry["format"] == ("int-quantized" if activations else "pack-quantized")
    assert entry["ignore"] == ["lm_head"]
    (described,) = entry["config_groups"].values()
    assert described["targets"] == ["Linear"]
    weights = QuantizationArgs.model_validate(described["weights"])
    strategy = "channel" if n_groups == 1 else "group"
    assert (weights.num_bits, weights.strategy, weights.dynamic) == (bits, strategy, False)
    inputs = described["input_activations"] and QuantizationArgs.model_validate(described["input_activations"])
    assert (inputs is not None) == (activations is not None)
    if inputs:
        assert weights.symmetric
        assert (inputs.num_bits, inputs.strategy, inputs.dynamic) == (8, "token", True)


def test_another_command_writes_graphs(model):
    with pytest.raises(InputError, match="--format onnx is no layout of folders") as caught:
        quantize(model, bits=4, format="onnx")
    assert caught.value.hint.startswith("llmkit export MODEL --bits 4 -o OUT")
