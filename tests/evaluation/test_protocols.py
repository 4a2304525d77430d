"""Protocols against what their published scripts compute: prompts token by token, choices and log-probabilities."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from published import CMMLU, CEval, Hendrycks, LlamaPieces, PlainModel, ids_hash, score_subject
from tiny_model import save_tiny_llama
from tiny_tokenizer import WORDS, train_tokenizer

from llmkit.errors import InputError
from tests.evaluation.running import evaluate

SPACED = "Answer: A\nAnswer: B\nAnswer: C\nAnswer: D\n" * 9  # makes ` A` one token
LONG = " and so on, until it is long enough"


def write_mmlu(root, subject, n_dev, n_test):
    rows = {}
    for split, n in (("dev", n_dev), ("test", n_test)):
        (root / split).mkdir(exist_ok=True)
        rows[split] = [
            [f"Which {split} {i}?" + LONG * (i % 3), "apple", f"0.{i}0", "None", " river ", "ABCD"[(i * i + 1) % 4]]
            for i in range(n)
        ]
        with (root / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows[split])
    return rows


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder, max_length=420)
    train_tokenizer(folder, bos=request.param, words=WORDS + SPACED)
    return folder


@pytest.fixture(scope="module")
def space_model(tmp_path_factory):
    """Its tokenizer makes two tokens of ` A`, as ones of SentencePiece do whose pieces lack it."""
    folder = tmp_path_factory.mktemp("space-model")
    save_tiny_llama(folder, max_length=420)
    train_tokenizer(folder)
    return folder


def write_chinese(root, bench, subject, lengths):
    """Rows of dev (5) and of the scored split, whose questions are so many times a text."""
    rows = {}
    for split, some in (("dev", [0, 14, 6, 14, 9]), ({"ceval": "val", "cmmlu": "test"}[bench], lengths)):
        (root / split).mkdir(exist_ok=True)
        rows[split] = [
            [f"题{i}，" + "以下是的" * n, f"答{i}", "None", " 0.50", "river", "ABCD"[(i * i + n) % 4]]
            for i, n in enumerate(some)
        ]
        header = ["id", "question", *"ABCD", "answer"] if bench == "ceval" else ["", "Question", *"ABCD", "Answer"]
        name = f"{subject}_{split}.csv" if bench == "ceval" else f"{subject}.csv"
        with (root / split / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *([i, *row] for i, row in enumerate(rows[split]))])
    return rows


def check(record, bench, subject, expected):
    (result,) = (s for s in record.benches[bench].subjects if s.name == subject)
    for question, (digest, choice, logprobs) in zip(result.questions, expected, strict=True):
        assert question.prompt == digest
        assert question.choice == choice
        assert question.logprobs == pytest.approx(logprobs, abs=1e-4)
    return result


def test_original_mmlu_is_that_of_the_authors_script(model, tmp_path):
    rows = write_mmlu(tmp_path, "high_school_biology", 5, 6)
    record = evaluate(model, "mmlu", data=tmp_path, protocol="original", log_samples=True)
    plain, script = PlainModel(model), Hendrycks()
    kept = Counter()
    expected = []
    for row in rows["test"]:
        expected += score_subject(plain, script, "high_school_biology", rows["dev"], [row], 420)
        kept[script.k] += 1
    assert len(kept) > 1, "some prompts fit with fewer shots only"
    result = check(record, "mmlu", "high_school_biology", expected)
    assert result.acc.value == sum(c == r[5] for (_, c, _), r in zip(expected, rows["test"], strict=True)) / 6
    bench = record.benches["mmlu"]
    assert (bench.protocol, bench.average, bench.shots, bench.n_truncated) == ("original", "micro", 5, 0)
    assert record.settings["protocol"] == "original"
    assert bench.n_fewer_shots == kept.total() - kept[5]
    assert any(f"{bench.n_fewer_shots} of 6 prompts have fewer than 5 shots" in w for w in record.warnings)
    sample = record.samples["mmlu_high_school_biology"][0]
    assert sample["prompt"].startswith("The following are multiple choice questions (with answers) about  high school")
    assert ids_hash(sample["prompt_ids"]) == result.questions[0].prompt
    letters = [ids[0][-1] for ids in bench.letter_ids.values()]
    assert letters == [plain.tokenizer(f"Answer: {x}")["input_ids"][-1] for x in "ABCD"]


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize(
    ("bench", "script", "subject", "label"),
    [("ceval", CEval(), "law", "法学"), ("cmmlu", CMMLU(), "college_mathematics", "大学数学")],
)
def test_official_is_that_of_the_authors_scripts(model, tmp_path, bench, script, subject, label, shots):
    rows = write_chinese(tmp_path, bench, subject, [0, 20, 40, 60, 84 if bench == "ceval" else 92])
    dev, scored = list(rows.values())
    record = evaluate(model, bench, data=tmp_path, protocol="official", shots=shots)
    plain, kept, expected = PlainModel(model), [], []
    for row in scored:
        expected += score_subject(plain, script, label, dev[:shots], [row], 420)
        kept.append(script.k)
    assert len(set(kept)) > 2 if shots else set(kept) <= {0, -1}, "prompts lose shots, each as many as it must"
    result = check(record, bench, subject, expected)
    n_right = sum(choice == row[5] for (_, choice, _), row in zip(expected, scored, strict=True))
    assert result.acc.value == n_right / len(scored)
    assert record.benches[bench].n_fewer_shots == sum(k < shots for k in kept if shots)
    assert (record.benches[bench].average, record.scores) == ("macro", {bench: record.benches[bench].macro.value})


def test_a_letter_of_several_tokens_is_scored_by_their_sum(space_model, tmp_path):
    rows = write_mmlu(tmp_path, "virology", 1, 2)
    plain, script = PlainModel(space_model), Hendrycks()
    (result,) = evaluate(space_model, "mmlu", data=tmp_path, protocol="original", shots=1).benches["mmlu"].subjects
    for row, question in zip(rows["test"], result.questions, strict=True):
        ids = script.prompt_ids(plain.tokenizer, "virology", rows["dev"], row, 420)
        totals = []
        for letter in "ABCD":
            whole = plain.tokenizer(f"{script.text} {letter}")["input_ids"]
            places = range(len(ids), len(whole))
            totals.append(sum(float(plain.next_logprobs(whole[:i])[whole[i]]) for i in places))
        assert len(places) == 2
        assert question.logprobs == pytest.approx(totals, abs=1e-4)
        assert question.mass is None


@pytest.mark.parametrize("protocol", ["continuation", "generative"])
def test_lm_evals_variants_of_mmlu_are_scored_as_with_its_hf_backend(space_model, tmp_path, protocol):
    from dataclasses import replace

    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM

    from llmkit.evaluation.benches import load_bench
    from llmkit.evaluation.csv_data import find_data
    from llmkit.evaluation.tasks import bench_task, quiet_lm_eval, set_shots

    write_mmlu(tmp_path, "virology", 1, 2)
    record = evaluate(space_model, "mmlu", data=tmp_path, protocol=protocol, shots=1, max_length=420)
    (subject,) = record.benches["mmlu"].subjects
    bench = replace(load_bench("mmlu"), definition=f"mmlu/{protocol}/mmlu_{{subject}}.yaml")
    task = bench_task(bench, "virology", find_data(bench, tmp_path).read("virology", shots=1))
    set_shots(task, 1)
    with quiet_lm_eval():
        theirs = lm_evaluate(
            HFLM(pretrained=str(space_model), device="cpu", dtype="float32", max_length=420), {"mmlu_virology": task}
        )
    metric = {"continuation": "acc,none", "generative": "exact_match,get_response"}[protocol]
    assert subject.acc.value == pytest.approx(theirs["results"]["mmlu_virology"][metric])
    tokenizer = PlainModel(space_model).tokenizer
    samples = sorted(theirs["samples"]["mmlu_virology"], key=lambda s: s["doc_id"])
    for question, sample in zip(subject.questions, samples, strict=True):
        text = sample["arguments"][0][0]
        room = {"continuation": 420, "generative": 420 - 256}[protocol]  # lm-eval leaves as many for an answer
        assert question.prompt == ids_hash(tokenizer(text)["input_ids"][-room:])
        if protocol == "continuation":
            assert question.logprobs == pytest.approx([r[0] for r in sample["filtered_resps"]], abs=1e-4)
            assert question.mass is None
        else:
            assert question.logprobs is None
            assert question.is_right == bool(sample["exact_match"])


def test_generated_letters_are_read_as_exact_match_does():
    from llmkit.evaluation.extraction import matched_letter

    def letter(text, target, match):
        return matched_letter(text, target, is_match=bool(match))

    assert letter("b.", "B", 1.0) == "B"
    assert letter("c", "B", 0.0) == "C"
    assert letter("Because", "B", 0.0) == ""
    assert letter("b)x", "B", 0.0) == ""


def test_questions_of_lm_eval_hold_their_prompts_and_letters(model, tmp_path):
    rows = write_mmlu(tmp_path, "virology", 1, 3)
    bench = evaluate(model, "mmlu", data=tmp_path, shots=1).benches["mmlu"]
    assert (bench.protocol, bench.title) == ("lm-eval", "MMLU")
    plain = PlainModel(model)

    def block(row):
        return row[0].strip() + "".join(f"\n{x}. {c}" for x, c in zip("ABCD", row[1:5], strict=True)) + "\nAnswer:"

    head = "The following are multiple choice questions (with answers) about virology.\n\n"
    head += block(rows["dev"][0]) + " " + rows["dev"][0][5] + "\n\n"
    for question, row in zip(bench.subjects[0].questions, rows["test"], strict=True):
        ids = plain.tokenizer(head + block(row))["input_ids"]
        assert question.prompt == ids_hash(ids)
        logprobs = plain.next_logprobs(ids)[[ids[0] for (ids,) in bench.letter_ids.values()]]
        assert question.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)
        assert question.mass == pytest.approx(float(logprobs.exp().sum()), abs=1e-4)


@pytest.fixture(scope="module")
def llama(shared, tmp_path_factory):
    """A tiny model with the vocabulary of LLaMA."""
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder, max_length=2300, n_vocab=32000)
    shutil.copy(shared / "tokenizers" / "llama.model", folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True, "legacy": True}))
    return folder


@pytest.mark.shared
@pytest.mark.parametrize(
    ("bench", "protocol", "script", "subject", "label", "letters", "first"),
    [
        ("mmlu", "original", Hendrycks(), "anatomy", "anatomy", [319, 350, 315, 360], "ffc967832eafabea"),
        ("ceval", "official", CEval(), "law", "法学", [319, 350, 315, 360], "e63823a238d89d8c"),
        (
            "cmmlu",
            "official",
            CMMLU(),
            "college_mathematics",
            "大学数学",
            [29909, 29933, 29907, 29928],
            "19f9d67b98d9c2df",
        ),
    ],
)
def test_llamas_letters_and_prompts_are_those_of_its_sentencepiece_model(
    llama, shared, bench, protocol, script, subject, label, letters, first
):
    """Whole prompts of the published data; MMLU and C-Eval score `▁A`, CMMLU scores `A`."""
    record = evaluate(llama, bench, data=shared / "data", protocol=protocol, subjects=[subject], limit=3)
    plain = PlainModel(llama, LlamaPieces(shared / "tokenizers" / "llama.model"))
    dev, scored = (read_rows(shared / "data", bench, subject, split) for split in ("dev", record_split(record, bench)))
    result = check(record, bench, subject, score_subject(plain, script, label, dev, scored[:3], 2048))
    assert result.questions[0].prompt == first
    assert [ids for ((ids,),) in record.benches[bench].letter_ids.values()] == letters


def record_split(record, bench):
    return record.benches[bench].bench.split


def read_rows(data, bench, subject, split):
    """Question, A to D, answer."""
    name = f"{subject}.csv" if bench == "cmmlu" else f"{subject}_{split}.csv"
    with (data / bench / split / name).open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    return rows if bench == "mmlu" else [row[1:7] for row in rows[1:]]


def test_official_ceval_in_a_chat_format(model, tmp_path, monkeypatch):
    """The tutorial's conversation; the letter is read in the answer."""
    from llmkit.evaluation.scoring import Scorer

    rows = write_chinese(tmp_path, "ceval", "law", [0, 1])
    sent = []

    def generate(self, requests, encoder, eos_ids):
        sent.extend(encoder.decode(r.tokens) for r in requests)
        return ["答案是B。", "不知道"]

    monkeypatch.setattr(Scorer, "generate", generate)
    record = evaluate(
        model, "ceval", data=tmp_path, protocol="official", shots=1, chat_template="llama-2-chat", log_samples=True
    )
    head = "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。"
    block = CEval().block
    first = f"[INST] <<SYS>>\n{head}\n<</SYS>>\n\n{block(rows['dev'][0])} [/INST] {rows['dev'][0][5]} "
    assert sent[0].startswith(first)
    assert sent[0].endswith(f"[INST] {block(rows['val'][0])} [/INST]")
    (result,) = record.benches["ceval"].subjects
    assert [q.choice for q in result.questions] == ["B", ""]
    assert [q.logprobs for q in result.questions] == [None, None]
    assert record.samples["ceval-valid_law"][0]["responses"] == ["答案是B。"]


