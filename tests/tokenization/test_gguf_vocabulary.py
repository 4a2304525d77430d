"""Vocabularies to GGUF metadata and back: the same ids, held to sentencepiece, tokenizers and transformers."""

from __future__ import annotations

import inspect
import json

import pytest

from llmkit.architecture.tokenizers import published_tokenizers
from llmkit.checkpoint.file_content import FileContent
from llmkit.errors import InputError
from llmkit.tokenization.from_gguf import tokenizer_files
from llmkit.tokenization.pretokenizers import NAMES, name_of, pre_tokenizer_of
from llmkit.tokenization.sentencepiece_model import SentencePieceModel
from llmkit.tokenization.to_gguf import vocabulary_metadata

TEXTS = [
    "the quick brown fox", " two  spaces ", "in 1970 it was 12345", "工人在工厂里工作", "café ñ 🙂", "a\n\nb\tc", "",
    "def add(x, y): return x+y", "don't I'LL they've",
]  # fmt: skip
KEY = "tokenizer.ggml."
BAD_TEMPLATE = {"chat_template.jinja": FileContent(data=b"\xff")}


def content(files):
    return {n: FileContent(data=d.encode() if isinstance(d, str) else d) for n, d in files.items()}


def metadata_of(files, n_rows, config=None, **more):
    return vocabulary_metadata("tiny", content(files), config or {}, n_rows, **more)


def fast_tokenizer(files):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(files["tokenizer.json"].read().decode())


def test_sentencepiece_pieces_are_written_as_sentencepiece_has_them(world):
    from sentencepiece import SentencePieceProcessor

    data = world.sp_model(world.ENGLISH, 400)
    metadata, warnings = metadata_of({"tokenizer.model": data}, 450, {"bos_token_id": 1, "eos_token_id": [2, 7]})
    sp = SentencePieceProcessor(model_proto=data)
    n = sp.vocab_size()
    assert warnings == []
    assert metadata[f"{KEY}model"] == "llama"
    assert metadata[f"{KEY}pre"] == "default"
    assert metadata[f"{KEY}tokens"] == [sp.id_to_piece(i) for i in range(n)] + [f"[PAD{i}]" for i in range(n, 450)]
    assert metadata[f"{KEY}scores"] == [sp.get_score(i) for i in range(n)] + [-10000.0] * (450 - n)
    kinds = [
        2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 5 if sp.is_unused(i) else 1
        for i in range(n)
    ]
    assert metadata[f"{KEY}token_type"] == kinds + [5] * (450 - n)
    ids = {k: metadata[f"{KEY}{k}_token_id"] for k in ("bos", "eos", "eot")}
    assert ids == {"bos": 1, "eos": 2, "eot": 7}


def test_added_tokens_of_sentencepiece(world):
    data = world.sp_model(world.ENGLISH, 400)
    n = len(SentencePieceModel.parse(data, "test").pieces)
    config = {"added_tokens_decoder": {str(n): {"content": "<role>", "special": True},
                                       str(n + 1): {"content": "<|im_end|>", "special": False},
                                       str(n + 2): {"content": "▁▁x", "special": False},
                                       str(n + 50): {"content": "<gone>", "special": True}}}  # fmt: skip
    files = {"tokenizer.model": data, "tokenizer_config.json": json.dumps(config),
             "added_tokens.json": json.dumps({"<plain>": n + 3})}  # fmt: skip
    metadata, warnings = metadata_of(files, n + 5)
    tail = slice(n, n + 5)
    assert metadata[f"{KEY}tokens"][tail] == ["<role>", "<|im_end|>", "  x", "<plain>", f"[PAD{n + 4}]"]
    assert metadata[f"{KEY}token_type"][tail] == [3, 3, 4, 4, 5]
    assert metadata[f"{KEY}scores"][tail] == [-1000.0] * 4 + [-10000.0]
    assert warnings == ["1 tokens have no row in the embedding and are left out of the vocabulary"]


