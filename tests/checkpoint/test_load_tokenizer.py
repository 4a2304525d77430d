"""Which tokenizer a checkpoint gets, from the files that its folder holds."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "transforms"))
import vocab_world as world

from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.errors import InputError
from llmkit.tokenization.file_tokenizer import FileTokenizer

REMOTE = {
    "tokenizer_class": "WonderTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_wonder.WonderTokenizer", None]},
}


@pytest.fixture(scope="module")
def sp_data():
    return world.sp_model(world.ENGLISH, 420)


@pytest.fixture(scope="module")
def sp(sp_data):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=sp_data)


def ckpt(config=None, **files):
    contents = {
        name.replace("__", "."): FileContent(data=data if isinstance(data, bytes) else json.dumps(data).encode())
        for name, data in files.items()
    }
    return Checkpoint("m", {}, config or {}, contents)


def test_a_sentencepiece_model_alone_is_read_by_sentencepiece(sp_data, sp):
    """The folders of 2023: tokenizer.model and no tokenizer.json."""
    for settings in ({"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LLaMATokenizer"}):
        tokenizer = load_tokenizer(ckpt(tokenizer__model=sp_data, tokenizer_config__json=settings))
        assert tokenizer("the fox")["input_ids"] == [1, *sp.encode("the fox")]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert load_tokenizer(ckpt(config, tokenizer__model=sp_data))("a")["input_ids"] == [1, *sp.encode("a")]


def test_tokenizer_json_comes_first_whatever_the_class(sp_data):
    fast = world.fast_of(sp_data).encode()
    for settings in (REMOTE, {"tokenizer_class": "ChatGLMTokenizer"} | {"auto_map": REMOTE["auto_map"]}):
        tokenizer = load_tokenizer(
            ckpt(
                tokenizer__json=fast, tokenizer__model=sp_data, tokenizer_config__json=settings | {"eos_token": "</s>"}
            )
        )
        assert not isinstance(tokenizer, FileTokenizer)
        assert tokenizer.eos_token_id == 2
        assert tokenizer("the fox")["input_ids"] == world.Tokenizer.from_str(fast.decode()).encode("the fox").ids


def test_a_folder_with_remote_code_is_read_and_its_code_is_not_run(tmp_path, sp_data, sp):
    world.model(tmp_path / "m", 500, {
        "tokenizer.model": sp_data,
        "tokenization_chatglm.py": "raise SystemExit('this was run')",
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "ChatGLMTokenizer",
             "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}}),
        "chat_template.jinja": "<|user|>{{ messages[0].content }}",
    })  # fmt: skip
    tokenizer = load_tokenizer(open_checkpoint(tmp_path / "m"))
    n = sp.get_piece_size()
    assert tokenizer("the fox")["input_ids"] == [n + 1, n + 3, *sp.encode("the fox")]
    assert tokenizer.chat_template == "<|user|>{{ messages[0].content }}"
    beside = load_tokenizer(open_checkpoint(tmp_path / "m" / "model.safetensors"))
    assert beside("the fox") == tokenizer("the fox")


def test_the_20b_tokenizer_of_neox_and_rwkv(tmp_path):
    from tokenizers import Tokenizer

    text = world.byte_level(world.ENGLISH, 300, ["<|endoftext|>"])
    found = load_tokenizer(ckpt({"model_type": "rwkv"}, **{"20B_tokenizer__json": text.encode()}))
    assert found("the fox")["input_ids"] == Tokenizer.from_str(text).encode("the fox").ids


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (
            {"tokenizer_config__json": REMOTE},
            "m: its tokenizer is remote code (WonderTokenizer), which is never run",
            "copy tokenizer.json into the model's folder",
        ),
        (
            {"tokenizer_config__json": {"auto_map": {"AutoTokenizer": ["tokens.ChatGLMTokenizer", None]}}},
            "m: its tokenizer is remote code (ChatGLMTokenizer), which is never run",
            "copy ice_text.model or tokenizer.model as it was published with the model into the model's folder",
        ),
        ({"tokenizer_config__json": b"{"}, "m: tokenizer_config.json is not valid JSON", None),
        ({}, "m: no tokenizer files", "copy tokenizer.json"),
        ({"tokenizer__json": b"{}"}, "m: transformers cannot read its tokenizer", "copy tokenizer.json"),
        (
            {"tokenizer_config__json": {"tokenizer_class": "PreTrainedTokenizerFast"}},
            "m: transformers cannot read its tokenizer (ValueError: Co",  # each version has its own words
            "copy tokenizer.json",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read(files, message, hint):
    with pytest.raises(InputError) as caught:
        load_tokenizer(ckpt({"model_type": "wonder"}, **files))
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message
    assert hint is None or caught.value.hint.startswith(hint)


def test_a_truncated_vocabulary_names_its_file():
    with pytest.raises(InputError, match=r"^m: ice_text.model is truncated or no SentencePiece model$"):
        load_tokenizer(ckpt(ice_text__model=io.BytesIO(b"\x0a\xff").getvalue()))
