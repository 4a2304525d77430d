"""Chat templates with names of their own go wherever the tokenizer goes, as transformers reads them."""

from __future__ import annotations

import family_world as world
import pytest
import transformers

from llmkit.api import save
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.transforms.convert import convert
from llmkit.transforms.delta.transform import apply, make
from llmkit.transforms.lora import merge, open_adapter
from llmkit.transforms.quantize import quantize
from llmkit.transforms.vocab.extend import extend

TEMPLATES = {
    "default": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "rag": "documents: {{ messages[0]['content'] }}",
    "tool_use": "tools: {{ messages[-1]['content'] }} ü",
}


@pytest.fixture
def base(tmp_path):
    """A model whose tokenizer has several templates, as transformers saves them."""
    folder = world.written(tmp_path / "base", "llama", None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "rag.jinja").is_file()
    assert seen(folder) == TEMPLATES
    return open_checkpoint(folder)


def seen(folder):
    return transformers.AutoTokenizer.from_pretrained(folder).chat_template


def adapted(base, folder):
    world.adapter_by_hand(base, folder, world.layers_of(base)[:2])
    return merge(base, [open_adapter(folder)])


def extended(base, folder):
    (words := folder.with_suffix(".txt")).write_text("quokka\nzebrafish\n")
    return extend(base, words)


def through_a_delta(base, folder):
    """The tuned model has the templates, its base has none."""
    world.moved(base, folder)
    for name in ("tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"):
        (base.origin / name).rename(folder / name)
    bare = open_checkpoint(base.origin)
    save(make(bare, open_checkpoint(folder)), folder.with_name("delta"))
    return apply(bare, open_checkpoint(folder.with_name("delta")))


WAYS = {
    "convert": lambda base, _: convert(base, to="bin"),
    "quantize": lambda base, _: quantize(base, bits=8, method="rtn"),
    "delta": through_a_delta,
    "lora": adapted,
    "vocabulary": extended,
    "gguf": lambda base, _: convert(base, to="gguf"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_template_is_there_afterwards(tmp_path, base, way):
    save(WAYS[way](base, tmp_path / "other"), tmp_path / "out")
    if way == "gguf":
        save(convert(open_checkpoint(tmp_path / "out"), to="hf"), tmp_path / "back")
    folder = tmp_path / ("back" if way == "gguf" else "out")
    assert seen(folder) == TEMPLATES
    assert load_tokenizer(open_checkpoint(folder)).chat_template == TEMPLATES