@pytest.mark.parametrize("lines", ["ENGLISH", "CHINESE"])
@pytest.mark.parametrize("prefix", [True, False], ids=["dummy prefix", "none"])
def test_sentencepiece_there_and_back(world, lines, prefix):
    data = world.sp_model(getattr(world, lines), 420, add_dummy_prefix=prefix)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    metadata, _ = metadata_of({"tokenizer.model": data, "tokenizer_config.json": json.dumps(config)}, 440)
    assert metadata.get(f"{KEY}add_space_prefix", True) is prefix
    files = tokenizer_files(metadata, {})
    before = SentencePieceModel.parse(data, "test").encoder()
    after = SentencePieceModel.parse(files["tokenizer.model"].read(), "test").encoder()
    fast = fast_tokenizer(files)
    for text in TEXTS:
        assert after(text) == before(text), text
        assert fast.encode(text).ids == [1, *before(text)], text
        if "▁" in metadata[f"{KEY}tokens"]:  # else a space is three bytes, which no decoder makes a space again
            assert fast.decode(fast.encode(text).ids) == text


def test_sentencepiece_from_tokenizer_json_alone(world):
    """Scores follow from the merges, so that llama.cpp's reading of them (the largest first) gives the same ids."""
    data = world.sp_model(world.ENGLISH, 400)
    fast = world.fast_of(data)
    metadata, warnings = metadata_of({"tokenizer.json": fast}, 400)
    assert (warnings, metadata[f"{KEY}model"], metadata[f"{KEY}add_space_prefix"]) == ([], "llama", True)
    assert metadata[f"{KEY}token_type"][:3] == [2, 3, 3]
    files = tokenizer_files(metadata | {f"{KEY}unknown_token_id": 0}, {})
    rebuilt = SentencePieceModel.parse(files["tokenizer.model"].read(), "test").encoder()
    from tokenizers import Tokenizer

    reference = Tokenizer.from_str(fast)
    for text in TEXTS:
        assert rebuilt(text) == reference.encode(text, add_special_tokens=False).ids, text


def test_pieces_with_merges(world):
    """As llama.cpp's converter has Gemma 4's: the merges of tokenizer.json, and no scores that say anything."""
    from tokenizers import Tokenizer

    fast = world.fast_of(world.sp_model(world.ENGLISH, 400, add_dummy_prefix=False))
    metadata, _ = metadata_of({"tokenizer.json": fast}, 400)
    merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(fast)["model"]["merges"]]
    metadata |= {f"{KEY}model": "gemma4", f"{KEY}merges": merges, f"{KEY}scores": [-1000.0] * 400}
    files = tokenizer_files(metadata | {f"{KEY}unknown_token_id": 0, f"{KEY}add_bos_token": False}, {})
    made, reference = fast_tokenizer(files), Tokenizer.from_str(fast)
    pieces = SentencePieceModel.parse(files["tokenizer.model"].read(), "test").encoder()
    for text in TEXTS:
        want = reference.encode(text, add_special_tokens=False).ids
        assert made.encode(text).ids == pieces(text) == want, text
        assert made.decode(want) == reference.decode(want)


def test_byte_level_there_and_back(world):
    from tokenizers import Tokenizer

    document = json.loads(world.byte_level(world.ENGLISH + world.CHINESE, 600, ["<|end|>", "<pad>"]))
    n = len(document["model"]["vocab"])
    document["added_tokens"].append(
        {"id": n, "content": "[WORD]", "special": False, "normalized": False, "single_word": False,
         "lstrip": False, "rstrip": False}
    )  # fmt: skip
    document["pre_tokenizer"] = pre_tokenizer_of("qwen2")
    reference = Tokenizer.from_str(json.dumps(document))
    config = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<pad>", "chat_template": "{{ x }}"}
    files = {"tokenizer.json": json.dumps(document), "tokenizer_config.json": json.dumps(config)}
    metadata, warnings = metadata_of(files, n + 10)
    assert warnings == []
    assert metadata[f"{KEY}pre"] == "qwen2"
    assert metadata[f"{KEY}tokens"][n : n + 2] == ["[WORD]", f"[PAD{n + 1}]"]
    assert [metadata[f"{KEY}token_type"][i] for i in (0, 1, 2, n, n + 1)] == [3, 3, 1, 4, 5]
    assert metadata[f"{KEY}merges"] == [" ".join(m) for m in document["model"]["merges"]]
    assert f"{KEY}scores" not in metadata
    assert metadata["tokenizer.chat_template"] == "{{ x }}"
    assert metadata[f"{KEY}add_bos_token"] is False
    back = tokenizer_files(metadata, {})
    found = fast_tokenizer(back)
    for text in [*TEXTS, "a<|end|>b [WORD] c"]:
        assert found.encode(text).ids == reference.encode(text).ids, text
        assert found.decode(found.encode(text).ids) == text.replace("<|end|>", "")
    stated = json.loads(back["tokenizer_config.json"].read())
    assert {k: stated[k] for k in config} == config


