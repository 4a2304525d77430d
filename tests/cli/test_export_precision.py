"""`llmkit export --bits`, `--dtype` and `--provider` on the command line."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")


@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("extra", [[], ["--asymmetric", "--embedding-bits", "4", "--group-size", "16"]])
def test_quantized_while_it_is_exported(call, tiny, tmp_path, bits, extra):
    out = tmp_path / "out"
    done = call("export", tiny, "--to", "onnx", "--bits", bits, *extra, "-o", out, "--json")
    assert done.code == 0, done.err
    parity = {d["case"]: d for d in done.document["parity"]}
    assert set(parity) == {"prefill", "cached steps", "left-padded row", "row beside it"}
    assert all(d["largest"] <= 1e-5 for d in parity.values())
    [as_it_runs] = done.document["as_it_runs"]
    assert 1e-5 < as_it_runs["largest"] < 0.2
    # No float copy of the model lies about: what is left of it is written beside the integers.
    assert not (out / "model.safetensors").exists()
    assert not (out / "PARITY_FAILED").exists()
    assert done.document["recipe"][-1]["bits"] == int(bits)
    words = call("generate", out, "w5 w6 w7", "--max-tokens", "8", "--json")
    assert words.document["n_tokens"] > 3


def test_the_table_says_what_was_compared(call, tiny, tmp_path):
    done = call("export", tiny, "--to", "onnx", "--bits", "4", "-o", tmp_path / "out")
    assert done.code == 0
    assert "14 matrices to int4 group 32 asymmetric (64 does not divide: " in done.err
    assert "MatMulNBits computes in int8 activations (accuracy level 4)" in done.err
    assert "prefill, int8 activations" in done.out


def test_a_wrong_scale_fails_the_check(call, tiny, tmp_path, monkeypatch):
    """The integers are compared exactly: int8 activations do not hide an error."""
    from dataclasses import replace

    from llmkit.quantization.methods.rtn import RoundToNearest

    before = RoundToNearest.quantize
    out = tmp_path / "out"

    def writing_only(*args):
        made = before(*args)
        return made if out.exists() else replace(made, scales=made.scales * 1.01)

    monkeypatch.setattr(RoundToNearest, "quantize", writing_only)
    done = call("export", tiny, "--to", "onnx", "--bits", "8", "-o", out)
    assert done.code == 1
    assert "the exported model differs from the torch decoder: " in done.err
    assert (out / "PARITY_FAILED").is_file()


def test_a_quantized_model_keeps_its_integers(call, tiny, tmp_path):
    assert call("quantize", tiny, "--bits", "4", "-o", tmp_path / "q").code == 0
    done = call("export", tmp_path / "q", "--to", "onnx", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert "14 matrices stay on the grid that they are stored on" in done.document["notes"][0]
    assert done.document["nbytes"] < 100_000  # the graph; weights are shared with the source
    assert all(d["largest"] <= 1e-5 for d in done.document["parity"])


def test_dry_run_writes_nothing(call, tiny, tmp_path):
    done = call("export", tiny, "--to", "onnx", "--bits", "4", "-o", tmp_path / "out", "--dry-run", "--json")
    assert done.code == 0
    assert done.document["dtypes"]["U8"] > 0
    assert not (tmp_path / "out").exists()


def test_float16(call, tiny, tmp_path):
    done = call("export", tiny, "--to", "onnx", "--dtype", "float16", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert "the CPU multiplies float16 matrices in float32" in done.document["notes"][0]
    assert all(1e-6 < d["largest"] <= 2e-2 for d in done.document["parity"])
    graph = call("inspect", tmp_path / "out", "--json").document["details"]["onnx"]
    assert {v["dtype"] for v in graph["inputs"] if "past" in v["name"]} == {"FLOAT16"}


def test_bfloat16_on_the_cpu_is_float32(call, tiny, tmp_path):
    done = call("export", tiny, "--to", "onnx", "--dtype", "bfloat16", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert "the CPU has no bfloat16 arithmetic: the graph computes in float32" in done.document["notes"][0]
    assert all(d["largest"] <= 1e-5 for d in done.document["parity"])


def test_bfloat16_for_cuda_is_not_compared_without_it(call, tiny, tmp_path):
    import onnx
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    out = tmp_path / "out"
    options = ["--dtype", "bfloat16", "--provider", "cuda", "--weights", "copy", "--attention", "gqa"]
    done = call("export", tiny, "--to", "onnx", *options, "-o", out)
    assert done.code == 0, done.err
    assert "not compared with the torch decoder: ONNX Runtime has no provider 'cuda' here" in done.err
    onnx.checker.check_model(out / "model.onnx")
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    kinds = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    assert kinds["past_key_values.0.key"] == onnx.TensorProto.BFLOAT16


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["--bits", "5"], "--bits 5: expected 4 or 8", "--bits 4"),
        (["--bits", "4", "--group-size", "24"], "--group-size 24: expected 16, 32, 64, 128, 256", "--group-size 16"),
        (["--bits", "4", "--group-size", "all"], "--group-size 'all': expected a number", "--group-size 64"),
        (["--bits", "8", "--accuracy-level", "3"], "--accuracy-level 3: expected 0", "--accuracy-level 4"),
        (["--embedding-bits", "4"], "--embedding-bits says nothing without --bits", "give --bits"),
        (["--asymmetric"], "tiny has float weights, which nothing rounds", "give --bits"),
        (["--bits", "4", "--keep", "*.qproj"], "'*.qproj' matches no module", "inspect"),
        (["--dtype", "float8"], "--dtype 'float8' is unknown", "float16"),
        (["--provider", "gpu"], "--provider 'gpu' is unknown; expected cpu, cuda", "did you mean cuda?"),
    ],
)
def test_refusals(call, tiny, tmp_path, options, message, hint):
    done = call("export", tiny, "--to", "onnx", *options, "-o", tmp_path / "out")
    assert done.code != 0
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert hint in done.err
    assert not (tmp_path / "out").exists()


def test_damaged_weights_leave_no_folder(call, model, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf
    save_file(tensors, model / "model.safetensors")
    done = call("export", model, "--to", "onnx", "--bits", "4", "-o", tmp_path / "out")
    assert done.code != 0
    assert "model.layers.1.mlp.up_proj.weight: the weights hold NaN or infinities" in done.err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_integers_names_them(call, tiny, tmp_path):
    assert call("export", tiny, "--to", "onnx", "--bits", "4", "--no-check", "-o", tmp_path / "out").code == 0
    manifest = json.loads((tmp_path / "out" / "llmkit.json").read_text())
    assert "model.layers.0.mlp.up_proj.weight_codes" in manifest["tensors"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--bits", "4"],
            "14 × int4 blocks of 32 asymmetric, accuracy level 4; 1 × int8 blocks of 32 asymmetric, rows of a table; "
            "1 × int8 blocks of 32 asymmetric, accuracy level 4",
        ),
        (
            ["--bits", "8", "--asymmetric", "--group-size", "16", "--embedding-bits", "4"],
            "14 × int8 blocks of 16 asymmetric, accuracy level 4; 1 × int4 blocks of 16 asymmetric, rows of a table; "
            "1 × int4 blocks of 16 asymmetric, accuracy level 4",
        ),
    ],
)
def test_inspect_names_the_integers(call, tiny, tmp_path, options, words):
    assert call("export", tiny, "--to", "onnx", *options, "--no-check", "-o", tmp_path / "out").code == 0
    found, wanted = call("inspect", tmp_path / "out", "--json").document, call("inspect", tiny, "--json").document
    assert found["quantization"] == words
    assert found["n_parameters"] == wanted["n_parameters"]
    assert found["problems"] == found["oddities"] == []
    assert found["nbytes"] < wanted["nbytes"] / 2


@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("extra", [[], ["--asymmetric"]])
def test_qdq(call, tiny, tmp_path, bits, extra):
    """DequantizeLinear and MatMul: the ONNX standard's own operators, of which ONNX Runtime makes MatMulNBits."""
    import onnx
    import onnxruntime

    out = tmp_path / "out"
    done = call("export", tiny, "--to", "onnx", "--bits", bits, *extra, "--qdq", "-o", out, "--json")
    assert done.code == 0, done.err
    assert all(d["largest"] <= 1e-5 for d in done.document["parity"])
    assert done.document["as_it_runs"][0]["largest"] > 1e-5
    onnx.checker.check_model(out / "model.onnx")
    ops = call("inspect", out, "--json").document["details"]["onnx"]["ops"]
    assert ops["DequantizeLinear"] == 14
    assert "com.microsoft.MatMulNBits" not in ops
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(out / "model.onnx", options)
    after = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert after.count("MatMulNBits") == 14
    assert "DequantizeLinear" not in after


