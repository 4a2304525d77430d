"""Published CSV layouts: cells stay text, faults are named by file and line."""

from __future__ import annotations

import pytest

from llmkit.errors import InputError
from llmkit.evaluation.benches import bench_names, load_bench
from llmkit.evaluation.csv_data import find_data, read_split

MMLU_ROW = '"What, exactly?",0.50,None,1e3,"a ""b""",C\n'


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


def test_cells_are_text(tmp_path):
    path = write(tmp_path / "x.csv", MMLU_ROW)
    (doc,) = read_split(path, "mmlu", "anatomy")
    assert doc == {
        "question": "What, exactly?",
        "subject": "anatomy",
        "choices": ["0.50", "None", "1e3", 'a "b"'],
        "answer": 2,
    }


def test_line_breaks_inside_cells_windows_ends_and_blank_lines(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'"two\nlines",1,2,3,4,A\r\n\r\n"second",5,6,7,8,D\r\n')
    docs = read_split(path, "mmlu", "s")
    assert [d["question"] for d in docs] == ["two\nlines", "second"]
    assert [d["answer"] for d in docs] == [0, 3]


def test_ceval_takes_columns_by_name_and_fills_what_val_lacks(tmp_path):
    path = write(tmp_path / "x.csv", "\ufeffid,question,A,B,C,D,answer\n7,题目,0.50,None,丙,丁,B\n")
    (doc,) = read_split(path, "ceval", "law")
    assert doc == {
        "id": "7", "question": "题目", "A": "0.50", "B": "None", "C": "丙", "D": "丁", "answer": "B", "explanation": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "layout", "message"),
    [
        ('q,1,2,3,4,A\n"a\nb",1,2,3,B\n', "mmlu", "line 2: 5 cells, expected 6 (question, A, B, C, D, answer)"),
        ('"a\nb",1,2,3,4,A\nq,1,2,3,4,E\n', "mmlu", "line 3: the answer is 'E', expected A, B, C or D"),
        ("question,A,B,C,D,answer\n", "mmlu", "line 1: the answer is 'answer'"),
        ("id,question,A,B,C,answer\n", "ceval", "line 1: the header lacks D"),
        ("q,1,2,3,4,A\n", "ceval", "line 1: the header lacks question, B, C, D, answer"),
        ("id,question,A,B,C,D,answer\n0,q,1,2,3,4\n", "ceval", "line 2: 6 cells, expected 7"),
        ("id,question,A,B,C,D,answer\n0,q,1,2,3,4,\n", "ceval", "line 2: the answer is ''"),
    ],
)
def test_faults_name_file_and_line(tmp_path, text, layout, message):
    path = write(tmp_path / "odd.csv", text)
    with pytest.raises(InputError) as caught:
        read_split(path, layout, "s")
    assert message in caught.value.message
    assert str(path) in caught.value.message


def test_a_file_that_is_absent_or_not_utf8(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_split(tmp_path / "none.csv", "mmlu", "s")
    path = tmp_path / "latin.csv"
    path.write_bytes("café,1,2,3,4,A\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_split(path, "mmlu", "s")


def folder(root, split, *subjects):
    for subject in subjects:
        write(root / split / f"{subject}_{split}.csv", MMLU_ROW * 3)


@pytest.mark.parametrize("inside", ["", "mmlu", "data"])
def test_a_partial_folder_gives_what_it_has_and_says_what_it_lacks(tmp_path, inside):
    folder(tmp_path / inside, "test", "virology", "anatomy", "alchemy")
    found = find_data(load_bench("mmlu"), tmp_path)
    assert found.subjects == ("anatomy", "virology")
    assert len(found.missing) == 55
    assert found.unknown == ("alchemy",)


def test_missing_shots_are_named(tmp_path):
    folder(tmp_path, "test", "anatomy")
    found = find_data(load_bench("mmlu"), tmp_path)
    with pytest.raises(InputError) as caught:
        found.read("anatomy", shots=5)
    assert str(tmp_path / "dev" / "anatomy_dev.csv") in caught.value.message
    assert len(found.read("anatomy", shots=0)["test"]) == 3
    folder(tmp_path, "dev", "anatomy")
    with pytest.raises(InputError) as caught:
        found.read("anatomy", shots=5)
    assert "3 rows, but 5 shots" in caught.value.message
    assert caught.value.hint == "add --shots 3"


def test_a_folder_without_the_benchmark(tmp_path):
    with pytest.raises(InputError, match=r"no C-Eval file in it; expected files such as val/.*_val\.csv"):
        find_data(load_bench("ceval"), tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        find_data(load_bench("ceval"), tmp_path / "nowhere")


def test_benchmarks_are_whole():
    assert bench_names() == ["ceval", "mini", "mmlu"]
    mmlu, ceval = load_bench("mmlu"), load_bench("ceval")
    assert (len(mmlu.by_name), len(ceval.by_name)) == (57, 52)
    sizes = {k: len(v) for k, v in mmlu.categories(mmlu.by_name).items()}
    assert sizes == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    sizes = {k: len(v) for k, v in ceval.categories(ceval.by_name).items()}
    assert sizes == {"STEM": 20, "humanities": 11, "social sciences": 10, "other": 11}
    assert len(ceval.subsets["hard"]) == 8
    assert ceval.by_name["law"].label == "法学"


def test_subjects_are_those_of_lm_eval():
    from pathlib import Path

    from lm_eval.tasks import __file__ as tasks

    for name, pattern in (("mmlu", "mmlu/default/mmlu_*.yaml"), ("ceval", "ceval/ceval-valid_*.yaml")):
        bench = load_bench(name)
        theirs = {p.stem.removeprefix("mmlu_").removeprefix("ceval-valid_") for p in Path(tasks).parent.glob(pattern)}
        assert set(bench.by_name) == theirs


def test_subjects_by_name_category_and_subset():
    mmlu, ceval = load_bench("mmlu"), load_bench("ceval")
    have = ["abstract_algebra", "anatomy", "astronomy", "virology"]
    assert mmlu.select([], have) == have
    assert mmlu.select(["virology", "stem"], have) == ["abstract_algebra", "astronomy", "virology"]
    assert mmlu.select(["physics"], have) == ["astronomy"]
    assert ceval.select(["hard"], ["law", "college_physics"]) == ["college_physics"]
    with pytest.raises(InputError) as caught:
        mmlu.select(["anatmoy"], have)
    assert caught.value.hint == "did you mean --subjects anatomy?"
    with pytest.raises(InputError, match="subject marketing: no data for it"):
        mmlu.select(["marketing"], have)
    with pytest.raises(InputError, match="no data for any of them"):
        mmlu.select(["history"], have)


def test_an_unknown_benchmark_has_a_nearest_name():
    with pytest.raises(InputError) as caught:
        load_bench("mlmu")
    assert caught.value.hint == "did you mean --bench mmlu?"
