"""`quantize --recipe`, `--head-bits`, `--target-bits` and `--target-size`, as a user calls them."""

from __future__ import annotations

import json

import gguf
import pytest
from safetensors.torch import load_file

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.pipeline.stage import Stage


def nbytes_of(path):
    return sum(lazy.spec.nbytes for lazy in open_checkpoint(path).tensors.values())


def n_parameters(path):
    return sum(lazy.spec.numel for lazy in open_checkpoint(path).tensors.values())


def test_a_recipe_and_the_head_by_its_bits(call, tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('"*.v_proj": 8\n"*.o_proj": float\n')
    args = ["--recipe", recipe, "--calibration", "none"]
    done = call("quantize", tiny, "--bits", "4", "--head-bits", "8", *args, "-o", tmp_path / "q", "--json")
    assert done.code == 0, done.err
    assert done.document["recipe"][-1]["recipe"] == {"lm_head.weight": {"bits": 8}, "*.v_proj": {"bits": 8},
                                                     "*.o_proj": "float"}  # fmt: skip
    stored = load_file(next((tmp_path / "q").glob("*.safetensors")))
    assert "lm_head.weight_packed" in stored
    assert "model.layers.0.self_attn.o_proj.weight" in stored
    done = call("quantize", tiny, *args, "-o", tmp_path / "only")
    assert done.code == 0, done.err
    assert "2 linear layers to int8" in done.err
    recipe.write_text('"*.v_prj": 8\n')
    done = call("quantize", tiny, "--bits", "4", *args, "-o", tmp_path / "r")
    assert done.code == 2
    assert "'*.v_prj' matches no module and no tensor" in done.err
    done = call("quantize", tiny, "--bits", "4", "--embedding-bits", "8", "--calibration", "none", "-o", tmp_path / "r")
    assert done.code == 2
    assert "is the embedding, which no loader of compressed-tensors takes quantized" in done.err
    assert "--format gguf" in done.err


def test_a_size_counts_the_head_with_the_bits_that_were_named(call, tiny, tmp_path):
    args = ["--target-bits", "9", "--head-bits", "8", "--calibration", "none"]
    done = call("quantize", tiny, *args, "-o", tmp_path / "q", "--json")
    assert done.code == 0, done.err
    found = done.document["allocation"]
    assert found["nbytes"] == nbytes_of(tmp_path / "q")
    assert [c["scheme"] for c in found["choices"] if c["role"] == "lm_head"] == ["8 bits"]


@pytest.mark.parametrize("way", ["text", "none", "gptq"])
def test_bits_for_a_target_are_chosen_and_met(call, tiny, tmp_path, text, way):
    """Also by a method that is named, and has no inputs of the head, which is chosen from as well."""
    floats = nbytes_of(tiny)
    source = ["none"] if way == "none" else [text, "--samples", "4", "--length", "20"]
    source += ["--method", "gptq"] if way == "gptq" else []
    target = 0.55 * floats * 8 / n_parameters(tiny)
    args = ["quantize", tiny, "--target-bits", f"{target:.4f}", "--calibration", *source]
    done = call(*args, "-o", tmp_path / "q", "--json")
    assert done.code == 0, done.err
    found = done.document["allocation"]
    assert found["nbytes"] == nbytes_of(tmp_path / "q") <= 0.55 * floats
    largest = max(c["nbytes"] for c in found["choices"])
    assert found["nbytes"] > 0.55 * floats - largest
    assert len({c["scheme"] for c in found["choices"]}) > 1
    assert json.loads((tmp_path / "q" / "llmkit.json").read_text())["run"]["allocation"] == found
    again = call(*args, "-o", tmp_path / "again", "--json")
    assert again.document["allocation"] == found
    leaves = [name.split(".")[-2] for name in found["errors"]]
    assert {leaf[0] for leaf in leaves} == {"k", "o", "g", "d", "l"}  # q and v go with k, up with gate
    shown = call(*args, "-o", tmp_path / "shown", "--dry-run")
    assert "if smaller" in shown.out
    assert "model.layers.*.self_attn.k_proj, q_proj, v_proj" in shown.out


def test_a_target_size_of_a_gguf_counts_the_whole_file(call, tiny, tmp_path, text):
    out = tmp_path / "q.gguf"
    whole = call("convert", tiny, "--to", "gguf", "-o", tmp_path / "f16.gguf")
    assert whole.code == 0
    size = int(0.8 * (tmp_path / "f16.gguf").stat().st_size)
    args = ["--calibration", text, "--samples", "4", "--length", "20", "--embedding-bits", "8"]
    done = call("quantize", tiny, "--format", "gguf", "--target-size", str(size), *args, "-o", out, "--json")
    assert done.code == 0, done.err
    largest = max(c["nbytes"] for c in done.document["allocation"]["choices"])
    assert size - largest < out.stat().st_size <= size
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert types["token_embd.weight"] == "Q8_0"
    assert len(set(types.values())) > 2
    assert "gave 4 windows" not in " ".join(done.document["notes"])


def test_no_text_is_read_where_nothing_can_be_written(call, tiny, tmp_path, text, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    monkeypatch.setattr(Stage, "run", lambda *_args, **_more: pytest.fail("the text was read"))
    args = ["--target-bits", "5", "--calibration", text, "--length", "20"]
    done = call("quantize", tiny, *args, "-o", tmp_path / "out")
    assert done.code == 2
    assert "already exists" in done.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--target-bits", "4", "--bits", "4"], "--bits and --target-bits are given"),
        ([], "none is given"),
        (["--target-bits", "1"], "does not get as small as 1 bits per weight"),
        (["--target-size", "1TB"], "is not larger than 1 TB as it is"),
        (["--target-size", "much"], "is not a number of bytes"),
        (["--target-bits", "12", "--method", "gptq"], "--method gptq needs second moments"),
        (["--target-bits", "3", "--format", "gptq", "--head-bits", "8"], "does not get as small"),  # 130 rows: no words
    ],
)
def test_targets_that_cannot_be_are_refused(call, tiny, tmp_path, args, words):
    done = call("quantize", tiny, *args, "--calibration", "none", "-o", tmp_path / "q")
    assert done.code == 2
    assert words in done.err
    assert "hint: " in done.err
    assert "chosen for" not in done.err


