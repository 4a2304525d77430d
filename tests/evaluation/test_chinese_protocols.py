"""Protocols of C-Eval and CMMLU that generate, against transformers' generate and forward on one prompt at a time."""

from __future__ import annotations

import csv
import hashlib

import pytest
import torch
from published import LETTERS, PlainModel, ids_hash
from tiny_model import save_tiny_llama
from tiny_tokenizer import WORDS, train_tokenizer

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import InputError
from llmkit.evaluation import extraction
from llmkit.evaluation.planning import Selection
from llmkit.evaluation.preview import PreviewEngine
from llmkit.evaluation.protocols.ceval_cot import CevalReasoning
from llmkit.evaluation.protocols.chatglm import TwoStages
from llmkit.evaluation.protocols.chinese_llama_alpaca import FREE, PROMPT, PROMPT_FREE
from llmkit.evaluation.protocols.chinese_llama_alpaca import PROTOCOL as CONSTRAINED
from llmkit.evaluation.protocols.cmmlu_cot import CmmluReasoning
from llmkit.evaluation.runner import make_lm
from tests.evaluation.running import evaluate

N_TEST = 4
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)


def row(split, i):
    answer = LETTERS[(i * i + 1) % 4]
    return {"id": str(i), "question": f"{split}第{i}题____。", "A": "甲", "B": f"0.{i}0", "C": "None", "D": "乙丙",
            "answer": answer, "explanation": f"1. 因为{i}。"}  # fmt: skip


ROWS = {split: [row(split, i) for i in range(n)] for split, n in (("dev", 3), ("val", N_TEST))}