def test_a_protocol_is_one_module_of_anybodys(tmp_path, monkeypatch):
    """The one that the documentation shows."""
    import re
    from importlib.resources import files

    from registered import install

    from llmkit.evaluation.protocol import protocol_names

    page = (Path(__file__).resolve().parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# spoken\.py\n.*?)```", page, re.DOTALL)
    install(tmp_path, monkeypatch, "llmkit.protocols", "mini.spoken", "spoken:PROTOCOL", code)
    assert protocol_names("mini") == ["lm-eval", "original", "spoken"]
    assert "spoken" not in protocol_names("mmlu")
    mini = files("llmkit_evalsets") / "mini" / "base"
    record = evaluate(str(mini), "mini", protocol="spoken", limit=8, subjects=["star_lore"], log_samples=True)
    (subject,) = record.benches["mini"].subjects
    assert [q.choice for q in subject.questions] == [
        s["responses"][0].strip()[:1] for s in record.samples["mini_star_lore"]
    ]
    assert {q.choice for q in subject.questions} <= set("ABCD"), "the mini model writes letters"
    assert record.benches["mini"].shots == 2


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (
            {"protocol": "orignal"},
            "MMLU has no protocol 'orignal'; it has lm-eval,",
            "did you mean --protocol original?",
        ),
        (
            {"bench": "ceval", "protocol": "original"},
            "C-Eval has no protocol 'original'",
            "is for --bench mini or mmlu",
        ),
        ({"bench": "hellaswag", "protocol": "original"}, "--protocol is for ceval", None),
        ({"protocol": "original", "chat_template": "vicuna"}, "define no chat format", "leave --chat"),
    ],
)
def test_mistakes(tiny_llama, tmp_path, options, message, hint):
    write_mmlu(tmp_path, "virology", 5, 1)
    with pytest.raises(InputError) as caught:
        evaluate(tiny_llama, **{"bench": "mmlu", "data": tmp_path} | options)
    assert message in caught.value.message
    assert hint is None or hint in caught.value.hint
