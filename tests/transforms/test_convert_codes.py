"""From one quantized layout to another: every code and scale stays, or is rounded again where that was asked for."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import llmkit
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.errors import InputError, RequirementError
from llmkit.inspection.comparison import compare
from llmkit.quantization.codec import FolderCodec, folder_readers
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.packing import pack
from llmkit.quantization.signs import with_positive_scales
from llmkit.tensors.spec import DType
from llmkit.transforms import lora
from llmkit.transforms.convert import convert
from llmkit.transforms.quantize import quantize
from tests.quantization.lazies import held
from tests.transforms.test_quantize import write_model

CODECS = {reader.name: reader for reader in folder_readers() if isinstance(reader, FolderCodec)}
FORMATS = [name for name, codec in CODECS.items() if 4 in codec.bits]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A half-precision model quantized to 4 bits in every layout, with zero points and without."""
    folder = tmp_path_factory.mktemp("codes")
    write_model(folder / "m", torch.float16, ffn=128)
    for name in FORMATS:
        for symmetric in (True, False):
            made = quantize(llmkit.open_checkpoint(folder / "m"), bits=4, format=name, symmetric=symmetric)
            llmkit.save(made, folder / f"{name}-{symmetric}")
    return folder


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("before", FORMATS)
def test_every_weight_stays_what_it_was(world, tmp_path, before, symmetric):
    """The float16 weights of both are equal, bit for bit; grids of both hold the same."""
    ckpt = llmkit.open_checkpoint(world / f"{before}-{symmetric}")
    wanted = dequantized(ckpt).tensors
    assert any("layers.0" in name and name.endswith("q_proj.weight") for name in wanted)
    for after in FORMATS:
        llmkit.save(convert(ckpt, to=after), tmp_path / after)
        found = llmkit.open_checkpoint(tmp_path / after)
        assert found.config["quantization_config"]["quant_method"] == after.removesuffix("_v2")
        assert list(dequantized(found).tensors) == list(wanted)
        assert all(torch.equal(lazy.load(), wanted[n].load()) for n, lazy in dequantized(found).tensors.items()), after
        assert (tmp_path / after / "quantize_config.json").is_file() == after.startswith("gptq")
    llmkit.save(convert(ckpt, to="dense"), tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(dense[name], lazy.load()) for name, lazy in wanted.items())
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMATS), st.integers(2, 8), st.sampled_from([16, 32, 96, None]), st.booleans(),
    st.sampled_from([DType.F16, DType.BF16, DType.F32]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_a_codec_refuses_what_it_would_change(name, bits, group, symmetric, dtype, has_order, has_offsets):
    """Where it does not refuse, what is read again has the same weights; where it does, it says why."""
    codec, grid = CODECS[name], Grid(bits, group, symmetric or has_offsets)
    generator = torch.Generator().manual_seed(bits)
    shape, groups = (32, 192), (32, grid.n_groups(192))
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    zeros = torch.randint(1, 1 << bits, groups, dtype=torch.uint8, generator=generator)
    order = torch.randint(0, groups[1], (192,), dtype=torch.int32, generator=generator)
    scales = (torch.rand(groups, generator=generator) + 0.1).to(dtype.torch)
    matrix = QuantizedMatrix(
        grid, shape, held(pack(codes, bits)), held(scales), None if grid.is_symmetric else held(zeros),
        offsets=held(scales) if has_offsets else None, order=held(order) if has_order and groups[1] > 1 else None,
    )  # fmt: skip
    why = codec.refuses(matrix)
    holds = bits in codec.bits and dtype in codec.scale_dtypes and not has_offsets
    assert (why is None) == (holds and (matrix.order is None or codec.holds_order)), why
    if why is None:
        found = codec.read(codec.write(matrix), codec.settings(matrix), None)
        assert torch.equal(found.dequantized(DType.F32).load(), matrix.dequantized(DType.F32).load())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 32, None]), st.booleans())
def test_negative_scales_become_positive_ones(bits, group, has_order):
    grid = Grid(bits, group)
    generator = torch.Generator().manual_seed(bits)
    groups = (6, grid.n_groups(64))
    codes = torch.randint(0, 1 << bits, (6, 64), dtype=torch.uint8, generator=generator)
    scales = torch.randn(groups, generator=generator)
    order = torch.randint(0, groups[1], (64,), dtype=torch.int32, generator=generator)
    signed = QuantizedMatrix(
        grid, (6, 64), held(pack(codes, bits)), held(scales), order=held(order) if has_order else None,
        has_signed_scales=True,
    )  # fmt: skip
    found = with_positive_scales(signed)
    assert torch.equal(found.dequantized().load(), signed.dequantized().load())
    assert bool((found.scales.load() >= 0).all())
    assert not found.grid.is_symmetric
    plain = QuantizedMatrix(grid, (6, 64), signed.codes, signed.scales)
    with pytest.raises(InputError, match="negative scales"):
        with_positive_scales(plain).scales.load()