def test_bos_around_a_text_is_taken_from_the_post_processor(world):
    document = json.loads(world.byte_level(world.ENGLISH, 400, ["<s>"]))
    piece = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    document["post_processor"] = {
        "type": "TemplateProcessing", "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }  # fmt: skip
    files = {"tokenizer.json": json.dumps(document), "tokenizer_config.json": '{"bos_token": "<s>"}'}
    metadata, _ = metadata_of(files, 400)
    assert metadata[f"{KEY}add_bos_token"] is True
    assert metadata[f"{KEY}add_eos_token"] is False
    assert fast_tokenizer(tokenizer_files(metadata, {})).encode("the").ids[0] == 0


def test_specials_of_a_published_tokenizer_follow_its_pieces(world):
    data = world.sp_model(world.ENGLISH, 400)
    n = len(SentencePieceModel.parse(data, "test").pieces)
    kind = published_tokenizers()["glm-sentencepiece"]
    metadata, _ = metadata_of({"tokenizer.model": data}, n + 20, kind=kind, pre="chatglm-spm")
    assert metadata[f"{KEY}pre"] == "chatglm-spm"
    assert metadata[f"{KEY}tokens"][n : n + 9] == list(kind.specials)
    assert metadata[f"{KEY}token_type"][n : n + 9] == [3] * 9
    assert metadata[f"{KEY}add_bos_token"] is False


def test_ranks_of_a_tiktoken_file(world):
    """Merges are made of the ranks: the byte-level tokenizer of both gives the ids that tiktoken's algorithm gives."""
    from tokenizers import Tokenizer

    from llmkit.tokenization.byte_level import to_bytes
    from llmkit.tokenization.tiktoken_ranks import serialize_ranks

    document = json.loads(world.byte_level(world.ENGLISH + world.CHINESE, 500))
    document["pre_tokenizer"] = pre_tokenizer_of("llama-bpe")
    ranks = dict(sorted(((to_bytes(t), i) for t, i in document["model"]["vocab"].items()), key=lambda x: x[1]))
    kind = published_tokenizers()["glm-tiktoken"]
    files = {
        "tokenizer.model": serialize_ranks(ranks),
        "tokenizer_config.json": '{"tokenizer_class": "ChatGLM4Tokenizer"}',
    }
    own = published_tokenizers()["glm-sentencepiece"]  # of the architecture; the class says that it is another
    metadata, warnings = metadata_of(files, len(ranks) + 20, kind=own)
    assert warnings == []
    assert metadata[f"{KEY}model"] == "gpt2"
    assert metadata[f"{KEY}merges"] == [" ".join(m) for m in document["model"]["merges"]]
    assert metadata[f"{KEY}tokens"][len(ranks) : len(ranks) + len(kind.specials)] == list(kind.specials)
    assert metadata[f"{KEY}eos_token_id"] == len(ranks)
    reference, found = Tokenizer.from_str(json.dumps(document)), fast_tokenizer(tokenizer_files(metadata, {}))
    for text in TEXTS:
        assert found.encode(text).ids == reference.encode(text).ids, text


def test_what_has_no_place_is_warned_of(world):
    unigram = world.sp_model(world.ENGLISH, 120, model_type="unigram", byte_fallback=False)
    _, warnings = metadata_of({"tokenizer.model": unigram}, 120)
    assert warnings == ["the SentencePiece model is of type unigram, which llama.cpp reads as BPE: its ids will differ"]
    document = json.loads(world.byte_level(world.ENGLISH, 400))
    odd = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [odd, pre_tokenizer_of("gpt-2")]}
    metadata, warnings = metadata_of({"tokenizer.json": json.dumps(document)}, 400)
    assert metadata[f"{KEY}pre"] == "default"
    assert warnings[0].startswith("llama.cpp has no name for how the tokenizer cuts text into words")
    metadata, warnings = metadata_of({}, 10)
    assert (metadata, len(warnings)) == ({}, 1)
    assert "has no tokenizer: the file gets no vocabulary, and llama.cpp will not load it" in warnings[0]