@pytest.mark.parametrize("method", ["awq", "signround"])
def test_a_method_that_reads_the_text_itself_is_refused_before_anything_is_measured(call, tiny, tmp_path, text, method):
    file = tmp_path / "s.safetensors"
    args = ["--calibration", text, "--samples", "2", "--length", "20"]
    assert call("quantize", "observe", tiny, *args, "-o", file).code == 0
    args = ["--target-bits", "12", "--statistics", file, "--method", method]
    done = call("quantize", tiny, *args, "-o", tmp_path / "q", "--dry-run")
    assert (done.code, "chosen for" in done.err) == (2, False)
    assert f"--method {method} " in done.err
    assert "hint: --calibration FILE instead of --statistics" in done.err


def test_types_of_a_recipe_that_no_row_can_have_are_told(call, tiny, tmp_path):
    """As those of a preset are: blocks of K-quants hold 256 weights."""
    (tmp_path / "r.yaml").write_text("'*.attn_v': q6_k\n'*.attn_q': q8_0\n")
    done = call(
        "convert", tiny, "--to", "gguf", "--type", "q4_k_m", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "o"
    )
    said = [line for line in done.err.splitlines() if "instead of" in line]
    counts = {(line.split()[-1], line.split()[-4]): int(line.split()[0]) for line in said}
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(next((tmp_path / "o").glob("*.gguf"))).tensors}
    n_layers = sum("attn_v" in name for name in types)
    assert {types[name] for name in types if "attn_v" in name} == {"Q8_0"}
    assert counts == {("Q6_K", "Q8_0"): n_layers + sum(t == "Q8_0" for n, t in types.items() if "ffn_down" in n),
                      ("Q4_K", "Q5_0"): sum(t == "Q5_0" for t in types.values())}  # fmt: skip
