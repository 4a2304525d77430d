"""C-Eval's submission.json: complete, or refused with the subject and the count."""

from __future__ import annotations

import json

import pytest

from llmkit.errors import InputError, OutputError
from llmkit.evaluation.benches import load_bench
from llmkit.evaluation.record import BenchResult, Question, SubjectResult
from llmkit.evaluation.shards import Shard
from llmkit.evaluation.statistics import Mean
from llmkit.evaluation.submission import Submission, check_submission, check_submittable, write_submission
from tests.evaluation.running import evaluate

BENCH = load_bench("ceval").of_split("test")
IDS = {subject: [str(i) for i in range(3)] for subject in BENCH.by_name}
ANSWERS = {subject: dict.fromkeys(ids, "A") for subject, ids in IDS.items()}


def changed(subject, **answers):
    return ANSWERS | {subject: {k.strip("_"): v for k, v in answers.items()}}


def test_the_file_is_what_the_leaderboard_takes(tmp_path):
    path = tmp_path / "submission.json"
    backwards = {s: {i: "BCA"[int(i)] for i in reversed(ids)} for s, ids in reversed(IDS.items())}
    write_submission(BENCH, backwards, IDS, path)
    body = json.loads(path.read_text(encoding="utf-8"))
    assert body == {s: {"0": "B", "1": "C", "2": "A"} for s in BENCH.by_name}
    assert len(body) == 52
    assert list(body["law"]) == ["0", "1", "2"]
    write_submission(BENCH, ANSWERS, IDS, path)  # an earlier one is replaced
    assert json.loads(path.read_text(encoding="utf-8")) == ANSWERS


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({k: v for k, v in ANSWERS.items() if k != "law"}, "52 subjects of C-Eval; 1 are missing: law"),
        (
            changed("law", _0="A", _2="B"),
            "C-Eval law: 2 of 3 questions have an answer from A to D; question 1 has nothing",
        ),
        (changed("law", _0="A", _1="", _2=""), "law: 1 of 3 questions have an answer from A to D; question 1 has ''"),
        (changed("law", _0="A", _1="b", _2="C"), "law: 2 of 3 questions .*question 1 has 'b'"),
        (changed("law", _0="A", _1="B", _2="C", _3="D"), "law: no question has the id 3; there are 3"),
        (ANSWERS | {"alchemy": {}}, "C-Eval has no subject alchemy"),
        ({"law": "ABC"}, "an object of objects"),
        ([], "an object of objects"),
    ],
)
def test_an_incomplete_one_is_refused(tmp_path, answers, message):
    with pytest.raises(InputError, match=message):
        check_submission(BENCH, answers, IDS)


def test_an_answer_that_could_not_be_read_is_drawn(tmp_path):
    subjects = [
        SubjectResult(s, Mean(0.0, None, 3), tuple(Question(str(i), "" if i else "D", "") for i in range(3)))
        for s in BENCH.subjects
    ]
    result = BenchResult(BENCH, tuple(subjects), (), 0, 0, "", "", 0.0, {})
    submission = Submission(BENCH, IDS, is_scored=False, path=tmp_path / "submission.json")
    assert submission.write(result) == 2 * 52
    body = submission.path.read_text(encoding="utf-8")
    assert {answers[i] for answers in json.loads(body).values() for i in "12"} == set("ABCD")
    assert {answers["0"] for answers in json.loads(body).values()} == {"D"}
    submission.write(result)
    assert submission.path.read_text(encoding="utf-8") == body


def test_what_cannot_become_complete_is_refused_before_scoring(tmp_path):
    path = tmp_path / "submission.json"
    check_submittable(BENCH, IDS, path)
    with pytest.raises(InputError, match="C-Eval takes no submission of its val split") as caught:
        check_submittable(load_bench("ceval"), IDS, path)
    assert caught.value.hint == "--split test"
    with pytest.raises(InputError, match="MMLU takes no submission"):
        check_submittable(load_bench("mmlu"), IDS, path)
    with pytest.raises(InputError, match="51 are missing"):
        check_submittable(BENCH, {"law": ["0"]}, path)
    with pytest.raises(InputError, match="law: 2 questions, but none with the id 0; a submission has the ids 0 to 1"):
        check_submittable(BENCH, IDS | {"law": ["1", "2"]}, path)
    path.write_text("[1, 2]")
    with pytest.raises(OutputError, match="already exists and is not a submission"):
        check_submittable(BENCH, IDS, path)
    assert path.read_text() == "[1, 2]"


@pytest.fixture(scope="module")
def unanswered(tmp_path_factory):
    """All 52 subjects without answers, two questions each."""
    root = tmp_path_factory.mktemp("ceval")
    for split, answer in (("test", ""), ("dev", "A")):
        (root / split).mkdir()
        for subject in BENCH.by_name:
            rows = "".join(f"{i},{subject} {i}?,1,2,3,4,{answer}\n" for i in range(2))
            (root / split / f"{subject}_{split}.csv").write_text(f"id,question,A,B,C,D,answer\n{rows}", "utf-8")
    return root


def test_a_run_over_a_split_without_answers_leaves_a_submission(tiny_llama, unanswered, tmp_path):
    path = tmp_path / "submission.json"
    record = evaluate(
        tiny_llama,
        "ceval",
        data=unanswered,
        split="test",
        shots=0,
        submission=path,
        log_samples=True,
    )
    assert (record.benches, record.samples, record.scores) == ({}, {}, {})
    body = json.loads(path.read_text(encoding="utf-8"))
    assert {s: list(a) for s, a in body.items()} == {s: ["0", "1"] for s in BENCH.by_name}
    labelled = tmp_path / "labelled"
    (labelled / "test").mkdir(parents=True)
    for file in (unanswered / "test").iterdir():
        (labelled / "test" / file.name).write_text(file.read_text("utf-8").replace(",4,\n", ",4,B\n"), "utf-8")
    scored = evaluate(tiny_llama, "ceval", data=labelled, split="test", shots=0, protocol="official", submission=path)
    subjects = scored.benches["ceval"].subjects
    body = json.loads(path.read_text(encoding="utf-8"))
    assert {s.name: [q.choice for q in s.questions] for s in subjects} == {s: [*a.values()] for s, a in body.items()}
    assert {q.target for s in subjects for q in s.questions} == {"B"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 1}, "an answer to every question"),
        ({"subjects": ["law"]}, "51 are missing"),
        ({"bench": "ceval,mini"}, "about one benchmark"),
        ({"bench": "mini", "data": None}, "mini takes no submission of its dev split"),
        ({"data": None}, "needs C-Eval's test files"),
        ({"shard": True}, "not of a part"),
    ],
)
def test_a_run_that_cannot_leave_one_is_refused_before_the_model_is_opened(unanswered, tmp_path, options, message):
    if "shard" in options:
        options = {"shard": Shard(1, 2)}
    options = {"bench": "ceval", "data": unanswered, "split": "test", "shots": 0} | options
    if options["bench"] != "ceval":
        options["split"] = "dev"
    with pytest.raises(InputError, match=message):
        evaluate("/nowhere", **options, submission=tmp_path / "submission.json")
    assert not list(tmp_path.iterdir())


def test_a_split_without_answers_is_said_when_no_submission_is_wanted(unanswered):
    with pytest.raises(InputError, match="the test split has no answers, so that nothing can be scored") as caught:
        evaluate("/nowhere", "ceval", data=unanswered, split="test", shots=0)
    assert caught.value.hint == "score another split: --split val, or write what a leaderboard takes: --submission FILE"