def test_the_standard_computes_the_same_of_qdq(call, tiny, tmp_path):
    """The onnx package's own reference evaluator restores the matrices that were meant."""
    import numpy as np
    import onnx
    from onnx.reference import ReferenceEvaluator

    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.onnx.export import computed_weights
    from llmkit.onnx.precision import Precision

    out = tmp_path / "out"
    args = ["--bits", "4", "--asymmetric", "--group-size", "16", "--qdq", "--no-check"]
    assert call("export", tiny, "--to", "onnx", *args, "-o", out).code == 0
    wanted = computed_weights(open_checkpoint(tiny), precision=Precision(4, 16, symmetric=False)).tensors
    model = onnx.load(out / "model.onnx")
    parts = {i.name: i for i in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    for node in nodes[:3]:
        value = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
        graph = onnx.helper.make_graph([node], "g", [], [value], [parts[name] for name in node.input])
        [found] = ReferenceEvaluator(onnx.helper.make_model(graph)).run(None, {})
        name = node.input[0].replace("_codes", "")
        assert np.array_equal(found.T, wanted[name].load().numpy())


def test_what_has_no_qdq_form_stays(call, model, tmp_path):
    done = call("export", model, "--to", "onnx", "--bits", "4", "--group-size", "64", "--qdq", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "2 matrices have no QDQ form and stay operators on integers (model.layers.0.mlp.down_proj" in done.err
