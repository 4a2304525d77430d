"""An exported folder on the command line: generate, perplexity, eval, inspect, and what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
BASE = Path(__file__).resolve().parents[2] / "evalsets" / "mini" / "base"


@pytest.fixture(scope="module", params=["link", "copy"])
def exported(request, tiny, tmp_path_factory):
    from llmkit.cli.app import main

    folder = tmp_path_factory.mktemp("onnx") / f"out-{request.param}"
    code = main(
        ["export", str(tiny), "--to", "onnx", "--weights", request.param, "--no-check", "-q", "-o", str(folder)]
    )
    assert code == 0
    assert (folder / "model.safetensors").exists() == (request.param == "link")
    return folder


def test_generate(call, tiny, exported):
    args = ["w5 w6 w7", "--max-tokens", "12", "--json"]
    found = call("generate", exported, *args)
    assert found.code == 0, found.err
    assert found.document["tokens"] == call("generate", tiny, *args).document["tokens"]
    assert found.document["n_tokens"] > 3


def test_perplexity(call, tiny, exported, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 120}" for i in range(300)))
    args = ["--text", text, "--context", "64", "--stride", "32", "--json"]
    found, wanted = call("perplexity", exported, *args), call("perplexity", tiny, *args)
    assert found.document["perplexity"] == pytest.approx(wanted.document["perplexity"], rel=1e-5)
    assert found.document["n_scored"] == wanted.document["n_scored"]


def test_eval_gives_the_scores_of_the_torch_decoder(call, tmp_path):
    assert call("export", BASE, "--to", "onnx", "--no-check", "-o", tmp_path / "out").code == 0
    args = ["--bench", "mini", "--limit", "4", "--log-samples", "--json"]
    found, wanted = call("eval", tmp_path / "out", *args), call("eval", BASE, *args)
    assert found.code == wanted.code == 0, found.err
    assert found.document["model"]["backend"] == "onnx"
    assert found.document["model"]["provider"] == "cpu"
    a, b = found.document["samples"], wanted.document["samples"]
    assert list(a) == list(b)
    pairs = [(x, y) for name in a for x, y in zip(a[name], b[name], strict=True)]
    assert len(pairs) >= 8
    for x, y in pairs:
        found, wanted = ([response[0] for response in sample["responses"]] for sample in (x, y))
        assert found == pytest.approx(wanted, abs=1e-4)
        assert found.index(max(found)) == wanted.index(max(wanted))
        assert [r[1] for r in x["responses"]] == [r[1] for r in y["responses"]]


def test_inspect(call, exported):
    done = call("inspect", exported, "--json")
    graph = done.document["details"]["onnx"]
    assert done.document["layout"] == "onnx"
    assert done.document["architecture"] == "llama"
    assert done.document["problems"] == done.document["oddities"] == []
    assert graph["ops"]["com.microsoft.GroupQueryAttention"] == 2
    assert graph["opset"] == {"ai.onnx": 23, "com.microsoft": 1}
    assert [v["name"] for v in graph["inputs"]][:4] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key",
    ]  # fmt: skip
    assert graph["outputs"][0] == {
        "name": "logits", "dtype": "FLOAT", "shape": ["batch_size", "sequence_length", 130],
    }  # fmt: skip
    lies_in = {w["file"] for w in graph["weights"]}
    assert lies_in == {"model.safetensors" if "link" in exported.name else "model.onnx.data"}
    assert sum(w["nbytes"] for w in graph["weights"]) == done.document["nbytes"] == 4 * done.document["n_parameters"]
    shown = call("inspect", exported).out
    assert "past_key_values.N.key  FLOAT  batch_size × 2 × past_sequence_length × 16  (N = 0..1)" in shown
    assert "fused ops  " in shown
    assert "GroupQueryAttention 2" in shown


@pytest.mark.parametrize("is_hub_cache", [False, True])
def test_the_model_itself_is_not_overwritten(call, tiny, tmp_path, is_hub_cache):
    """Its weights are shared, not read: what is in the folder besides them would be lost all the same."""
    source = tmp_path / "model"
    shutil.copytree(tiny, source)
    if is_hub_cache:  # a snapshot of links, to blobs of other names elsewhere
        blob = tmp_path / "0123abcd"
        (source / "model.safetensors").rename(blob)
        (source / "model.safetensors").symlink_to(blob)
    before = sorted(p.name for p in source.iterdir())
    done = call("export", source, "--to", "onnx", "--no-check", "--overwrite", "-o", source)
    assert done.code == 2
    weights = source / "model.safetensors"
    assert done.err == (
        f"error: {source} holds an input ({weights}), which would be deleted\nhint: write to another folder: -o OUT\n"
    )
    assert sorted(p.name for p in source.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        (["--provider", "cuda"], "this ONNX Runtime has no provider 'cuda'; it has ", "pip install 'llmkit[gpu]'"),
        (["--provider", "cpuu"], "--provider 'cpuu' is unknown; expected cpu, cuda", "did you mean cpu?"),
        (["--provider", "gpu"], "--provider 'gpu' is unknown; expected cpu, cuda", "did you mean cuda?"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 is torch's, and out-", "llmkit export --dtype chooses it"),
        (["--device", "cuda"], "--device cuda is torch's, and out-", "--provider cuda"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_options_that_do_not_fit(call, exported, options, error, hint):
    import onnxruntime

    if "cuda" in options and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    done = call("generate", exported, "w5", *options)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith(f"error: {error}")
    assert hint in done.err.splitlines()[1]


def test_a_model_that_is_no_folder_for_onnx_runtime(call, tiny):
    done = call("generate", tiny, "w5", "--backend", "onnx")
    assert done.code == 2
    assert done.err == (
        "error: tiny is no folder for ONNX Runtime\nhint: llmkit export tiny --to onnx -o OUT makes one\n"
    )
    done = call("generate", tiny, "w5", "--provider", "cpu")
    assert done.code == 2
    assert done.err.startswith("error: --provider is ONNX Runtime's, and tiny is computed by torch\n")


@pytest.fixture
def broken(exported, tmp_path):
    """A copy to damage; nothing of it is linked."""
    return Path(shutil.copytree(exported, tmp_path / "broken"))


@pytest.mark.parametrize("command", [["inspect"], ["generate", "w5"], ["eval", "--bench", "mini", "--limit", "1"]])
def test_damaged_folders(call, broken, command):
    name, *rest = command
    weights = next(broken / n for n in ("model.safetensors", "model.onnx.data") if (broken / n).exists())
    os.truncate(weights, 5000)
    done = call(name, broken, *rest)
    assert done.code == 2
    assert f"{weights} has 5000 bytes, but " in done.err
    weights.unlink()
    done = call(name, broken, *rest)
    assert done.err == (
        f"error: {broken / 'model.onnx'} needs {weights.name}, which is not there\nhint: export the model again\n"
    )
    graph = broken / "model.onnx"
    os.truncate(graph, 3000)
    done = call(name, broken, *rest)
    assert done.code == 2
    assert done.err.startswith(f"error: {graph} is no ONNX model, or is cut short: ")
    done = call(name, graph, *rest)
    assert done.err == (f"error: {graph} is a graph, whose weights lie beside it\nhint: give the folder: {broken}\n")


@pytest.fixture
def text(tmp_path):
    found = tmp_path / "text.txt"
    found.write_text("w5 w6 w7 w8 w9")
    return found


def every_runner(call, folder, text):
    """What the commands that compute say of a folder."""
    yield call("generate", folder, "w5")
    yield call("perplexity", folder, "--text", text)
    yield call("eval", folder, "--bench", "mini", "--limit", "1")


def test_a_graph_that_is_empty(call, broken, text):
    (broken / "model.onnx").write_bytes(b"")
    error = f"error: {broken / 'model.onnx'} is no ONNX model, or is cut short: it has no graph"
    for done in (call("inspect", broken), *every_runner(call, broken, text)):
        assert (done.code, done.out) == (2, "")
        assert done.err == f"{error}\nhint: export the model again\n"
    done = call("verify", broken)
    assert done.code == 1
    assert "model.onnx is 0 bytes long" in done.out


def test_a_folder_without_a_config(call, broken, text):
    (broken / "config.json").unlink()
    for done in every_runner(call, broken, text):
        assert (done.code, done.out) == (2, "")
        assert done.err == (
            f"error: {broken} has no config.json, which says what model it is\n"
            "hint: copy the config.json of the model that it was exported from into it, or export the model again\n"
        )
    assert call("inspect", broken).code == 0
    assert "differs: config.json is missing" in call("verify", broken).out
    (broken / "config.json").write_text("{")
    for done in (call("inspect", broken), *every_runner(call, broken, text)):
        assert done.code == 2
        assert done.err.startswith(f"error: {broken / 'config.json'} is not valid JSON: ")
        assert done.err.splitlines()[1:] == ["hint: copy the file from the model's source again"]


def test_a_graph_of_another_program_that_takes_padding_on_the_right_only(call, broken, text):
    """That of onnxruntime-genai's builder: lengths of rows go to GroupQueryAttention, which then cuts the row's end."""
    import onnx

    (broken / "llmkit.json").unlink()
    (broken / "config.json").unlink()
    graph = onnx.load(broken / "model.onnx", load_external_data=False)
    del graph.metadata_props[:]
    graph.producer_name = "onnxruntime-genai"
    (broken / "model.onnx").write_bytes(graph.SerializeToString())
    for done in every_runner(call, broken, text):
        assert (done.code, done.out) == (2, "")
        assert done.err == (
            f"error: {broken / 'model.onnx'} was written by onnxruntime-genai: its attention takes no padding on the "
            "left, which this runner needs\n"
            "hint: llmkit export MODEL --to onnx -o OUT writes one that runs here and in onnxruntime-genai\n"
        )
    assert call("inspect", broken).code == 0
    done = call("verify", broken)
    assert done.code == 2
    assert done.err == (
        f"error: {broken} has no llmkit.json: it was not written by llmkit\n"
        f"hint: llmkit inspect {broken} checks what a checkpoint says of itself\n"
    )


def test_keys_of_an_unstated_size(call, tiny, tmp_path, text):
    import onnx

    out = tmp_path / "out"
    assert call("export", tiny, "--attention", "attention", "--no-check", "-o", out).code == 0
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    del graph.metadata_props[:]
    for value in graph.graph.input:
        if "past_key_values" in value.name:
            value.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
    (out / "model.onnx").write_bytes(graph.SerializeToString())
    for done in every_runner(call, out, text):
        assert (done.code, done.out) == (2, "")
        assert "this graph has past_key_values.0.key of shape ['batch_size', 2, " in done.err.splitlines()[0]
        assert done.err.splitlines()[1] == "hint: llmkit export MODEL --to onnx writes one that can be run"


def test_export_via_optimum_without_it(call, tiny, tmp_path):
    out = tmp_path / "out"
    try:
        import optimum.exporters.onnx  # noqa: F401
    except ImportError:
        done = call("export", tiny, "--via", "optimum", "-o", out)
        assert done.code == 2
        assert done.err == (
            "error: Optimum's exporter is not installed\n"
            "hint: pip install 'llmkit[cpu,optimum]' in an environment of its own: it needs an older transformers\n"
        )
    done = call("export", tiny, "--via", "optimum", "--attention", "gqa", "-o", out)
    assert done.code == 2
    assert done.err.startswith("error: --attention is not for --via optimum, ")
    done = call("export", tiny, "--via", "olive", "-o", out)
    assert done.code == 2
    assert done.err == "error: --via 'olive' is unknown; expected optimum\nhint: --via optimum\n"
    done = call("export", tiny, "--via", "optimum", "--dry-run", "-o", out, "--json")
    assert done.document["dry_run"] is True
    assert not out.exists()


def test_what_no_plugin_describes_is_pointed_to_optimum(call, model, tmp_path):
    import json

    config = json.loads((model / "config.json").read_text()) | {
        "architectures": ["FooForCausalLM"],
        "model_type": "foo",
    }
    (model / "config.json").write_text(json.dumps(config))
    done = call("export", model, "-o", tmp_path / "out")
    assert done.code == 2
    assert "FooForCausalLM" in done.err.splitlines()[0]
    assert done.err.splitlines()[1].startswith("hint: --via optimum traces the class of transformers")
    assert not (tmp_path / "out").exists()


def test_the_graph_passes_the_checker_and_the_strict_load(exported):
    """onnx's checker may refuse files with several names, which linked weights have; ONNX Runtime does not mind."""
    import onnx
    import onnxruntime

    path = exported / "model.onnx"
    refusal = ""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        refusal = str(error)
    assert not refusal or ("link" in exported.name and "hard link" in refusal)  # newer versions of onnx refuse links
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    session = onnxruntime.InferenceSession(str(path), options)
    assert session.get_outputs()[0].name == "logits"


def test_weights_of_a_dtype_that_graphs_have_not(call, model, tmp_path):
    from safetensors.torch import load_file, save_file

    doubled = {name: tensor.double() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(doubled, model / "model.safetensors", metadata={"format": "pt"})
    done = call("export", model, "--to", "onnx", "-o", tmp_path / "out")
    assert done.code == 2
    assert "model.embed_tokens.weight: the ONNX export has no F64 weights; expected F32, F16 or BF16" in done.err
    assert "llmkit convert MODEL --to hf --dtype float32 -o OUT" in done.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
