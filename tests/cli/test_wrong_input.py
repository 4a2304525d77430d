"""Every command with wrong input: one line and a hint, exit code 2, one JSON document, and nothing is left."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from llmkit.cli.app import app

# The commands with the places of their inputs; {} is the wrong one, M a model, T a text, OUT a new folder.
INPUTS = [
    "inspect {}",
    "verify {}",
    "explain {} some.weight",
    "diff {} M",
    "diff M {}",
    "convert {} --to hf -o OUT",
    "quantize {} --bits 8 -o OUT",
    "quantize M --bits 8 --calibration {} -o OUT",
    "quantize M --bits 8 --statistics {} -o OUT",
    "quantize observe {} -o OUT",
    "export {} -o OUT --no-check",
    "eval {} --bench mini",
    "eval M --bench mini --compare {} --max-drop 0.01",
    "eval M --bench mmlu --data {}",
    "report {}",
    "report {} -o OUT.html",
    "perplexity {} --text T",
    "perplexity M --text {}",
    "generate {} w1",
    "generate M --messages {}",
    "delta apply M {} -o OUT",
    "delta apply {} M -o OUT",
    "delta make M {} -o OUT",
    "delta make {} M -o OUT",
    "delta xor {} {} -o OUT",
    "delta decrypt {} {} -o OUT",
    "lora merge M {} -o OUT",
    "lora merge {} {} -o OUT",
    "lora combine {} {} -o OUT",
    "lora extract M {} --rank 1 -o OUT",
    "lora extract {} M --rank 1 -o OUT",
    "vocab extend M --with {} -o OUT",
    "vocab extend {} --with T -o OUT",
    "vocab trim {} --corpus T -o OUT",
    "vocab trim M --corpus {} -o OUT",
    "vocab info {}",
    "plugins new {}",
    "plugins check llama --model {}",
]  # fmt: skip
UNKNOWN = [
    ("convert M --to hff -o OUT", "--to"),
    ("convert M --to hf --dtype float9 -o OUT", "dtype"),
    ("convert M --to gguf --type q9 -o OUT", "--type"),
    ("convert M --to hf --as nothing -o OUT", "nothing"),
    ("quantize M --bits 16 -o OUT", "bits 16: expected"),
    ("quantize M --bits 8 --group-size many -o OUT", "--group-size"),
    ("quantize M --bits 8 --keep nothing -o OUT", "nothing"),
    ("quantize M --bits 8 --samples 4 -o OUT", "--samples is not for a run without a text"),
    ("quantize M --bits 8 --device tpu -o OUT", "tpu"),
    ("quantize M --bits 8 --device cuda:99 -o OUT", "cuda:99"),
    ("export M --bits 8 --method gptq -o OUT", "--method gptq needs second moments"),
    ("export M --to onx -o OUT", "--to"),
    ("export M --attention fast -o OUT", "--attention"),
    ("export M --provider gpu -o OUT", "--provider"),
    ("export M --weights move -o OUT", "--weights"),
    ("export M --kv-cache-dtype int3 -o OUT", "int3"),
    ("export M --via magic -o OUT", "--via"),
    ("eval M --bench mini --subjects nothing", "nothing"),
    ("eval M --bench mini --subjects ,", "--subjects names none"),
    ("eval M --bench mini --chat-template nothing", "nothing"),
    ("perplexity M --text T --dtype int8", "int8"),
    ("perplexity M --text T --backend fast", "fast"),
    ("generate M w1 --device tpu", "tpu"),
    ("generate M w1 --provider cuda", "--provider"),
    ("generate M w1 --temperature -1", "temperature"),
    ("delta apply M M --profile nothing -o OUT", "nothing"),
    ("vocab extend M --with T --init some -o OUT", "some"),
    ("vocab extend M --with T --as words -o OUT", "words"),
    ("plugins show lama", "lama"),
    ("plugins check lama", "lama"),
    ("convert M --to hf --max-shard-size big -o OUT", "big"),
]


def _refused(call, words, tmp_path):
    done = call(*words)
    assert done.code == 2, done
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 2, done.err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    as_json = call(*words, "--json")
    assert as_json.code == 2
    assert as_json.document["error"] == {
        "kind": as_json.document["error"]["kind"], "message": lines[0][7:], "hint": lines[1][6:]
    }  # fmt: skip
    assert not (tmp_path / "out").exists()
    return lines[0]


@pytest.fixture
def words(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4\n" * 8)

    def fill(line: str, wrong: object = "") -> list[object]:
        known = {"{}": wrong, "M": tiny, "T": text, "OUT": tmp_path / "out"}
        return [known.get(word, word) for word in line.split()]

    return fill


def _missing(folder):
    return folder / "nope"


def _of_something_else(folder):
    (folder / "other").mkdir()
    (folder / "other" / "notes.md").write_text("# notes\n")
    return folder / "other"


def _a_table(folder):
    (folder / "table.json").write_text(json.dumps({"rows": [1, 2]}))
    return folder / "table.json"


WRONG = [
    pytest.param(line, wrong, id=f"{line}-{wrong.__name__[1:]}")
    for line in INPUTS
    for wrong in (_missing, _of_something_else, _a_table)
    # any text can be measured; any two folders are combined byte by byte
    if not ((line.endswith("--text {}") and wrong is _a_table) or ("xor" in line and wrong is _of_something_else))
]


@pytest.mark.parametrize(("line", "wrong"), WRONG)
def test_a_wrong_input(call, words, tmp_path, monkeypatch, line, wrong):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    _refused(call, words(line, wrong(tmp_path)), tmp_path)


@pytest.mark.parametrize(("line", "told"), UNKNOWN)
def test_a_wrong_value(call, words, tmp_path, monkeypatch, line, told):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    assert told in _refused(call, words(line), tmp_path)


def test_every_command_with_an_input_is_tried():
    def leaves(node, path=()):
        for name, each in getattr(node, "commands", {}).items():
            yield from leaves(each, (*path, name)) if hasattr(each, "commands") else [(*path, name)]

    commands = [*leaves(typer.main.get_command(app))]
    tried = {path for path in commands for line in INPUTS if line.startswith(" ".join(path) + " ")}
    free = {("demo",), ("doctor",), ("plugins", "list"), ("plugins", "show")}
    assert set(commands) - free <= tried


@pytest.mark.parametrize(
    "line", ["convert {} --to hf -o OUT", "quantize {} --bits 8 --only *.weight -o OUT", "delta make M {} -o OUT"]
)
def test_heads_that_draft_tokens_are_no_model(call, words, tmp_path, line):
    save_file({"0.0.linear.weight": torch.ones(8, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"base_model_name_or_path": "vicuna-7b", "medusa_num_heads": 1}')
    assert "is an addition to vicuna-7b" in _refused(call, words(line, tmp_path), tmp_path)


def test_a_delta_of_two_models_that_share_no_tensor(call, words, tmp_path):
    save_file({"other.weight": torch.ones(8, 8)}, tmp_path / "model.safetensors")
    told = _refused(call, words("delta make M {} -o OUT", tmp_path / "model.safetensors"), tmp_path)
    assert "has no tensor of tiny: it holds other.weight" in told


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"weight": torch.zeros(8, 2, dtype=torch.int32).view(torch.uint32), "scales": None, "biases": None},
         "is already quantized (int4 group 64, mlx)"),
        ({"B": torch.zeros(1, 8, dtype=torch.int32), "s": None, "workspace": torch.zeros(8, dtype=torch.int32)},
         "is already quantized (int4, marlin)"),
        ({"weight": torch.zeros(8, 8, dtype=torch.int8)}, "is already quantized (an unknown method)"),
    ],
)  # fmt: skip
def test_layouts_of_quantized_weights_that_no_codec_reads(call, words, tmp_path, names, told):
    ones = torch.ones(8, 1).half()
    tensors = {f"layers.0.q_proj.{n}": ones.clone() if t is None else t for n, t in names.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "some", "quantization": {"group_size": 64, "bits": 4}}')
    assert told in _refused(call, words("delta make M {} -o OUT", tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("global_step3/mp_rank_00_model_states.pt", "of DeepSpeed"),
        ("iter_0000010/mp_rank_00/model_optim_rng.pt", "of Megatron"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "(FSDP)"),
    ],
)
def test_the_state_of_a_distributed_training(call, words, tmp_path, file, told):
    (tmp_path / "run" / file).parent.mkdir(parents=True)
    (tmp_path / "run" / file).write_bytes(b"x")
    assert told in _refused(call, words("convert {} --to hf -o OUT", tmp_path / "run"), tmp_path)


def test_a_model_in_the_place_of_an_adapter(call, words, tiny, tmp_path):
    assert f"{tiny.name} is a model, not an adapter" in _refused(call, words("lora merge M M -o OUT"), tmp_path)


def test_a_quantized_model_in_the_place_of_an_adapter(call, words, tiny, tmp_path):
    """The way that the hint names goes."""
    made = call("quantize", tiny, "--bits", "8", "--calibration", "none", "-o", tmp_path / "q")
    assert made.code == 0, made
    assert "not an adapter" in _refused(call, words("lora merge M {} -o OUT", tmp_path / "q"), tmp_path)
    hint = call(*words("lora merge M {} -o OUT --json", tmp_path / "q")).document["error"]["hint"]
    places = {"BASE": tiny, "FLOATS": tmp_path / "floats", "ADAPTER": tmp_path / "adapter"}
    for line in hint.removesuffix(" makes one of it").split(", then "):
        done = call(*(places.get(word, word) for word in line.split()[1:]))
        assert done.code == 0, (line, done)


def test_a_delta_in_the_place_of_an_adapter(call, words, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "tuned")
    weights = load_file(tmp_path / "tuned" / "model.safetensors")
    save_file({n: t * 1.01 for n, t in weights.items()}, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    assert call("delta", "make", tiny, tmp_path / "tuned", "-o", tmp_path / "delta").code == 0
    assert "delta is a delta" in _refused(call, words("lora merge M {} -o OUT", tmp_path / "delta"), tmp_path)
