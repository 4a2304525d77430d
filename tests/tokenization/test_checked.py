"""Every key of a tokenizer's files with a value of every wrong type: read, or refused with the file's name."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.tokenizer import load_tokenizer, tokenizer_settings
from llmkit.errors import InputError, LlmkitError
from llmkit.tokenization.bundle import TokenizerFiles, read_tokenizer
from llmkit.tokenization.checked import read_tokenizer_json
from llmkit.tokenization.panics import PanicError, without_panic
from llmkit.tokenization.published import choose_kind
from llmkit.tokenization.to_gguf import vocabulary_metadata
from llmkit.tokenization.vocabulary import read_vocabulary
from llmkit.transforms.vocab.info import info

WRONG = (None, "x", "", 1.5, -1, 10**12, True, [], {}, [1], ["x"], {"x": 1}, {"x": {}}, float("inf"), float("nan"))


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value can be put: every key; of long lists and objects, the first two."""
    yield at
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, item in inner if len(inner) < 20 else inner[:2]:
        yield from paths(item, (*at, key))


def mutated(document: Any) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    for n, at in enumerate(paths(document)):
        for value in WRONG[n % 3 :: 3]:  # of every three keys, each value once
            changed = copy.deepcopy(document)
            place = changed
            for key in at[:-1]:
                place = place[key]
            if at:
                place[at[-1]] = value
            yield at, value, changed if at else value


@pytest.fixture(autouse=True)
def nothing_is_compared(monkeypatch):
    """It would take most of the time, and is no matter of types."""
    monkeypatch.setattr("llmkit.tokenization.to_gguf.compare", lambda *args, **more: None)


def use(files: dict[str, bytes]) -> None:
    """What commands do with the files of a tokenizer, short of loading a library's."""
    contents = {n: FileContent(data=d) for n, d in files.items()}
    ckpt = Checkpoint("m", {}, {}, contents)
    for step in (
        lambda: read_vocabulary(ckpt),
        lambda: info(read_tokenizer("m", contents)),
        lambda: vocabulary_metadata("m", contents, {}, 500),
        lambda: (found := TokenizerFiles.of(ckpt)) and found.rewritten({i: i for i in range(found.n_tokens)}),
        lambda: choose_kind(tokenizer_settings(contents, "m"), files),
    ):
        with contextlib.suppress(LlmkitError):
            step()


SETTINGS = {
    "tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": ["a.B", None]}, "model_max_length": 2048,
    "bos_token": {"content": "<s>"}, "eos_token": "</s>", "additional_special_tokens": ["<x>", {"content": "<y>"}],
    "added_tokens_decoder": {"2": {"content": "</s>", "special": True}}, "chat_template": [{"name": "default",
    "template": "x"}], "add_bos_token": True, "num_image_tokens": 0, "padding_side": "left",
}  # fmt: skip


@pytest.fixture(scope="module")
def documents(world):
    data = world.sp_model(world.ENGLISH, 300)
    spaced = json.loads(world.fast_of(data))
    byte_level = json.loads(world.byte_level(world.ENGLISH, 300, ["<s>"]))
    piece, middle = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    byte_level["post_processor"] = {"type": "Sequence", "processors": [
        {"type": "TemplateProcessing", "single": [piece, middle], "pair": [], "special_tokens": special}
    ]}  # fmt: skip
    byte_level["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}, {"type": "ByteLevel"}
    ]}  # fmt: skip
    byte_level["padding"] = {"pad_id": 0}
    return {"tokenizer.model": data, "spaced": spaced, "byte level": byte_level}


@pytest.mark.parametrize("which", ["spaced", "byte level"])
def test_every_key_of_tokenizer_json(documents, which):
    for _, _, changed in mutated(documents[which]):
        use({"tokenizer.json": json.dumps(changed).encode(), "vocab.json": b"{}", "merges.txt": b"#version\xff\n"})


@pytest.mark.parametrize("beside", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json"])
def test_every_key_of_the_smaller_files(documents, name, beside):
    document = SETTINGS if name == "tokenizer_config.json" else {"<x>": 300, "<y>": 301}
    vocabulary = documents[beside] if beside == "tokenizer.model" else json.dumps(documents["spaced"]).encode()
    for _, _, changed in mutated(document):
        use({beside: vocabulary, name: json.dumps(changed).encode()})


@pytest.mark.parametrize("value", ["x", None, 1.5, True, -1, 10**7])
@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "vocab.json"])
def test_an_id_that_is_none_is_named(name, value):
    document = {"a": value} if name != "tokenizer.json" else {"model": {"vocab": {"a": value}}}
    with pytest.raises(InputError, match=rf"m: {name}: the id of token 'a' is .*, expected a whole number below"):
        read_tokenizer_json(name, json.dumps(document).encode(), f"m: {name}")