def test_blocks_of_gguf_keep_their_codes(world, tmp_path):
    """Q4_0 has negative scales: zero points of 7 hold the same. Q4_1 has minima, which no zero point is."""
    llmkit.save(convert(llmkit.open_checkpoint(world / "m"), to="gguf", type="q4_0"), tmp_path / "q4_0")
    ckpt = llmkit.open_checkpoint(tmp_path / "q4_0")
    wanted = ckpt.tensors
    for to in FORMATS:
        made = convert(ckpt, to=to)
        assert any("every code and scale stays" in note for note in made.notes)
        assert any("embed_tokens.weight" in note and "became floats" in note for note in made.notes)
        llmkit.save(made, tmp_path / to)
        floats = dequantized(llmkit.open_checkpoint(tmp_path / to), dtype=DType.F32)
        assert all(torch.equal(floats.tensors[n].load().float(), lazy.load()) for n, lazy in wanted.items()), to
    llmkit.save(convert(llmkit.open_checkpoint(world / "m"), to="gguf", type="q4_1"), tmp_path / "q4_1")
    ckpt = llmkit.open_checkpoint(tmp_path / "q4_1")
    with pytest.raises(
        RequirementError, match=r"would round 14 of 16 matrices again .*: gptq has no offsets"
    ) as caught:
        convert(ckpt, to="gptq")
    assert "--requantize" in caught.value.hint
    made = convert(ckpt, to="gptq", requantize=True)
    assert any("rounded again: 14 layers, to int4 group 32 symmetric" in note for note in made.notes)
    llmkit.save(made, tmp_path / "again")
    assert describe(llmkit.open_checkpoint(tmp_path / "again")) == "int4 group 32, gptq"


def test_blocks_of_gguf_hold_codes(world, tmp_path):
    """Symmetric int4 in groups of 32 with float16 scales is Q4_0; a cast of the floats would be rounded again."""
    before = quantize(llmkit.open_checkpoint(world / "m"), bits=4, group_size=32, symmetric=True)
    llmkit.save(before, tmp_path / "q")
    ckpt = llmkit.open_checkpoint(tmp_path / "q")
    llmkit.save(convert(ckpt, to="gguf", type="q4_0"), tmp_path / "gguf")
    found = llmkit.open_checkpoint(tmp_path / "gguf").tensors
    wanted = dequantized(ckpt, dtype=DType.F32).tensors
    layers = [name for name in wanted if "_proj" in name]
    assert layers
    assert all(torch.equal(found[name].load(), wanted[name].load()) for name in layers)


def test_floats_are_no_quantized_model(world):
    with pytest.raises(RequirementError, match="float weights; --to awq stores quantized ones") as caught:
        convert(llmkit.open_checkpoint(world / "m"), to="awq")
    assert "llmkit quantize MODEL --bits 4 --format awq" in caught.value.hint
    with pytest.raises(InputError, match="--to hf has no option --requantize"):
        convert(llmkit.open_checkpoint(world / "m"), to="hf", requantize=True)


