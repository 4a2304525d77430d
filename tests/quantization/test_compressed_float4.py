"""NVFP4 and MXFP4 in compressed-tensors' layout, as its own compressors write and restore them."""

import json

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from safetensors.torch import load_file, save_file

import llmkit
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.errors import RequirementError, SpecError
from llmkit.tensors.spec import DType
from llmkit.transforms import lora

MODULE = "model.layers.0.mlp.up_proj"
LIBRARY = {
    "nvfp4-pack-quantized": (NVFP4PackedCompressor, "NVFP4"),
    "mxfp4-pack-quantized": (MXFP4PackedCompressor, "MXFP4"),
}


def stored(form: str) -> tuple[dict[str, torch.Tensor], QuantizationScheme]:
    """A weight [24, 96] as the library stores it, and the scheme."""
    compressor, preset = LIBRARY[form]
    scheme = preset_name_to_scheme(preset, ["Linear"])
    torch.manual_seed(0)
    weight = torch.randn(24, 96) * torch.logspace(-3, 1, 24)[:, None]
    size = scheme.weights.group_size
    scale = weight.unflatten(1, (-1, size)).abs().amax(-1) / 6
    state = {"weight": weight.bfloat16()}
    if form.startswith("nv"):
        divisor = 448 * 6 / weight.abs().max()
        state |= {"weight_scale": scale * divisor, "weight_global_scale": divisor.reshape(1)}
    else:
        state |= {"weight_scale": scale.log2().ceil().exp2()}
    return compressor.compress(state, scheme), scheme


def folder_of(tmp_path, tensors, scheme, form, **changes):
    group = json.loads(scheme.model_dump_json())
    group["weights"] |= changes
    entry = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    save_file({f"{MODULE}.{end}": t.contiguous() for end, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    return llmkit.open_checkpoint(tmp_path)


@pytest.mark.parametrize("form", LIBRARY)
def test_weights_are_what_the_library_restores(tmp_path, form):
    tensors, scheme = stored(form)
    theirs = LIBRARY[form][0].decompress(tensors, scheme)["weight"]
    assert theirs.dtype == torch.bfloat16
    ckpt = folder_of(tmp_path, tensors, scheme, form)
    assert describe(ckpt) == f"float4 group {scheme.weights.group_size} symmetric, compressed-tensors"
    for dtype in (None, DType.BF16, DType.F16, DType.F32):
        ours = dequantized(ckpt, dtype=dtype).tensors[f"{MODULE}.weight"].load()
        assert torch.equal(ours, theirs.to(ours.dtype)), dtype
    assert set(dequantized(ckpt).tensors) == {f"{MODULE}.weight"}
    assert "quantized input_activations" in dequantized(ckpt).warnings[0]


def test_missing_and_misshapen_parts_are_named(tmp_path):
    form = "nvfp4-pack-quantized"
    tensors, scheme = stored(form)
    for changed, message in (
        ({"weight_global_scale": None}, "weight_global_scale is missing"),
        ({"weight_scale": tensors["weight_scale"][:, :3]}, r"weight_scale is F8_E4M3\[24, 3\]"),
        (
            {"weight_packed": tensors["weight_packed"][:, :3]},
            r"weight_packed is U8\[24, 3\]; expected U8\[out, in / 2\]",
        ),
    ):
        parts = {end: t for end, t in (tensors | changed).items() if t is not None}
        with pytest.raises(SpecError, match=f"{MODULE}: {message}"):
            dequantized(folder_of(tmp_path, parts, scheme, form))
    with pytest.raises(SpecError, match="in groups of 32; expected 16"):
        dequantized(folder_of(tmp_path, tensors, scheme, form, group_size=32))
    with pytest.raises(RequirementError, match="with zero points is not read"):
        dequantized(folder_of(tmp_path, tensors, scheme, form, symmetric=False))


@pytest.mark.parametrize("form", LIBRARY)
def test_an_adapter_of_another_layer_leaves_every_byte(tmp_path, form):
    """Another layer in floats; what is in float4 itself is refused with what to do."""
    tensors, scheme = stored(form)
    other = "model.layers.0.mlp.down_proj"
    folder_of(tmp_path, tensors, scheme, form)
    state = load_file(tmp_path / "model.safetensors") | {f"{other}.weight": torch.randn(96, 24).bfloat16()}
    save_file(state, tmp_path / "model.safetensors")
    ckpt = llmkit.open_checkpoint(tmp_path)
    for module, shape in ((other, (96, 24)), (MODULE, (24, 96))):
        key, path = f"base_model.model.{module}.", tmp_path / module
        path.mkdir()
        update = {f"{key}lora_A.weight": torch.randn(2, shape[1]), f"{key}lora_B.weight": torch.randn(shape[0], 2)}
        save_file(update, path / "adapter_model.safetensors")
        about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [module.rpartition(".")[2]]}
        (path / "adapter_config.json").write_text(json.dumps(about))
    merged = lora.merge(ckpt, [lora.open_adapter(tmp_path / other)])
    changed = {n for n, lazy in merged.tensors.items() if not torch.equal(lazy.load(), ckpt.tensors[n].load())}
    assert (changed, merged.tensors.keys()) == ({f"{other}.weight"}, ckpt.tensors.keys())
    assert merged.config == ckpt.config
    with pytest.raises(RequirementError, match="cannot be written in compressed-tensors as stored") as caught:
        lora.merge(ckpt, [lora.open_adapter(tmp_path / MODULE)], requantize=True)
    assert "--to dense" in caught.value.hint