def test_what_is_no_json_object():
    for data in (b"[1]", b"nonsense", b"\xff", b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"):
        with pytest.raises(InputError, match=r"m: vocab.json(:| is not)"):
            read_tokenizer_json("vocab.json", data, "m: vocab.json")


def test_a_panic_of_the_library_is_an_error_of_the_file(documents, capfd):
    broken = copy.deepcopy(documents["byte level"])
    broken["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    files = {"tokenizer.json": FileContent(data=json.dumps(broken).encode())}
    with pytest.raises(InputError, match="m: transformers cannot read its tokenizer"):
        load_tokenizer(Checkpoint("m", {}, {}, files))
    with pytest.raises(InputError, match="cannot be read by the tokenizers library"):
        read_tokenizer("m", files).encoder()
    assert capfd.readouterr().err == ""  # what Rust says of it


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 9, "stop": 9}}, "out of bounds"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}}, "out of bounds"),
    ],
)
def test_a_step_that_panics_at_any_text_is_an_error_of_the_file(documents, capfd, step, says):
    plain = dict.fromkeys(("padding", "post_processor", "pre_tokenizer"))
    document = documents["byte level"] | plain | step
    files = {"tokenizer.json": FileContent(data=json.dumps(document).encode())}
    with pytest.raises(InputError, match=f"m: transformers cannot read its tokenizer .*{says}"):
        load_tokenizer(Checkpoint("m", {}, {}, files))
    assert capfd.readouterr().err == ""


def test_a_text_that_makes_a_step_panic_leaves_no_report_and_other_messages_in_place(documents, capfd):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$b"}, "behavior": "Isolated", "invert": False}
    document = documents["byte level"] | {"padding": None, "post_processor": None, "pre_tokenizer": split}
    files = {"tokenizer.json": FileContent(data=json.dumps(document).encode())}
    tokenizer = load_tokenizer(Checkpoint("m", {}, {}, files))
    for encode in (tokenizer, tokenizer.encode, read_tokenizer("m", files).encoder()):
        with pytest.raises(PanicError):
            encode("a" * 60)
        assert encode("a b")
    assert capfd.readouterr().err == ""

    def within(others):
        with without_panic():
            os.write(2, b"one\n")
            if others:
                with ThreadPoolExecutor(4) as pool:
                    list(pool.map(within, [0] * 20))

    within(True)
    os.write(2, b"two\n")
    assert capfd.readouterr().err == "one\n" * 21 + "two\n"


def test_truncated_models_and_ranks(documents):
    data = documents["tokenizer.model"]
    for n in range(1, len(data), len(data) // 40):
        use({"tokenizer.model": data[:n]})
    for line in (b"YQ== -5", b"YQ== 99999999999", b"YQ== 1 2", b"YQ== \xd9\xa1"):
        use({"tokenizer.model": b"YQ== 0\n" + line + b"\n"})


_DOUBLED = {"type": "Replace", "pattern": {"String": "h"}, "content": "hh"}


@pytest.mark.parametrize(
    "steps",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [_DOUBLED] * 30}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 10**6}] * 9}},
        {"decoder": {"type": "Sequence", "decoders": [_DOUBLED] * 30}},
        {"padding": {"strategy": {"Fixed": 2**40}, "pad_id": 0}},
        {"padding": {"strategy": "BatchLongest", "pad_id": 0, "pad_to_multiple_of": 2**40}},
    ],
)
def test_a_file_that_makes_gigabytes_of_a_word(documents, tmp_path, steps):
    data = json.dumps(documents["byte level"] | steps).encode()
    files = {"tokenizer.json": FileContent(data=data)}
    with pytest.raises(InputError, match=r"m: tokenizer.json: .* expected at most"):
        load_tokenizer(Checkpoint("m", {}, {}, files))
    with pytest.raises(InputError, match=r"m: tokenizer.json: .* expected at most"):
        read_tokenizer_json("tokenizer.json", data, "m: tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_sparse_file_is_not_read(documents, tmp_path, name):
    files = {"tokenizer.json": FileContent(data=json.dumps(documents["byte level"]).encode())}
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 2**36)
    with pytest.raises(InputError, match="beside the weights has at most"):
        load_tokenizer(Checkpoint("m", {}, {}, files | {name: FileContent(path=tmp_path / name)}))
