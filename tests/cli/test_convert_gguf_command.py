"""`llmkit convert --to gguf`, and commands on a GGUF file, as a user calls them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))
import imatrix_world as world


def test_on_the_command_line(call, model, tmp_path):
    out = tmp_path / "out"
    dry = call("convert", model, "--to", "gguf", "--type", "q8_0", "-o", out, "--dry-run", "--json")
    assert dry.code == 0
    assert list(dry.document["weight_files"]) == ["model-Q8_0.gguf"]
    assert not out.exists()
    done = call("convert", model, "--to", "gguf", "--type", "q8_0", "-o", out)
    assert done.code == 0
    assert sorted(p.name for p in out.iterdir()) == ["llmkit.json", "model-Q8_0.gguf"]
    assert (out / "model-Q8_0.gguf").stat().st_size == dry.document["files"]["model-Q8_0.gguf"]
    assert call("verify", out).code == 0
    shown = call("inspect", out, "--json").document
    assert shown["layout"] == "gguf"
    assert shown["quantization"].startswith("Q8_0 × ")
    in_parts = Counter[str]()
    for part in shown["parts"]:
        in_parts.update(part["dtypes"])
    assert in_parts == shown["dtypes"] == {name: entry["nbytes"] for name, entry in shown["details"]["types"].items()}
    assert shown["details"]["metadata"]["general.architecture"] == "llama"
    back = call("convert", out / "model-Q8_0.gguf", "--to", "hf", "-o", tmp_path / "back")
    assert back.code == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_tensor_is_explained_by_the_name_that_inspect_shows(call, model, tmp_path):
    out = tmp_path / "out"
    assert call("convert", model, "--to", "gguf", "-o", out).code == 0
    names = list(call("inspect", out, "--tensors", "--json").document["tensors"])
    shown = {name: call("explain", out, name) for name in ("model.layers.1.self_attn.v_proj.weight", names[0])}
    assert all(done.code == 0 for done in shown.values()), shown
    assert shown["model.layers.1.self_attn.v_proj.weight"].out.startswith("blk.1.attn_v.weight  F16[32, 64]")
    wrong = call("explain", out, "blk.1.attn_w.weight")
    assert (wrong.code, wrong.err.endswith("hint: did you mean blk.1.attn_v.weight?\n")) == (2, True), wrong.err


def test_a_truncated_file_leaves_nothing(call, model, tmp_path):
    call("convert", model, "--to", "gguf", "-o", tmp_path / "out")
    path = tmp_path / "out" / "model-F16.gguf"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert call("verify", tmp_path / "out").code == 1
    done = call("convert", path, "--to", "hf", "-o", tmp_path / "back")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {path} is truncated: ")
    assert done.err.endswith("hint: download or copy the file again\n")
    assert not (tmp_path / "back").exists()


def test_what_llama_cpp_does_not_know_leaves_nothing(call, model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_scaling": {"type": "dynamic", "factor": 2.0}}))
    done = call("convert", model, "--to", "gguf", "-o", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: --to gguf cannot hold this llama model: rope_scaling is 'dynamic', ")
    assert done.err.endswith("hint: --to hf or --to bin holds any\n")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_words_without_a_place_are_warned_of(call, model, tmp_path):
    done = call("convert", model, "--to", "gguf", "-o", tmp_path / "out")
    assert done.code == 0
    assert (
        "warning: model has a tokenizer (WordLevel) that GGUF has no place for: the file gets no vocabulary" in done.err
    )


def test_statistics_belong_to_gguf_and_are_kept_in_the_history(call, model, tmp_path):
    statistics = world.of_binary(tmp_path / "imatrix.dat", {"blk.0.attn_q.weight": np.ones(64, "<f4")})
    done = call("convert", model, "--to", "gguf", "--type", "q4_k_m", "--statistics", statistics, "-o", tmp_path / "a")
    assert done.code == 0
    assert '"statistics": "imatrix.dat"' in (tmp_path / "a" / "llmkit.json").read_text()
    wrong = call("convert", model, "--to", "hf", "--statistics", statistics, "-o", tmp_path / "b")
    assert wrong.code == 2
    assert "--to hf has no option --statistics; it goes with --to gguf" in wrong.err
    gone = call(
        "convert", model, "--to", "gguf", "--type", "q2_k", "--statistics", tmp_path / "no", "-o", tmp_path / "c"
    )
    assert (gone.code, gone.err.splitlines()[0]) == (2, f"error: {tmp_path / 'no'} does not exist: no statistics")


def test_other_commands_take_a_gguf_file(call, model, tmp_path):
    call("convert", model, "--to", "gguf", "--type", "f32", "-o", tmp_path / "out")
    path = tmp_path / "out" / "model-F32.gguf"
    assert call("diff", model, path).code == 0
    small = call("quantize", path, "--bits", "8", "-o", tmp_path / "int8")
    assert small.code == 0
    wanted = call("quantize", model, "--bits", "8", "-o", tmp_path / "int8-of-hf")
    assert wanted.code == 0
    assert call("diff", tmp_path / "int8", tmp_path / "int8-of-hf").code == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):  # its vocabulary has no place in GGUF
        (path.parent / name).write_bytes((model / name).read_bytes())
    words = [call("generate", m, "w1 w2", "--max-tokens", "4", "-q") for m in (model, path)]
    assert words[0].code == words[1].code == 0
    assert words[0].out == words[1].out


@pytest.mark.slow
def test_scores_are_those_of_the_original(call, tmp_path):
    base = Path(__file__).resolve().parents[2] / "evalsets" / "mini" / "base"
    call("convert", base, "--to", "gguf", "--type", "f32", "-o", tmp_path / "out")
    scores = [call("eval", m, "--bench", "mini", "--limit", "4", "-q") for m in (base, tmp_path / "out")]
    assert scores[0].code == scores[1].code == 0
    assert scores[0].out == scores[1].out


def test_quantized_by_the_preset_of_its_bits(call, model, tmp_path):
    """One command reads the text, or takes what was measured before: the same importance, the same bytes."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 97}" for i in range(1500)))
    args = ["--calibration", text, "--samples", "6", "--length", "20"]
    files = []
    for name, given in (("a", args), ("b", ["--statistics", tmp_path / "s.gguf"]), ("c", ["--calibration", "none"])):
        if name == "b":
            assert call("quantize", "observe", model, *args, "-o", tmp_path / "s.gguf").code == 0
        done = call("quantize", model, "--bits", "3", "--format", "gguf", *given, "-o", tmp_path / name)
        assert done.code == 0, done.err
        assert "bits per weight" in done.out
        files.append((tmp_path / name / "model-Q3_K_M.gguf").read_bytes())
    assert files[0] == files[1] != files[2]
    assert '"calibration": "text.txt"' in (tmp_path / "a" / "llmkit.json").read_text()
    wrong = call("quantize", model, "--bits", "3", "--format", "gguf", "--method", "gptq", "-o", tmp_path / "d")
    assert (wrong.code, wrong.err.splitlines()[0]) == (
        2, "error: --method is not for --format gguf, whose presets choose types of blocks by matrix"
    )  # fmt: skip