def item(r):
    return r["question"] + "".join(f"\n{x}. {r[x]}" for x in LETTERS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, rows in ROWS.items():
        (root / split).mkdir()
        with (root / split / f"law_{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return root


@pytest.fixture(scope="module")
def cmmlu_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("cmmlu")
    for split, rows in (("dev", ROWS["dev"]), ("test", ROWS["val"])):
        (root / split).mkdir()
        with (root / split / "arts.csv").open("w", newline="", encoding="utf-8") as file:
            header = ["", "Question", *LETTERS, "Answer"]
            csv.writer(file).writerows([header, *([*list(r.values())[:7]] for r in rows)])
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder, max_length=1200)
    train_tokenizer(folder, bos=True, words=WORDS + "所以答案是A。答案是B。选择C，D是正确的。\n" * 3)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    return PlainModel(folder)


@pytest.fixture(scope="module")
def pieces_folder(tmp_path_factory):
    """A model whose letter alone is another token than a letter after other text, as with SentencePiece: `▁A`, `A`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("pieces")
    save_tiny_llama(folder, max_length=1200)
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    made.decoder = decoders.Metaspace()
    text = [*"ABCD", ALPACA, "law", *(f"：{x}\n{x}. {item(r)}{item(r)}" for r in ROWS["val"] for x in LETTERS)]
    text += [
        f"以下是中国关于law考试的单项选择题，请选出其中的正确答案。\n\n{item(r)}\n答案：{x}"
        for r in ROWS["dev"]
        for x in LETTERS
    ]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    made.train_from_iterator([*text, *LETTERS * 99], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def run(protocol, folder, data, *, shots, chat=False, bench="ceval"):
    """The questions of a protocol, and what was logged of each."""
    selection = Selection(bench, data, shots=shots, chat_template=chat)
    (item,) = selection.prepare()
    plan = protocol.plan(item.work)
    result, logged = plan.score(make_lm(open_checkpoint(folder), chat_template=chat), list(plan.documents))
    (subject,) = result.subjects
    return subject.questions, next(iter(logged.values()))


def continued(plain, ids, n, **options):
    """New ids by transformers' generate, greedily unless the options say otherwise."""
    ids = torch.tensor([ids])
    options = {"do_sample": False, "pad_token_id": 2, "eos_token_id": 2, "max_new_tokens": n} | options
    with torch.no_grad():
        return plain.model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def text_of(plain, ids, n, **options):
    return plain.tokenizer.decode(continued(plain, ids, n, **options)[0, len(ids) :], skip_special_tokens=True)


def test_ceval_reasoning_as_a_text(folder, plain, data):
    questions, logged = run(CevalReasoning(max_new=24), folder, data, shots=2)
    lead = "答案：让我们一步一步思考，\n"
    shots = [f"{item(r)}\n{lead}{r['explanation']}\n所以答案是{r['answer']}。\n\n" for r in ROWS["dev"][:2]]
    for r, question, sample in zip(ROWS["val"], questions, logged, strict=True):
        text = f"以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n{''.join(shots)}{item(r)}\n{lead}1."
        ids = plain.tokenizer(text)["input_ids"]
        answer = text_of(plain, ids, 24).split("让我们一步一步思考")[0]
        assert question.prompt == ids_hash(ids)
        assert sample["responses"] == [answer]
        choices = [r[x] for x in LETTERS]
        assert question.choice == extraction.of_ceval_reasoning(f"让我们一步一步思考，\n1.{answer}", choices)
        assert (question.target, question.logprobs) == (r["answer"], None)


def test_ceval_reasoning_in_a_chat_format(folder, plain, data):
    questions, logged = run(CevalReasoning(max_new=8), folder, data, shots=2, chat=True)
    for r, question, sample in zip(ROWS["val"], questions, logged, strict=True):
        text = "<user>以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
        for shot in ROWS["dev"][:2]:
            text += f"{item(shot)}\n答案：<assistant>让我们一步一步思考，\n{shot['explanation']}\n"
            text += f"所以答案是{shot['answer']}。<user>"
        ids = plain.tokenizer(f"{text}{item(r)}\n答案：<assistant>")["input_ids"]
        answer = text_of(plain, ids, 8)
        assert question.prompt == ids_hash(ids)
        assert sample["responses"] == [answer]
        assert question.choice == extraction.of_ceval_chat(answer.strip(), [r[x] for x in LETTERS])


@pytest.mark.parametrize("chat", [False, True])
def test_cmmlu_with_reasoning(folder, plain, cmmlu_data, chat):
    questions, logged = run(CmmluReasoning(max_new=10), folder, cmmlu_data, shots=2, chat=chat, bench="cmmlu")
    for r, question, sample in zip(ROWS["val"], questions, logged, strict=True):
        text = "以下是关于艺术学的单项选择题，请分析并选出正确答案。\n\n"
        text += "".join(f"题目：{item(shot)}\n答案是：{shot['answer']}\n\n" for shot in ROWS["dev"][:2])
        text += f"题目：{item(r)}\n逐步分析并给出答案选项。"
        ids = plain.tokenizer(f"<user>{text}<assistant>" if chat else text)["input_ids"]
        answer = text_of(plain, ids, 10)
        assert question.prompt == ids_hash(ids)
        assert sample["responses"] == [answer]
        assert question.choice == extraction.of_cmmlu_reasoning(answer)


def test_two_stages(folder, plain, data):
    questions, _ = run(TwoStages(max_new=12), folder, data, shots=0)
    letters = [plain.tokenizer.encode(x, add_special_tokens=False)[0] for x in LETTERS]
    for r, question in zip(ROWS["val"], questions, strict=True):
        first = plain.tokenizer(f"[Round 1]\n\n问：{item(r)}\n\n答：")["input_ids"]
        answer = text_of(plain, first, 12)
        asked = f"[Round 1]\n\n问：{item(r)}{answer}\n综上所述，ABCD中正确的选项是：\n\n答："
        logprobs = plain.next_logprobs(plain.tokenizer(asked)["input_ids"])[letters]
        assert question.prompt == ids_hash(first)
        assert question.choice == LETTERS[int(logprobs.argmax())]
        assert question.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)


def alpaca_prompt(r, shots, has_prompt):
    text = "以下是中国关于law考试的单项选择题，请选出其中的正确答案。\n\n" if shots else ""
    text += "".join(f"{item(shot)}\n答案：{shot['answer']}\n\n" for shot in shots)
    if has_prompt:
        return ALPACA.format_map({"instruction": f"{text}{item(r)}\n答案是什么？ "})
    return f"{text}{item(r)}\n答案："