def write_adapter(path):
    """A LoRA of one layer of 64 x 64: the beginning of its names, and its tensors."""
    generator = torch.Generator().manual_seed(0)
    key = "base_model.model.model.layers.0.self_attn.q_proj."
    update = {f"{key}lora_A.weight": torch.rand(4, 64, generator=generator) - 0.5}
    update |= {f"{key}lora_B.weight": torch.rand(64, 4, generator=generator) - 0.5}
    path.mkdir()
    save_file(update, path / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (path / "adapter_config.json").write_text(json.dumps(about))
    return key, update


def test_an_adapter_leaves_int8_inputs_int8(world, tmp_path):
    made = quantize(llmkit.open_checkpoint(world / "m"), bits=8, activations="int8")
    llmkit.save(made, tmp_path / "base")
    write_adapter(tmp_path / "a")
    base = llmkit.open_checkpoint(tmp_path / "base")
    llmkit.save(lora.merge(base, [lora.open_adapter(tmp_path / "a")], requantize=True), tmp_path / "out")
    merged = llmkit.open_checkpoint(tmp_path / "out")
    assert merged.config["quantization_config"] == base.config["quantization_config"]
    assert {n: lazy.spec for n, lazy in merged.tensors.items()} == {n: lazy.spec for n, lazy in base.tensors.items()}
    changed = {n for n, lazy in merged.tensors.items() if not torch.equal(lazy.load(), base.tensors[n].load())}
    assert {name.rpartition(".")[0] for name in changed} == {"model.layers.0.self_attn.q_proj"}


def test_an_adapter_that_lifts_all_weights_above_zero(world, tmp_path):
    """Zero points would be 0, which the first version of GPTQ, storing them minus 1, does not hold."""
    key, update = write_adapter(tmp_path / "a")
    update = {name: part.abs() + 0.5 for name, part in update.items()}
    save_file(update, tmp_path / "a" / "adapter_model.safetensors")
    base = llmkit.open_checkpoint(world / "gptq-False")
    llmkit.save(lora.merge(base, [lora.open_adapter(tmp_path / "a")], requantize=True), tmp_path / "out")
    weight = "model.layers.0.self_attn.q_proj.weight"
    before, after = (
        dequantized(ckpt).tensors[weight].load() for ckpt in (base, llmkit.open_checkpoint(tmp_path / "out"))
    )
    wanted = before + 2 * update[f"{key}lora_B.weight"] @ update[f"{key}lora_A.weight"]
    assert wanted.min() > 0
    assert (after - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_an_adapter_changes_only_what_it_touches(world, tmp_path, name):
    """The rest keeps its bytes; what is changed is the nearest points of its old grid to base plus update."""
    key, update = write_adapter(tmp_path / "a")
    base, adapter = llmkit.open_checkpoint(world / f"{name}-False"), lora.open_adapter(tmp_path / "a")
    with pytest.raises(RequirementError, match="already quantized"):
        lora.merge(base, [adapter])
    merged = lora.merge(base, [adapter], requantize=True)
    assert any("stays in 13 layers" in note for note in merged.notes)
    assert any("rounded again: 1 layer, to int4 group 64 asymmetric" in note for note in merged.notes)
    llmkit.save(merged, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (world / f"{name}-False", tmp_path / "out"))
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed
    assert all(".layers.0.self_attn.q_proj." in name for name in changed)
    weight = "model.layers.0.self_attn.q_proj.weight"
    floats = dequantized(base).tensors[weight].load().float()
    wanted = floats + 2 * update[f"{key}lora_B.weight"] @ update[f"{key}lora_A.weight"]
    matrix = dequantized(llmkit.open_checkpoint(tmp_path / "out")).tensors[weight]
    error = (matrix.load().float() - wanted).abs()
    assert error.mean() < 0.3 * (wanted.amax() - wanted.amin()) / 15  # nearest points are a quarter of a step away
    with pytest.raises(RequirementError, match="has float weights: --requantize"):
        lora.merge(llmkit.open_checkpoint(world / "m"), [adapter], requantize=True)
    llmkit.save(convert(llmkit.open_checkpoint(world / "m"), to="gguf", type="q8_0"), tmp_path / "g")
    with pytest.raises(RequirementError, match=r"already quantized .*GGUF blocks") as caught:
        lora.merge(llmkit.open_checkpoint(next((tmp_path / "g").glob("*.gguf"))), [adapter], requantize=True)
    assert "--to dense" in caught.value.hint


def test_layers_that_are_stored_transposed(tmp_path):
    """GPT-2's Conv1D: GPTQ's loaders make linear layers of them, those of the other layouts do not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=32)).save_pretrained(
        tmp_path / "m"
    )
    ckpt = llmkit.open_checkpoint(tmp_path / "m")
    llmkit.save(quantize(ckpt, bits=8, format="gptq"), tmp_path / "q")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert stored["transformer.h.0.attn.c_attn.qweight"].shape == (64 // 4, 192)
    found = llmkit.open_checkpoint(tmp_path / "q")
    for name, lazy in dequantized(found).tensors.items():
        assert lazy.shape == ckpt.tensors[name].shape
        assert torch.allclose(lazy.load(), ckpt.tensors[name].load(), atol=1e-3), name
    llmkit.save(convert(found, to="gptq_v2"), tmp_path / "v2")
    for to in ("compressed-tensors", "awq"):
        with pytest.raises(RequirementError, match=f"{to} describes .out, in. only|would round"):
            convert(found, to=to)


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "kind"),
    [
        (4, 32, torch.float16, "Q4_0"),
        (4, 64, torch.bfloat16, "Q4_0"),
        (4, "channel", torch.float16, "Q4_0"),
        (3, 32, torch.float16, "Q4_0"),
        (8, 64, torch.bfloat16, "Q8_0"),
    ],
)
def test_gguf_takes_symmetric_codes_of_a_folder(tmp_path, bits, group, dtype, kind):
    """Without a type: blocks of the fewest bits that are the matrix value for value; what the gguf library reads."""
    from gguf import GGUFReader, quants

    write_model(tmp_path / "m", dtype, ffn=128)
    before = quantize(llmkit.open_checkpoint(tmp_path / "m"), bits=bits, group_size=group, symmetric=True, method="rtn")
    llmkit.save(before, tmp_path / "q")
    ckpt = llmkit.open_checkpoint(tmp_path / "q")
    made = convert(ckpt, to="gguf")
    assert "every code and scale stays in 14 matrices" in made.notes
    llmkit.save(made, tmp_path / "gguf")
    wanted = dequantized(ckpt, dtype=DType.F32).tensors
    (path,) = (tmp_path / "gguf").glob(f"*-{kind}.gguf")
    found = {t.name: t for t in GGUFReader(path).tensors}
    assert found["token_embd.weight"].tensor_type.name == "F16"
    for end, name in (
        ("ffn_down", "mlp.down_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
    ):
        stored = found[f"blk.1.{end}.weight"]
        assert stored.tensor_type.name == kind
        values = torch.from_numpy(quants.dequantize(stored.data, stored.tensor_type))
        assert torch.equal(values, wanted[f"model.layers.1.{name}.weight"].load())
    again = llmkit.open_checkpoint(tmp_path / "gguf").tensors  # queries and keys lie in another order there
    layers = [name for name in wanted if "_proj" in name]
    assert all(torch.equal(again[name].load(), wanted[name].load()) for name in layers)
    differing = {d.name for d in compare(ckpt, llmkit.open_checkpoint(tmp_path / "gguf")).beyond(0)}
    assert not differing & set(layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_once(tmp_path, dtype):
    """Codes times scales are rounded to the dtype that is asked for, not to the model's before it."""
    write_model(tmp_path / "m", dtype, ffn=128)
    llmkit.save(quantize(llmkit.open_checkpoint(tmp_path / "m"), bits=4, method="rtn"), tmp_path / "q")
    ckpt = llmkit.open_checkpoint(tmp_path / "q")
    exact = {name: lazy.load() for name, lazy in dequantized(ckpt, dtype=DType.F32).tensors.items()}
    assert any(not torch.equal(weight, weight.to(dtype).float()) for weight in exact.values())
    for name in ("float32", "float16", None):
        dense = convert(ckpt, to="dense", dtype=name)
        if name:
            stored = DType.parse(name).torch
            assert all(torch.equal(dense[n].load(), weight.to(stored)) for n, weight in exact.items()), name
        if name != "float16":
            assert all(compare(*pair).is_same(0) for pair in ((ckpt, dense), (dense, ckpt))), name
    gguf = convert(ckpt, to="gguf", type="f32", requantize=True)
    assert torch.equal(gguf["blk.1.ffn_down.weight"].load(), exact["model.layers.1.mlp.down_proj.weight"])
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.inference_mode():
        logits = [llmkit.load_decoder(made)(ids) for made in (ckpt, convert(ckpt, to="dense", dtype="float32"))]
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", ["q4_k_m", "q3_k_m", "iq4_xs", "q5_1"])
def test_blocks_of_a_gguf_file_stay_the_same_bytes(tmp_path, kind):
    """As a folder and back, in the same type or with none given; another type would round again."""
    from gguf import GGUFReader

    write_model(tmp_path / "m", torch.float16, hidden=256, ffn=256)
    llmkit.save(convert(llmkit.open_checkpoint(tmp_path / "m"), to="gguf", type=kind), tmp_path / "first")
    (path,) = (tmp_path / "first").glob("*.gguf")
    wanted = {t.name: (t.tensor_type, t.data.tobytes()) for t in GGUFReader(path).tensors}
    ckpt = llmkit.open_checkpoint(path)
    for type_ in (None, kind):
        made = convert(ckpt, to="gguf") if type_ is None else convert(ckpt, to="gguf", type=type_)
        llmkit.save(made, tmp_path / f"again {type_}")
        (path,) = (tmp_path / f"again {type_}").glob("*.gguf")
        assert {t.name: (t.tensor_type, t.data.tobytes()) for t in GGUFReader(path).tensors} == wanted
    with pytest.raises(RequirementError, match=r"--type q4_0 would round \d+ of 16 quantized matrices again") as caught:
        convert(ckpt, to="gguf", type="q4_0")
    assert "--requantize" in caught.value.hint
    assert any("rounded again" in note for note in convert(ckpt, to="gguf", type="q4_0", requantize=True).notes)
