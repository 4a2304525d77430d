"""Calibration texts in tokens: conversations as transformers' chat template has them."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmkit.calibration.texts import read_text, token_ids

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def test_conversations_go_through_the_chat_template(tmp_path):
    words = ["[UNK]", "<|system|>", "<|user|>", "<|assistant|>", "short", "why", "so", *(f"w{i}" for i in range(200))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", chat_template=TEMPLATE)
    long = " ".join(words[7:])
    chats = [
        [("system", "short"), ("user", "why"), ("assistant", "so"), ("user", "why so"), ("assistant", long)],
        [("user", "so why")],
    ]
    named = [[{"role": role, "content": content} for role, content in chat] for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in named))
    answered = tokenizer.apply_chat_template(named[0], tokenize=False)
    open_question = tokenizer.apply_chat_template(named[1], tokenize=False, add_generation_prompt=True)
    expected = tokenizer(answered + open_question, add_special_tokens=False)["input_ids"]
    assert token_ids(read_text(tmp_path / "chats.jsonl"), tokenizer) == expected