@pytest.mark.parametrize("name", NAMES)
def test_pre_tokenizers_keep_their_names_and_build(name):
    from tokenizers import Tokenizer

    steps = pre_tokenizer_of(name)
    assert name_of(steps, hint=name) == name
    parts = dict.fromkeys(("normalizer", "post_processor", "decoder"))
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    document = {"version": "1.0", "added_tokens": [], **parts, "pre_tokenizer": steps, "model": model}
    tokenizer = Tokenizer.from_str(json.dumps(document))
    words = tokenizer.pre_tokenizer.pre_tokenize_str("Don't 12345 café!\n\n x")
    assert "".join(text for text, _ in words).replace("Ġ", " ").count(" ") == 3


def test_patterns_are_those_of_transformers():
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    def pattern(name):
        return pre_tokenizer_of(name)["pretokenizers"][0]["pattern"]["Regex"]

    assert pattern("qwen2") == PRETOKENIZE_REGEX
    by_three = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    assert pattern("llama-bpe") == pattern("glm4") == by_three


@pytest.mark.shared
def test_the_tokenizer_of_llama(shared):
    from sentencepiece import SentencePieceProcessor

    data = (shared / "tokenizers" / "llama.model").read_bytes()
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": False}
    metadata, warnings = metadata_of({"tokenizer.model": data, "tokenizer_config.json": json.dumps(config)}, 32000)
    assert warnings == []
    sp = SentencePieceProcessor(model_proto=data)
    files = tokenizer_files(metadata, {})
    rebuilt = SentencePieceProcessor(model_proto=files["tokenizer.model"].read())
    fast = fast_tokenizer(files)
    for text in TEXTS:
        assert rebuilt.encode(text) == fast.encode(text).ids == sp.encode(text), text


def test_a_template_file_that_is_no_text_is_refused(world):
    fast = world.fast_of(world.sp_model(world.ENGLISH, 400))
    with pytest.raises(InputError, match=r"chat_template\.jinja is not UTF-8"):
        vocabulary_metadata("tiny", content({"tokenizer.json": fast}) | BAD_TEMPLATE, {}, 400)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"added_tokens_decoder": {"0": {"content": "<a>", "lstrip": True}}},
            "GGUF cannot say that <a> take the spaces",
        ),
        ({"additional_special_tokens": ["<new>"]}, "name special tokens without an id, <new>"),
        ({"extra_special_tokens": {"image": "<new>"}}, "name special tokens without an id, <new>"),
        ({"pad_token": {"__type": "AddedToken", "content": "<new>"}}, "name special tokens without an id, <new>"),
        ({"add_bos_token": True}, "has add_bos_token true, and tokenizer.json puts no bos around a text"),
        ({"add_prefix_space": True}, "has add_prefix_space true, which tokenizer.json has not"),
        ({"fix_mistral_regex": True}, "has fix_mistral_regex true, by which transformers may cut text"),
    ],
)
def test_settings_by_which_transformers_cuts_otherwise_are_told(world, tmp_path, config, told):
    import transformers

    document = json.loads(world.byte_level(world.ENGLISH, 400, ["<a>"]))
    document["pre_tokenizer"] = pre_tokenizer_of("gpt-2")
    stated = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<a>", "eos_token": "<a>", "unk_token": "<a>"}
    if "fix_mistral_regex" in config:  # of large vocabularies alone, in folders of these models
        (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
        document["pre_tokenizer"] = pre_tokenizer_of("qwen2")
        vocab = document["model"]["vocab"]
        vocab |= {f"fill{i}": i for i in range(len(vocab), 100_010)}
    files = {"tokenizer.json": json.dumps(document), "tokenizer_config.json": json.dumps(stated | config)}
    metadata, warnings = metadata_of(files, len(document["model"]["vocab"]) + 10)
    assert len(warnings) == 1
    assert told in warnings[0]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    exact = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = fast_tokenizer(tokenizer_files(metadata, {}))
    texts = ("the", "the <a> fox", "a <new> b", "a'the")
    does_differ = any(exact(text).input_ids != found.encode(text).ids for text in texts)
    assert does_differ or ("fix_mistral_regex" in config and transformers.__version__.startswith("4."))  # reads no key


def test_a_template_in_a_file_of_its_own_comes_first(world):
    files = {
        "tokenizer.json": world.byte_level(world.ENGLISH, 400),
        "tokenizer_config.json": '{"chat_template": "old"}', "chat_template.jinja": "new",
    }  # fmt: skip
    assert metadata_of(files, 400)[0]["tokenizer.chat_template"] == "new"
