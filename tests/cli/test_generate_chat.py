"""`generate` in chat formats, and the prompts that it shows, on a tiny model with a tokenizer of ChatGLM3's kind."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "transforms"))

ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


@pytest.fixture(scope="session")
def chatty(tmp_path_factory):
    """(folder, sentencepiece processor): a random model whose tokenizer has role tokens after its pieces."""
    import torch
    import vocab_world
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chatty") / "chatty"
    data = vocab_world.sp_model(vocab_world.ENGLISH, 420)
    sp = SentencePieceProcessor(model_proto=data)
    config = LlamaConfig(
        vocab_size=sp.get_piece_size() + 9, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer"}))
    return folder, sp


def greedy(folder, ids, n, end):
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False, eos_token_id=end, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def chat_ids(sp, *messages):
    n, line = sp.get_piece_size(), sp.encode("\n")
    ids = [n + 1, n + 3]
    for role, content in messages:
        ids += [n + 5 + ROLES.index(f"<|{role}|>"), *line, *sp.encode(content)]
    return [*ids, n + 7]


def test_show_prompt_is_exact_and_generates_nothing(call, chatty):
    folder, sp = chatty
    expected = chat_ids(sp, ("system", "in short"), ("user", "the fox"))
    args = ["generate", folder, "the fox", "--format", "chatglm3", "--system", "in short", "--show-prompt"]
    done = call(*args, "--json")
    assert done.code == 0, done.err
    assert done.document["tokens"] == expected
    assert done.document["n_prompt_tokens"] == len(expected)
    assert done.document["token_names"][:3] == ["[gMASK]", "sop", "<|system|>"]
    text = f"[gMASK]sop<|system|>{sp.decode(sp.encode(chr(10)) + sp.encode('in short'))}<|user|>"
    assert done.document["text"].startswith(text)
    assert call(*args, "-q").out.split() == [str(i) for i in expected]
    shown = call(*args).out
    assert '"<|assistant|>"' in shown
    assert f"{len(expected)} tokens" in shown


def test_a_conversation_from_a_file(call, chatty, tmp_path):
    folder, sp = chatty
    messages = [("user", "one"), ("assistant", "two"), ("user", "the fox")]
    as_list = [{"role": r, "content": c} for r, c in messages]
    expected = chat_ids(sp, *messages)
    whole, lines, part = tmp_path / "a.json", tmp_path / "b.jsonl", tmp_path / "c.json"
    whole.write_text(json.dumps({"messages": as_list}))
    lines.write_text("\n".join(map(json.dumps, as_list)) + "\n\n")
    part.write_text(json.dumps(as_list[:2]))
    for extra in (["--messages", whole], ["--messages", lines], ["the fox", "--messages", part]):
        done = call("generate", folder, *extra, "--format", "chatglm3", "--show-prompt", "--json")
        assert done.document["tokens"] == expected
    only = tmp_path / "d.json"
    only.write_text(json.dumps(as_list[0]))
    done = call("generate", folder, "--messages", only, "--format", "chatglm3", "--show-prompt", "--json")
    assert done.document["tokens"] == chat_ids(sp, ("user", "one"))


def test_the_answer_is_transformers_and_ends_at_a_role(call, chatty):
    folder, sp = chatty
    n = sp.get_piece_size()
    ids = chat_ids(sp, ("user", "the fox"))
    free = greedy(folder, ids, 24, 2)
    ends = [i for i in free if i in (2, n + 6, n + 8)]
    expected = free[: free.index(ends[0])] if ends else free
    done = call("generate", folder, "the fox", "--format", "chatglm3", "--max-tokens", "24", "--json")
    assert done.document["tokens"] == expected
    assert done.document["text"] == sp.decode([i for i in expected if i < n])


def test_a_stop_text_ends_the_answer_and_is_cut_off(call, chatty, monkeypatch):
    from llmkit.architecture import prompts

    folder, _ = chatty
    plain = call("generate", folder, "the fox", "--format", "belle", "--max-tokens", "12", "--json").document
    assert plain["stopped"] == "length"
    stop = plain["text"][3:5]
    assert stop.strip()
    form = prompts.FORMATS["belle"]
    monkeypatch.setitem(prompts.FORMATS, "belle", replace(form, stops=(stop,)))
    args = ["generate", folder, "the fox", "--format", "belle", "--max-tokens", "12"]
    done = call(*args, "--json").document
    assert done["stopped"] == "stop text"
    assert done["text"] == plain["text"][: plain["text"].index(stop)]
    assert done["tokens"] == plain["tokens"][: len(done["tokens"])]
    assert call(*args).out == done["text"] + "\n"


def test_raw_text_without_a_format_is_warned_of(call, chatty, tiny):
    folder, sp = chatty
    done = call("generate", folder, "the fox", "--chat", "--show-prompt", "-q")
    n = sp.get_piece_size()
    assert done.out.split() == [str(i) for i in (n + 1, n + 3, *sp.encode("the fox"))]
    warned = call("generate", tiny, "w1", "--chat", "--show-prompt").err
    assert "tiny has no chat template" in warned
    assert "--chat-template NAME" in warned


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "line 1 is not valid JSON"),
        ("3", "expected a list of messages, found int"),
        ('[{"role": "user"}]', "message 1: expected a role (system, user, assistant) and a content of text, found"),
        ('[{"role": "bot", "content": "x"}]', "message 1: expected a role"),
        ('[{"role": "assistant", "content": "x"}]', "nothing to answer: the last message of"),
        (
            '[{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]',
            "has a system message, and --system",
        ),
    ],
)
def test_files_that_are_no_conversation(call, tiny, tmp_path, content, message):
    file = tmp_path / "talk.json"
    file.write_text(content)
    args = ["--system", "z"] if "--system" in message else []
    done = call("generate", tiny, "--messages", file, *args, "--json")
    assert done.code == 2
    assert message in done.document["error"]["message"]


def test_other_mistakes(call, tiny, chatty, tmp_path):
    absent = tmp_path / "none.json"
    for args, message, hint in (
        ([tiny], "nothing to answer: no prompt", "--messages FILE"),
        ([tiny, "--messages", absent], f"cannot read {absent}", None),
        ([tiny, "w1", "--format", "vicunna"], "unknown prompt format 'vicunna'", "did you mean vicuna?"),
        (
            [tiny, "w1", "--format", "chatglm3"],
            "the token <|user|>, which this tokenizer has not",
            "--chat-template raw",
        ),
        ([tiny, "w1", "--format", "chatglm2", "--system", "x"], "no place for a system message", "first question"),
        ([tiny, "w1", "--format", "chat-template"], "this checkpoint has no chat template", "--chat-template raw"),
        ([tiny, "w1", "--format", "alpaca", "--system", "x"], "takes one question and no history", "conversations"),
    ):
        done = call("generate", *args, "--json")
        assert done.code == 2, args
        assert message in done.document["error"]["message"]
        assert "\n" not in done.document["error"]["message"]
        assert hint is None or hint in done.document["error"]["hint"]
