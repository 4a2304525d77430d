"""The quantize transform: what it chooses, what it refuses, and that transformers loads what it writes."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmkit
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.errors import InputError, RequirementError, SpecError
from llmkit.pipeline.plan import make_plan, slice_rows
from llmkit.quantization.matrix import Grid
from llmkit.quantization.quality import Meter, sizes
from llmkit.tensors.lazy import Context
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType
from llmkit.transforms.quantize import quantize
from tests.quantization.lazies import LIBRARY_HAS_GAPS, compressed

BLOCK = "model.layers.0."
LINEAR = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def write_model(folder, dtype=torch.float32, *, hidden=64, ffn=96, tied=False, config_dtype=None, layers=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=80, tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
    state = {
        k: v.to(dtype).contiguous() for k, v in model.state_dict().items() if not (tied and k.startswith("lm_head"))
    }
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    named = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    named.pop("torch_dtype", None)
    named["dtype"] = config_dtype or str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(named))
    return state


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path / "m")
    return llmkit.open_checkpoint(tmp_path / "m")


def skip_if_zero_points_cannot_load(symmetric):
    from importlib.metadata import version

    import transformers

    library = tuple(map(int, version("compressed-tensors").split(".")[:2]))
    if not symmetric and transformers.__version__.startswith("4.") and not (0, 14) <= library <= (0, 17):
        pytest.skip("transformers 4 cannot load packed zero points with this compressed-tensors")


def hf_logits(folder):
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "ffn"),
    [
        (4, 32, True, 96),
        (4, 32, False, 96),
        (4, "channel", False, 100),  # rows that do not fill their words
        (8, "channel", True, 96),
        (8, "channel", False, 98),
        (8, 32, True, 96),
        (3, 16, False, 96),
        (2, 32, True, 96),
    ],
)
def test_transformers_loads_the_folder_and_computes_what_we_restore(tmp_path, bits, group_size, symmetric, ffn, tied):
    skip_if_zero_points_cannot_load(symmetric)
    if bits < 4 and LIBRARY_HAS_GAPS:
        pytest.skip("this compressed-tensors packs 3 bits otherwise, and transformers 4 loads no 2 with it")
    state = write_model(tmp_path / "float", ffn=ffn, tied=tied)
    ckpt = llmkit.open_checkpoint(tmp_path / "float")
    llmkit.save(quantize(ckpt, bits=bits, group_size=group_size, symmetric=symmetric), tmp_path / "quantized")
    restored = dequantized(llmkit.open_checkpoint(tmp_path / "quantized"))
    assert {k: tuple(v.shape) for k, v in state.items()} == {k: t.shape for k, t in restored.tensors.items()}
    llmkit.save(restored, tmp_path / "restored")
    ours, theirs = hf_logits(tmp_path / "restored"), hf_logits(tmp_path / "quantized")
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert not torch.allclose(theirs, hf_logits(tmp_path / "float"), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_loads_too(tmp_path, dtype):
    skip_if_zero_points_cannot_load(symmetric=False)
    write_model(tmp_path / "float", dtype)
    ckpt = llmkit.open_checkpoint(tmp_path / "float")
    llmkit.save(quantize(ckpt, bits=4, group_size=32, symmetric=False), tmp_path / "quantized")
    llmkit.save(dequantized(llmkit.open_checkpoint(tmp_path / "quantized")), tmp_path / "restored")
    theirs = hf_logits(tmp_path / "quantized")
    assert theirs.dtype == dtype
    assert torch.equal(theirs, hf_logits(tmp_path / "restored"))


def test_subsets_load_in_transformers(tmp_path, model):
    chosen = quantize(model, bits=8, keep=["*.down_proj"], only=["*.mlp.*", "lm_head"])
    llmkit.save(chosen, tmp_path / "quantized")
    llmkit.save(dequantized(llmkit.open_checkpoint(tmp_path / "quantized")), tmp_path / "restored")
    names = sorted(k for k in chosen.tensors if k.endswith("_packed") and not k.startswith("model.layers.1"))
    assert names == [
        "lm_head.weight_packed",
        f"{BLOCK}mlp.gate_proj.weight_packed",
        f"{BLOCK}mlp.up_proj.weight_packed",
    ]
    torch.testing.assert_close(hf_logits(tmp_path / "quantized"), hf_logits(tmp_path / "restored"), atol=1e-5, rtol=0)


def test_what_changes_and_what_stays(model):
    out = quantize(model, bits=4, symmetric=False)
    expected = {f"model.layers.{i}.{m}.{p}" for i in (0, 1) for m in LINEAR for p in (
        "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")}  # fmt: skip
    assert set(out.tensors) - set(model.tensors) == expected
    assert set(model.tensors) - set(out.tensors) == {f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in LINEAR}
    for name in set(model.tensors) & set(out.tensors):
        assert out.tensors[name] is model.tensors[name]
    entry = out.config["quantization_config"]
    assert entry["ignore"] == ["lm_head"]
    assert entry["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "quantization_config" not in model.config
    assert out.history[-1]["transform"] == "quantize"
    assert describe(out) == "int4 group 32 asymmetric, compressed-tensors"
    assert any("14 linear layers to int4 group 32 asymmetric" in n for n in out.notes)
    siblings = [out.tensors[f"{BLOCK}mlp.up_proj.{p}"] for p in ("weight_packed", "weight_scale", "weight_zero_point")]
    assert len({id(s.node) for s in siblings}) == 1


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, False)])
def test_row_slices_of_the_plan_equal_the_whole(model, bits, symmetric):
    out = quantize(model, bits=bits, group_size=32, symmetric=symmetric, method="rtn")
    node = out.tensors[f"{BLOCK}mlp.gate_proj.weight_packed"].node
    slices = slice_rows(node, 700)  # two rows or three, were it not for the step
    assert len(slices) > 3
    whole = node.evaluate((0, node.n_rows), Context())
    for index, expected in enumerate(whole):
        parts = []
        for rows in slices:
            start, stop = node.output_rows(index, rows)
            if start < stop:
                parts.append(node.evaluate(rows, Context())[index])
                assert len(parts[-1]) == stop - start
        assert torch.equal(torch.cat(parts), expected)
    weight = model.tensors[f"{BLOCK}mlp.gate_proj.weight"].load()
    direct = compressed(weight, Grid(bits, 32, symmetric), torch.float32)
    for name, expected in direct.items():
        lazy = out.tensors[f"{BLOCK}mlp.gate_proj.{name}"]
        assert torch.equal(whole[lazy.index] if lazy.node is node else lazy.load(), expected)


def test_scales_are_stored_in_the_models_dtype(tmp_path):
    """transformers would cast finer ones when it loads them, and the grid would not be the one that was rounded to."""
    write_model(tmp_path / "m", torch.float32, config_dtype="bfloat16")
    ckpt = llmkit.open_checkpoint(tmp_path / "m")
    out = quantize(ckpt, bits=8, method="rtn")
    name = f"{BLOCK}mlp.up_proj.weight"
    assert out.tensors[f"{name}_scale"].dtype is DType.BF16
    expected = compressed(ckpt.tensors[name].load(), Grid(8, 32, False), torch.bfloat16)
    assert torch.equal(out.tensors[f"{name}_packed"].load(), expected["weight_packed"])


def test_planning_reads_no_tensor_data(tmp_path, model, monkeypatch):
    llmkit.save(quantize(model, bits=8), tmp_path / "q")
    monkeypatch.setattr(SourceFile, "read_tensor", lambda *_: pytest.fail("read"))
    assert make_plan(quantize(model, bits=8), tmp_path / "out").write_nbytes > 0
    assert make_plan(dequantized(llmkit.open_checkpoint(tmp_path / "q")), tmp_path / "out").write_nbytes > 0


@pytest.mark.parametrize(
    ("hidden", "ffn", "four", "eight"), [(128, 256, 64, 128), (128, 192, 64, 64), (64, 96, 32, 32), (64, 128, 64, 64)]
)
def test_automatic_group_size_is_the_largest_that_divides_every_row(tmp_path, hidden, ffn, four, eight):
    write_model(tmp_path / "m", hidden=hidden, ffn=ffn, layers=1)
    ckpt = llmkit.open_checkpoint(tmp_path / "m")
    for bits, expected, largest in ((4, four, 64), (8, eight, 128)):
        out = quantize(ckpt, bits=bits)
        assert out.config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == expected
        assert any("does not divide" in n for n in out.notes) == (expected < largest)


def test_group_size_that_does_not_divide(model):
    with pytest.raises(SpecError) as caught:
        quantize(model, bits=4, group_size=64)
    message = caught.value.message
    assert message == (
        "2 of 14 layers have rows of 96 weights, which do not fall into groups of 64: model.layers.0.mlp.down_proj."
        "weight, model.layers.1.mlp.down_proj.weight; sizes that divide them: 16, 32, channel"
    )
    assert caught.value.hint == (
        "--group-size 32 fits every layer; or leave these in floats: --keep 'model.layers.*.mlp.down_proj'"
    )
    assert quantize(model, bits=4, group_size=64, keep=["model.layers.*.mlp.down_proj"])


def test_rows_without_groups_stay_in_floats(tmp_path):
    write_model(tmp_path / "m", ffn=100)
    out = quantize(llmkit.open_checkpoint(tmp_path / "m"), bits=4)
    assert any("2 whose rows fall into no groups of 32 stay in floats: model.layers.0.mlp.down" in n for n in out.notes)
    assert out.config["quantization_config"]["ignore"][:2] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert "model.layers.0.mlp.down_proj.weight" in out.tensors
    assert "model.layers.0.mlp.up_proj.weight_packed" in out.tensors


def test_no_group_size_fits(tmp_path):
    write_model(tmp_path / "m", hidden=40, ffn=100)
    with pytest.raises(SpecError, match="sizes that divide them: channel") as caught:
        quantize(llmkit.open_checkpoint(tmp_path / "m"), bits=4)
    assert "--group-size channel" in caught.value.hint


@pytest.mark.parametrize("size", [0, -1, 48, "tensor", True])
def test_group_sizes_that_are_not_offered(model, size):
    with pytest.raises(InputError, match="expected 16, 32, 64, 128, 256, channel or auto"):
        quantize(model, bits=4, group_size=size)


def test_other_bits(model):
    with pytest.raises(InputError, match="--bits 16: expected 2, 3, 4, 5, 6, 7 or 8"):
        quantize(model, bits=16)


def test_globs_that_match_nothing_name_the_nearest(model):
    with pytest.raises(SpecError, match=r"\.q_prj' matches no module and no tensor") as caught:
        quantize(model, bits=8, keep=["model.layers.0.self_attn.q_prj"])
    assert caught.value.hint == "did you mean model.layers.0.self_attn.q_proj?"
    with pytest.raises(SpecError, match="'lm_hed'"):
        quantize(model, bits=8, only=["lm_hed"])


def test_globs_take_module_and_tensor_names(model):
    by_module = quantize(model, bits=8, keep=[f"{BLOCK}mlp.up_proj"])
    by_tensor = quantize(model, bits=8, keep=[f"{BLOCK}mlp.up_proj.weight"])
    assert list(by_module.tensors) == list(by_tensor.tensors)
    assert f"{BLOCK}mlp.up_proj.weight" in by_module.tensors
    assert by_module.config["quantization_config"]["ignore"] == [f"{BLOCK}mlp.up_proj", "lm_head"]
    assert any(f"kept as they are: {BLOCK}mlp.up_proj, lm_head" in n for n in by_module.notes)


@pytest.mark.parametrize("only", [["model.embed_tokens"], ["*norm*"]])
def test_only_what_is_never_quantized(model, only):
    with pytest.raises(SpecError, match="nothing is left to quantize"):
        quantize(model, bits=8, only=only)


def test_a_tied_head_is_never_quantized(tmp_path):
    state = write_model(tmp_path / "m", tied=True)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()  # stored all the same, as some tools do
    save_file(state, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    ckpt = llmkit.open_checkpoint(tmp_path / "m")
    with pytest.raises(SpecError, match="a head that is tied to the embedding is part of it"):
        quantize(ckpt, bits=8, only=["lm_head"])
    assert "lm_head.weight" in quantize(ckpt, bits=8, only=["lm_head", "*.q_proj"]).tensors


def test_tensors_of_another_architecture_than_the_config_states(tmp_path):
    state = write_model(tmp_path / "m")
    renamed = {name.replace("model.layers.", "transformer.h."): tensor for name, tensor in state.items()}
    save_file(renamed, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpecError, match=r"the tensors do not fit config\.json: .* that the model does not have"):
        quantize(llmkit.open_checkpoint(tmp_path / "m"), bits=8)


def test_already_quantized(model):
    once = quantize(model, bits=8)
    with pytest.raises(RequirementError, match=r"already quantized \(int8 group 32 asymmetric, compressed-tensors\)"):
        quantize(once, bits=4)


def test_weights_that_are_no_floats(tmp_path):
    state = write_model(tmp_path / "m")
    state[f"{BLOCK}mlp.up_proj.weight"] = state[f"{BLOCK}mlp.up_proj.weight"].double()
    save_file(state, tmp_path / "m/model.safetensors")
    with pytest.raises(SpecError, match=r"up_proj\.weight is F64; expected float32, float16 or bfloat16"):
        quantize(llmkit.open_checkpoint(tmp_path / "m"), bits=8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_names_the_tensor_and_leaves_no_output(tmp_path, bad):
    state = write_model(tmp_path / "m")
    state[f"{BLOCK}mlp.up_proj.weight"][3, 5] = bad
    save_file(state, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight: the weights hold NaN or infinities"):
        llmkit.save(quantize(llmkit.open_checkpoint(tmp_path / "m"), bits=8), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_meter_measures_what_a_second_pass_finds(tmp_path, bits, symmetric, dtype):
    write_model(tmp_path / "m", dtype)
    ckpt = llmkit.open_checkpoint(tmp_path / "m")
    meter = Meter()
    out = quantize(ckpt, bits=bits, symmetric=symmetric, meter=meter)
    assert meter.measured() == []
    assert len(meter.unmeasured()) == 14
    llmkit.save(out, tmp_path / "q")
    assert meter.unmeasured() == []
    written = llmkit.open_checkpoint(tmp_path / "q")
    floats, restored = load_file(tmp_path / "m/model.safetensors"), dequantized(written).tensors
    found = meter.worst(14)
    for one in found:
        w = floats[one.name].double()
        expected = float((restored[one.name].load().double() - w).norm() / w.norm())
        assert one.relative_error == pytest.approx(expected, rel=1e-4)
    assert found == sorted(found, key=lambda m: -m.relative_error)
    assert found[-1].relative_error <= meter.overall() <= found[0].relative_error


def test_the_meter_does_not_claim_what_a_resumed_run_skipped(tmp_path, model):
    meter = Meter()
    out = quantize(model, bits=8, meter=meter)
    out.tensors[f"{BLOCK}mlp.up_proj.weight_packed"].load()
    assert [m.name for m in meter.measured()] == [f"{BLOCK}mlp.up_proj.weight"]
    node = out.tensors[f"{BLOCK}mlp.gate_proj.weight_packed"].node
    node.evaluate((0, 8), Context())
    assert f"{BLOCK}mlp.gate_proj.weight" in meter.unmeasured()


def test_a_zero_weight_has_no_error():
    meter = Meter()
    compressed(torch.zeros(4, 32), Grid(4, 32), torch.float32, meter.observer("w", 4))
    assert meter.worst() == meter.measured()
    assert meter.worst()[0].relative_error == 0.0


def test_sizes_are_those_of_the_files(tmp_path, model):
    out = quantize(model, bits=4, group_size=32, symmetric=True)
    llmkit.save(out, tmp_path / "q")
    found = sizes(model.tensors, out.tensors)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("m", "q"))
    assert found.before_nbytes == sum(t.nbytes for t in before.values())
    assert found.after_nbytes == sum(t.nbytes for t in after.values())
    assert found.n_parameters == sum(t.numel() for t in before.values())
    assert found.bits_per_weight == pytest.approx(8 * found.after_nbytes / found.n_parameters)
    # 4 bits, a float32 scale for 32 weights, and 128 bits of shape for each layer
    layers = [t for k, t in before.items() if "_proj" in k]
    expected = 4 + 1 + 128 * len(layers) / sum(t.numel() for t in layers)
    assert found.linear_bits_per_weight == pytest.approx(expected)
    assert found.as_dict()["n_quantized"] == sum(t.numel() for t in layers)
    # Codes may be called as the weight was: 8 bits, and a float32 scale a row.
    found = sizes(model.tensors, quantize(model, bits=8, activations="int8").tensors)
    n_rows, n_weights = sum(len(t) for t in layers), sum(t.numel() for t in layers)
    assert (found.n_quantized, found.linear_bits_per_weight) == (n_weights, pytest.approx(8 + 32 * n_rows / n_weights))


@pytest.mark.slow
def test_smollm2(tmp_path, shallow_smollm2):
    """A real model: sizes, and errors in the region that other tools reach (facts: 0.129 for int4, 0.011 for int8)."""
    ckpt = llmkit.open_checkpoint(shallow_smollm2)
    for bits, group, low, high in ((4, 64, 0.07, 0.14), (8, 64, 0.003, 0.015)):
        meter = Meter()
        out = quantize(ckpt, bits=bits, meter=meter)
        weights = out.config["quantization_config"]["config_groups"]["group_0"]["weights"]
        assert weights["group_size"] == group  # 576 is no multiple of 128
        llmkit.save(out, tmp_path / f"int{bits}")
        assert low < meter.overall() < high
        assert bits < sizes(ckpt.tensors, out.tensors).linear_bits_per_weight < bits + 0.7
        assert not meter.unmeasured()


def test_a_method_of_zero_points_and_a_symmetric_grid(model):
    with pytest.raises(InputError, match="--method hqq chooses zero points, and a symmetric grid has none"):
        quantize(model, bits=4, symmetric=True, method="hqq")
