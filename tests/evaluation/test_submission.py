"""C-Eval's submission.json: complete, or refused with the subject and the count."""

from __future__ import annotations

import json

import pytest

from llmkit.errors import InputError, OutputError
from llmkit.evaluation.benches import load_bench
from llmkit.evaluation.submission import check_submission, check_submittable, write_submission

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
