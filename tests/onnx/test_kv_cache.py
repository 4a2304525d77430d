"""Keys and values in int8: graphs held to a torch cache that rounds alike, and where the scales come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_graphs import PLUGINS

from llmkit.calibration.key_values import measure_ranges
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.onnx.contract import decoder_of, initializer_bytes
from llmkit.onnx.kv_cache import CacheScales, RoundedDecoder
from llmkit.onnx.model import build_graph
from llmkit.onnx.parity import compare_decoders
from llmkit.tensors.lazy import Apply
from llmkit.tensors.spec import DType, TensorSpec

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
# Grouped heads, caps and windows, ALiBi, an open prefix, norms of heads, learned and interleaved positions.
FAMILIES = ("llama", "gemma2", "bloom", "chatglm", "qwen3", "gpt2", "gptj", "falcon", "lfm2", "falcon_h1",
            "gemma3n", "gemma4")  # fmt: skip
MINI = Path(__file__).resolve().parents[2] / "evalsets" / "mini" / "base"


def constant(tensor):
    """A lazy tensor of numbers that are there."""
    spec = TensorSpec(DType.F32, tuple(tensor.shape))
    return Apply("held", [], spec, lambda: tensor, row_step=None, output_rows=[0]).output()


def made(name, *, attention="gqa", per_tensor=False, wrong=1.0):
    """The graph's decoder, the torch decoder that rounds alike and the plain one, and the ends of prompts.

    `wrong` multiplies the scales of the graph alone.
    """
    architecture = PLUGINS[name]
    config = architecture.tiny_config()
    ckpt, model = random_checkpoint(architecture, config), architecture.bind(config)
    decoder, ends = load_decoder(ckpt, architecture=architecture), architecture.prompt_suffix_of(config)
    ids = torch.randint(5, 90, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    ranges = measure_ranges(decoder, ids, suffix=ends)
    nothing = [torch.ones(model.dims.kv_heads, model.dims.head_dim)] * 2  # of a layer without attention
    pairs = [[r[:, None] / 127 for r in ranges.get(i, nothing)] for i in range(model.dims.layers)]
    if per_tensor:
        pairs = [[s.max().reshape(1) for s in pair] for pair in pairs]
    keys, values = ([constant(pair[i] * wrong) for pair in pairs] for i in range(2))
    cache = CacheScales(tuple(keys), tuple(values))
    graph = build_graph(model, ckpt.tensors, initializer_bytes, attention=attention, cache=cache)
    caches = [v.type.tensor_type.elem_type for v in graph.graph.input if v.name.endswith((".key", ".value"))]
    assert caches == [3] * 2 * len(ranges)  # int8, as ONNX numbers it
    return decoder_of(graph, model), RoundedDecoder(decoder, [tuple(p) for p in pairs]), decoder, ends


@pytest.mark.parametrize("name", FAMILIES)
def test_a_torch_cache_that_rounds_alike(name):
    found, rounding, floats, ends = made(name)
    of_int8 = max(d.largest for d in compare_decoders(rounding, floats, suffix=ends))
    differences = compare_decoders(found, rounding, suffix=ends)
    assert of_int8 > 1e-4
    # A value between two codes may go to either: one of some thousand, so that a share of the rounding is left.
    assert max(d.largest for d in differences) < of_int8 / 4
    assert [d.case for d in differences] == ["prefill", "cached steps", "left-padded row", "row beside it"]


def test_one_scale_for_a_layer():
    found, rounding, floats, _ = made("llama", per_tensor=True)
    of_int8 = max(d.largest for d in compare_decoders(rounding, floats))
    assert max(d.largest for d in compare_decoders(found, rounding)) < of_int8 / 4


def test_without_a_mask():
    found, rounding, floats, _ = made("gemma2", attention="flash")
    ids = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(2))
    of_int8 = (rounding(ids) - floats(ids)).abs().max()
    assert (found(ids) - rounding(ids)).abs().max() < of_int8 / 4


@pytest.mark.parametrize("wrong", [0.9, 1.1])
def test_wrong_scales_are_seen(wrong):
    found, rounding, floats, _ = made("llama", wrong=wrong)
    of_int8 = max(d.largest for d in compare_decoders(rounding, floats))
    assert max(d.largest for d in compare_decoders(found, rounding)) > of_int8 / 2


@pytest.mark.parametrize("name", ["llama", "gptj", "chatglm", "bloom", "lfm2", "falcon_h1"])
def test_ranges_of_a_model_that_is_read_layer_by_layer(name):
    architecture = PLUGINS[name]
    config = architecture.tiny_config()
    ckpt, ends = random_checkpoint(architecture, config), architecture.prompt_suffix_of(config)
    whole = load_decoder(ckpt, architecture=architecture)
    streamed = load_decoder(ckpt, architecture=architecture, streamed=True)
    ids = list(range(5, 45))
    wanted, found = (measure_ranges(d, ids, suffix=ends) for d in (whole, streamed))
    assert all(torch.equal(a, b) for i in wanted for a, b in zip(wanted[i], found[i], strict=True))
    dims = whole.model.dims
    assert {r.shape for pair in found.values() for r in pair} == {(dims.kv_heads, dims.head_dim)}


@pytest.mark.parametrize("name", ["llama", "gptj", "gpt_neox"])  # all of a head turned; interleaved; a part of it
def test_ranges_hold_wherever_a_key_stands(name):
    """A key of the first layer follows from its token and its place alone: no place leads it out of its range."""
    architecture = PLUGINS[name]
    decoder = load_decoder(random_checkpoint(architecture, architecture.tiny_config()), architecture=architecture)
    ids = torch.arange(5, 13)
    ranges, _ = measure_ranges(decoder, ids.tolist())[0]
    cache = decoder.new_cache()
    decoder(ids[None], cache)
    near = cache.layer(0)[0].abs().amax((0, 2))
    widest = near
    for offset in (7, 19, 40):
        cache = decoder.new_cache()
        decoder(torch.cat([torch.zeros(offset, dtype=torch.int64), ids])[None], cache)
        widest = torch.maximum(widest, cache.layer(0)[0][:, :, offset:].abs().amax((0, 2)))
    assert (widest > near * 1.01).any()  # the range of the channel alone would have been left
    assert (widest <= ranges * 1.00001).all()


def export(tmp_path, capsys, *options, source=MINI):
    from llmkit.cli.app import main

    capsys.readouterr()
    code = main(["export", str(source), "--to", "onnx", "-o", str(tmp_path / "out"), *map(str, options)])
    return code, capsys.readouterr()


def test_export_and_check(tmp_path, capsys):
    code, said = export(tmp_path, capsys, "--kv-cache-dtype", "int8", "--json")
    document = json.loads(said.out)
    assert code == 0
    cases = ["prefill", "cached steps", "left-padded row", "row beside it"]
    assert [d["case"] for d in document["parity"]] == cases
    assert all(d["largest"] <= document["tolerance"] for d in document["parity"])
    assert [d["case"] for d in document["as_it_runs"]] == ["int8 cache against one in floats"]
    assert document["recipe"][-1]["kv_cache_dtype"] == "int8"
    assert document["nbytes"] < 300_000  # the graph, small files and scales: the weights are linked

    from llmkit.cli.app import main

    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    onnx = json.loads(capsys.readouterr().out)["details"]["onnx"]
    assert onnx["kv_cache"] == {"dtype": "INT8", "nbytes_per_token": 4 * 2 * 2 * 32}  # layers, k and v, heads, channels
    assert main(["verify", str(tmp_path / "out")]) == 0
    text = Path(MINI).parent / "text.txt"
    found = []
    for folder in (tmp_path / "out", MINI):
        capsys.readouterr()
        assert main(["perplexity", str(folder), "--text", str(text), "--context", "64", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=5e-3)
    assert found[0] != found[1]


def test_a_text_of_ones_own(tmp_path, capsys):
    scales = []
    for text in ("The ferry left. " * 60, "Warum nicht? " * 60):
        (tmp_path / "text.txt").write_text(text)
        code, said = export(
            tmp_path, capsys, "--kv-cache-dtype", "int8", "--calibrate", tmp_path / "text.txt", "--no-check",
            "--overwrite",
        )  # fmt: skip
        assert code == 0
        assert "calibrated on text.txt" in said.err

        from llmkit.onnx.kv_cache import scales_in

        scales.append(scales_in(tmp_path / "out"))
    assert len(scales[0]) == 4
    assert not torch.equal(scales[0][0][0], scales[1][0][0])


def test_scales_of_the_checkpoint(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.onnx.kv_cache import scales_in

    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(MINI / "model.safetensors")
    decoder = load_decoder(open_checkpoint(MINI))
    ranges = measure_ranges(decoder, list(range(5, 105)))
    wanted = [tuple(r.max().reshape(1) / 127.5 for r in ranges[i]) for i in range(4)]
    for i, pair in enumerate(wanted):
        for part, scale in zip("kv", pair, strict=True):
            tensors[f"model.layers.{i}.self_attn.{part}_scale"] = scale
    save_file(tensors, source / "model.safetensors")
    for path in MINI.iterdir():
        if path.suffix == ".json":
            (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((MINI / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": scheme,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    code, said = export(tmp_path, capsys, "--kv-cache-dtype", "int8", "--json", source=source)
    document = json.loads(said.out)
    assert code == 0, said.err
    assert any("the checkpoint's own (kv_cache_scheme)" in note for note in document["notes"])
    assert scales_in(tmp_path / "out") == wanted
    del tensors["model.layers.2.self_attn.v_scale"]
    save_file(tensors, source / "model.safetensors")
    code, said = export(tmp_path, capsys, "--kv-cache-dtype", "int8", "--overwrite", source=source)
    assert code == 2
    assert "its kv_cache_scheme is int8, but layer 2 has no scale for values" in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-cache-dtype", "int4"], "--kv-cache-dtype 'int4' is unknown; expected int8"),
        (["--kv-cache-dtype", "int8", "--provider", "cuda"], "an int8 cache is made for --provider cpu, found cuda"),
        (
            ["--kv-cache-dtype", "int8", "--attention", "mha"],
            "the attention op 'mha' has no int8 cache; gqa and flash have",
        ),
        (["--kv-cache-dtype", "int8", "--calibrate", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
        (["--kv-cache-dtype", "int8", "--calibrate", str(MINI)], "has no .jsonl, .md, .txt files"),
        (["--kv-cache-dtype", "int8", "--calibrate", str(MINI / "model.safetensors")], "is not UTF-8 text"),
        (["--calibrate", "text.txt"], "--calibration is for a cache in integers"),
    ],
)
def test_what_is_refused(options, message, tmp_path, capsys):
    code, said = export(tmp_path, capsys, *options)
    assert code == 2
    assert message in " ".join(said.err.split())
    assert "hint: " in said.err
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_short(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Too little.")
    code, said = export(tmp_path, capsys, "--kv-cache-dtype", "int8", "--calibrate", tmp_path / "text.txt")
    assert code == 2
    assert "has 11 characters, too few to calibrate on" in said.err
    assert not (tmp_path / "out").exists()


def tiny_folder(name, folder, changes=None):
    """A tiny random model of a family, without a tokenizer."""
    from safetensors.torch import save_file

    config = PLUGINS[name].tiny_config() | (changes or {})
    ckpt = random_checkpoint(PLUGINS[name], config)
    folder.mkdir()
    save_file({n: t.load().contiguous() for n, t in ckpt.tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_models_that_cannot_have_one(tmp_path, capsys):
    source = tiny_folder("llama", tmp_path / "llama")
    code, said = export(tmp_path, capsys, "--kv-cache-dtype", "int8", source=source)
    assert code == 2
    assert "llama has no tokenizer, and the scales of an int8 cache are calibrated on a text" in said.err
    for name, changes, message in (
        ("rwkv", {}, "rwkv keeps no keys and values"),
        ("mamba2", {}, "mamba2 keeps no keys and values"),
        ("llama", {"head_dim": 12}, "GroupQueryAttention needs a head size that 8 divides, found 12"),
    ):
        source = tiny_folder(name, tmp_path / f"{name} again", changes)
        (source / "tokenizer.json").write_text("{}")
        code, said = export(tmp_path, capsys, "--kv-cache-dtype", "int8", source=source)
        assert code == 2
        assert message in said.err
        assert "hint: leave --kv-cache-dtype out" in said.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "shape"),
    [({}, (1,)), ({"symmetric": False}, (1,)), ({"dynamic": True}, (1,)), ({"num_bits": 4}, (1,)),
     ({"type": "float"}, (1,)), ({}, (2,))],
    ids=["fits", "asymmetric", "dynamic", "4 bits", "float8", "by head"],
)  # fmt: skip
def test_which_scales_of_a_checkpoint_are_taken(change, shape):
    """Those of another grid, or of a shape that the op has not, are calibrated anew."""
    from llmkit.architecture import registry
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.onnx.kv_cache import choose_scales
    from llmkit.tensors.lazy import Apply
    from llmkit.tensors.spec import DType, TensorSpec

    ckpt = open_checkpoint(MINI)
    model = registry.require(ckpt.config, "mini").bind(ckpt.config)
    scale = Apply("made", [], TensorSpec(DType.F32, shape), lambda: torch.full(shape, 0.1)).output()
    names = [f"model.layers.{i}.self_attn.{part}_scale" for i in range(4) for part in "kv"]
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False} | change
    config = {**ckpt.config, "quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}}
    stored = ckpt.derive(tensors={**ckpt.tensors, **dict.fromkeys(names, scale)}, config=config)
    found, notes = choose_scales(stored, ckpt, model, dtype="int8", calibration=None, provider="cpu")
    is_taken = not change and shape == (1,)
    assert found.kind == ("PER_TENSOR" if is_taken else "PER_CHANNEL")
    assert ("the checkpoint's own" in notes[0]) is is_taken


def test_the_torch_cache_rounds_and_clips_as_the_kernel_does():
    """clip(round half to even(x / scale), -128, 127), as tests/onnx/test_int8_cache_kernel.py holds the kernel to."""
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.decoder.kv import Heads
    from llmkit.decoder.scores import Scores
    from llmkit.onnx.kv_cache import RoundedDecoder

    scale = torch.full((2, 1, 32), 0.5)
    cache = RoundedDecoder(load_decoder(open_checkpoint(MINI)), [(scale, 2 * scale)]).new_cache()
    cache.begin(torch.zeros(1, 4, dtype=torch.int64), None)
    x = torch.tensor([-100.0, 100.0, 0.75, -0.25])[None, None, :, None].expand(1, 2, 4, 32).contiguous()
    cache.attend(0, Heads(torch.ones(1, 4, 4, 32), x, x), Scores(scale=1.0))
    cache.end()
    keys, values = cache.layer(0)
    assert keys[0, 1, :, 5].tolist() == [-64.0, 63.5, 1.0, 0.0]
    assert values[0, 0, :, 7].tolist() == [-100.0, 100.0, 1.0, 0.0]
