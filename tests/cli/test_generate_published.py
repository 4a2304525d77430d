"""Chat with tiny models in their published layouts: config, tokenizer file and weights as the releases have them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "transforms"))

from llmkit.architecture import registry
from llmkit.architecture.tokenizers import published_tokenizers

GLM = {"architectures": ["ChatGLMModel"], "model_type": "chatglm"}
QUESTION = "人工智能 the fox"


def settings(name, **extra):
    return {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [f"tokenization.{name}", None]}, **extra}


def write(folder, probe, changes, files):
    """A random model of the family that claims `probe`; its tokenizer's files beside it."""
    import llmkit
    from llmkit.decoder.contract import random_checkpoint

    architecture = registry.find(probe)
    config = {**architecture.tiny, **changes}
    llmkit.save(random_checkpoint(architecture, config), folder)
    (folder / "config.json").write_text(json.dumps(config))
    for name, data in files.items():
        (folder / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return folder


@pytest.fixture(scope="module")
def world():
    import vocab_world

    return vocab_world


def ice(folder, world):
    from sentencepiece import SentencePieceProcessor

    kind = published_tokenizers()["ice-text"]
    data = world.sp_model(
        world.ENGLISH + world.CHINESE, 700, control_symbols=list(kind.reserved),
        user_defined_symbols=["<n>", *kind.appended], pad_id=3, pad_piece="<pad>",
    )  # fmt: skip
    sp = SentencePieceProcessor(model_proto=data)
    ids = {"gmask_token_id": "[gMASK]", "mask_token_id": "[MASK]", "bos_token_id": "<sop>", "eos_token_id": "<eop>"}
    changes = {k: sp.piece_to_id(t) for k, t in ids.items()} | {"vocab_size": sp.get_piece_size(), "pad_token_id": 3}
    files = {"ice_text.model": data, "tokenizer_config.json": settings("ChatGLMTokenizer", num_image_tokens=0)}
    write(folder, GLM, changes, files)
    return [*sp.encode(QUESTION), sp.piece_to_id("[gMASK]"), sp.piece_to_id("<sop>")]


def third(folder, world):
    from sentencepiece import SentencePieceProcessor

    data = world.sp_model(world.ENGLISH + world.CHINESE, 500)
    sp = SentencePieceProcessor(model_proto=data)
    n = sp.get_piece_size()
    changes = {"padded_vocab_size": n + 9, "_name_or_path": "THUDM/chatglm3-6b"}
    files = {"tokenizer.model": data, "tokenizer_config.json": settings("ChatGLMTokenizer")}
    write(folder, GLM | {"padded_vocab_size": 1}, changes, files)
    return [n + 1, n + 3, n + 6, *sp.encode("\n"), *sp.encode(QUESTION), n + 7]


def baichuan(folder, world):
    from sentencepiece import SentencePieceProcessor

    data = world.sp_model(world.ENGLISH + world.CHINESE, 500)
    sp = SentencePieceProcessor(model_proto=data)
    changes = {"vocab_size": sp.get_piece_size(), "z_loss_weight": 0}
    files = {"tokenizer.model": data, "tokenizer_config.json": settings("BaichuanTokenizer", add_bos_token=False)}
    write(folder, {"architectures": ["BaichuanForCausalLM"], "model_max_length": 1}, changes, files)
    return [195, *sp.encode(QUESTION), 196]


def rwkv(folder, world, probe=None):
    lines = "".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)) + "257 'User: ' 6\n258 '\\n\\nAssistant:' 12\n"
    probe = probe or {"architectures": ["RwkvForCausalLM"], "model_type": "rwkv"}
    write(folder, probe, {"vocab_size": 65536}, {"rwkv_vocab_v20230424.txt": lines.encode()})
    return [257, *(b + 1 for b in QUESTION.encode()), 258]


@pytest.mark.parametrize("make", [ice, third, baichuan, rwkv])
def test_chat_in_the_familys_own_format(call, world, tmp_path, make):
    import torch

    from llmkit import open_checkpoint
    from llmkit.decoder import load_decoder

    folder = tmp_path / "model"
    expected = make(folder, world)
    shown = call("generate", folder, QUESTION, "--chat", "--show-prompt", "--json")
    assert shown.code == 0, shown.out
    assert shown.document["tokens"] == expected
    assert shown.err == ""  # no warning: tokenizer and embedding agree
    done = call("generate", folder, QUESTION, "--chat", "--max-tokens", "4", "--json").document
    ids = list(expected)
    for token in done["tokens"]:  # greedy, each step computed anew
        assert int(load_decoder(open_checkpoint(folder))(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)


def test_byte_strings_in_gguf(call, world, tmp_path):
    """The file alone puts a question as the folder does, and answers it so."""
    folder, file = tmp_path / "model", tmp_path / "model.gguf"
    expected = rwkv(folder, world, {"architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7"})
    assert call("convert", folder, "--to", "gguf", "--type", "f32", "-o", file).code == 0
    for option in (["--show-prompt"], ["--max-tokens", "4"]):
        one, other = (call("generate", model, QUESTION, "--chat", "--json", *option) for model in (folder, file))
        assert one.document["tokens"] == other.document["tokens"]
        assert option != ["--show-prompt"] or one.document["tokens"] == expected


def test_a_tokenizer_of_another_release_is_named(call, world, tmp_path):
    folder = tmp_path / "model"
    ice(folder, world)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings("ChatGLMTokenizer", num_image_tokens=20000)))
    done = call("generate", folder, QUESTION, "--chat", "--json")
    assert done.code == 2
    assert "but config.json says gmask_token_id" in done.document["error"]["message"]
    (folder / "ice_text.model").unlink()
    done = call("generate", folder, QUESTION, "--chat", "--json")
    assert done.code == 2
    assert (
        done.document["error"]["message"]
        == "model: its tokenizer is remote code (ChatGLMTokenizer), which is never run"
    )
    assert done.document["error"]["hint"].startswith("copy ice_text.model or tokenizer.model")


def test_a_plugin_shows_its_format_and_its_tokenizers_file(call):
    shown = call("plugins", "show", "chatglm", "--json").document
    assert (shown["prompt"], shown["tokenizer_file"]) == ("chatglm", "ice_text.model")
    text = call("plugins", "show", "baichuan").out
    assert "chat format" in text
    assert "baichuan-chat" in text
    bare = call("plugins", "show", "gpt2", "--json").document
    assert (bare["prompt"], bare["tokenizer_file"]) == (None, None)


def test_stored_as_transformers_architecture_it_needs_no_code(call, world, tmp_path):
    """convert --as glm: AutoTokenizer and AutoModelForCausalLM load the folder, and write the same greedy text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, out = tmp_path / "model", tmp_path / "glm"
    expected = third(folder, world)
    done = call("convert", folder, "--to", "hf", "--as", "glm", "-o", out)
    assert done.code == 0, done.err
    assert "tokenizer.json is made from tokenizer.model" in done.out + done.err
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert tokenizer(QUESTION)["input_ids"] == [*expected[:2], *expected[5:-1]]
    assert (tokenizer.eos_token_id, tokenizer.padding_side) == (2, "left")
    ids = call("generate", out, QUESTION, "--chat", "--show-prompt", "--json").document["tokens"]
    assert ids == expected
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    with torch.inference_mode():
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    ours = call("generate", folder, QUESTION, "--chat", "--max-tokens", "6", "--json").document["tokens"]
    assert theirs[0, len(ids) : len(ids) + len(ours)].tolist() == ours