@pytest.mark.parametrize(("protocol", "n_shots"), [(CONSTRAINED, 0), (PROMPT, 1)])
def test_constrained_decoding_over_two_tokens_a_letter(pieces_folder, data, protocol, n_shots):
    """The scores of one step of generate, with the script's generation settings."""
    plain = PlainModel(pieces_folder)
    questions, logged = run(protocol, pieces_folder, data, shots=n_shots)
    alone = [plain.tokenizer.encode(x, add_special_tokens=False)[0] for x in LETTERS]
    after = [plain.tokenizer.encode(f"：{x}")[-1] for x in LETTERS]
    settings = {"temperature": 0.2, "top_k": 0, "top_p": 1.0, "do_sample": True, "repetition_penalty": 1.1}
    assert not set(alone) & set(after)
    for r, question, sample in zip(ROWS["val"], questions, logged, strict=True):
        ids = plain.tokenizer(alpaca_prompt(r, ROWS["dev"][:n_shots], protocol.has_prompt))["input_ids"]
        out = continued(plain, ids, 1, output_scores=True, return_dict_in_generate=True, **settings)
        scores = out.scores[0][0].float()
        values = scores[alone] + scores[after]
        assert question.prompt == ids_hash(ids)
        assert question.choice == LETTERS[int(values.argmax())]
        assert [5 * value for value, _ in sample["responses"]] == pytest.approx(values.tolist(), abs=1e-3)


@pytest.mark.parametrize("protocol", [FREE, PROMPT_FREE])
def test_free_decoding_under_a_repetition_penalty(folder, plain, data, protocol):
    questions, logged = run(protocol, folder, data, shots=1)
    for r, question, sample in zip(ROWS["val"], questions, logged, strict=True):
        ids = plain.tokenizer(alpaca_prompt(r, ROWS["dev"][:1], protocol.has_prompt))["input_ids"]
        answer = text_of(plain, ids, 20, repetition_penalty=1.1)
        assert question.prompt == ids_hash(ids)
        assert sample["responses"] == [answer]
        assert question.choice == extraction.of_alpaca(answer, [r[x] for x in LETTERS])


def test_what_two_stages_have_no_place_for(folder, data):
    with pytest.raises(InputError, match="--protocol chatglm: its authors define no chat format"):
        evaluate(folder, "ceval", data=data, protocol="chatglm", chat_template=True)
    with pytest.raises(InputError, match="--protocol chatglm has no shots, found 2"):
        evaluate(folder, "ceval", data=data, protocol="chatglm", shots=2)


# sha256 over the prompts of a subject (each ended by \0), 5-shot, as the scripts' own functions write them
PUBLISHED = {
    ("ceval", "official-cot", "law"): "0ce28cf9dd2c377ecc94b8d3f10615d4bb76e6c3d25f20b8ce81797795328e46",
    (
        "ceval",
        "official-cot",
        "high_school_physics",
    ): "4daa116fdbdf0a71292827ee5ea137ec42e6aa7756efd86c3b4ccb9f5e864ffe",
    ("ceval", "chinese-llama-alpaca", "law"): "87f26c541376a7151ca45a2a8fb7d364599a3bc57b36fe72e94a673bf63f20b4",
    (
        "ceval",
        "chinese-llama-alpaca-prompt",
        "marxism",
    ): "4beee8ecd55ee5028d519295a8730f45fd38e3a4a9b9e9b701a1e8e75eeab381",
    ("cmmlu", "official-cot", "logical"): "ace60ce7ee037c6b39c3090796be7413ee15fd9464a8979c32104f10bac9b5e5",
    (
        "cmmlu",
        "official-cot",
        "college_mathematics",
    ): "7ce4ebe07ea9afe69ff13584a40d739ed3eadaa61032b32fdc769ba71ea3d414",
}


@pytest.mark.shared
def test_prompts_of_the_shared_subjects_are_those_of_the_scripts(shared, folder):
    for (bench, name, subject), wanted in PUBLISHED.items():
        (item,) = Selection(bench, shared / "data", protocol=name, shots=5, subjects=[subject]).prepare()
        plan = item.protocol.plan(item.work)
        lm = make_lm(open_checkpoint(folder), PreviewEngine(), max_length=1 << 20)
        logged = next(iter(plan.score(lm, [subject])[1].values()))
        digest = hashlib.sha256(b"".join(sample["prompt"].encode() + b"\0" for sample in logged))
        assert digest.hexdigest() == wanted, (bench, name, subject)
