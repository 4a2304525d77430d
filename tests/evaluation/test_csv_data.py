"""Where a benchmark's published files are, and which subjects, categories and splits it has."""

from __future__ import annotations

import pytest

from llmkit.errors import InputError
from llmkit.evaluation.benches import bench_names, load_bench
from llmkit.evaluation.csv_data import find_data
from llmkit.evaluation.csv_forms import FORMS


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def folder(root, split, *subjects):
    for subject in subjects:
        write(root / split / f"{subject}_{split}.csv", "".join(f"What is {i}?,0,1,2,3,C\n" for i in range(3)))


@pytest.mark.parametrize("inside", ["", "mmlu", "data", "download/archive/data", "datasets/snapshots/0ab1"])
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


def test_shots_without_answers_are_no_examples(tmp_path):
    folder(tmp_path, "test", "anatomy")
    write(tmp_path / "dev" / "anatomy_dev.csv", "What?,0,1,2,3,\nWhich?,0,1,2,3,\n")
    found = find_data(load_bench("mmlu"), tmp_path)
    with pytest.raises(InputError, match=r"anatomy_dev.csv: no answers, which the 2 shots would show"):
        found.read("anatomy", shots=2)
    assert len(found.read("anatomy", shots=0)["test"]) == 3


def test_a_folder_without_the_benchmark(tmp_path):
    with pytest.raises(InputError, match=r"no C-Eval file in it; expected files such as val/.*_val\.csv"):
        find_data(load_bench("ceval"), tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        find_data(load_bench("ceval"), tmp_path / "nowhere")


@pytest.mark.parametrize("pattern", ["{subject}/{hub}-00000-of-00001.parquet", "{subject}/{hub}/0000.parquet"])
def test_a_hub_snapshot_has_the_same_questions(tmp_path, pattern):
    """Each benchmark's own columns on the hub, written by pyarrow; `val` is `validation` in MMLU's."""
    import pyarrow
    from pyarrow import parquet

    rows = [("What, exactly?", ["0.50", "None", "a\nb", '"d"'], 2), ("Second", ["1", "2", "3", "4"], 0)]
    letters = [dict(zip("ABCD", choices, strict=True)) for _, choices, _ in rows]
    columns = {
        "mmlu": ([{"question": q, "subject": "x", "choices": c, "answer": a} for q, c, a in rows], "validation", "val"),
        "ceval": (
            [
                {"id": i, "question": q, **c, "answer": "ABCD"[a], "explanation": None}
                for i, ((q, _, a), c) in enumerate(zip(rows, letters, strict=True))
            ],
            "val",
            "val",
        ),
        "cmmlu": (
            [{"Question": q, **c, "Answer": "ABCD"[a]} for (q, _, a), c in zip(rows, letters, strict=True)],
            "test",
            "test",
        ),
    }
    subjects = {"mmlu": "anatomy", "ceval": "law", "cmmlu": "logical"}
    for name, (records, hub, split) in columns.items():
        subject = subjects[name]
        snapshot = tmp_path / name / "hub" / "datasets--x--y" / "snapshots" / "0ab1"
        path = snapshot / pattern.format(subject=subject, hub=hub)
        path.parent.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
        form = load_bench(name).of_split(split)
        csv_file = tmp_path / "csv" / FORMS[name].path.format(subject=subject, split=split)
        header = {"mmlu": "", "ceval": "id,question,A,B,C,D,answer\n", "cmmlu": ",Question,A,B,C,D,Answer\n"}[name]
        index = [""] * 2 if name == "mmlu" else ["0,", "1,"]
        write(csv_file, f'{header}{index[0]}"What, exactly?",0.50,None,"a\nb","""d""",C\n{index[1]}Second,1,2,3,4,A\n')
        wanted = find_data(form, tmp_path / "csv").read(subject, shots=0)
        for given in (snapshot, tmp_path / name):
            assert find_data(form, given).read(subject, shots=0) == wanted
        beside = snapshot / csv_file.relative_to(tmp_path / "csv")
        write(beside, csv_file.read_text(encoding="utf-8"))
        assert find_data(form, snapshot).read(subject, shots=0) == wanted
        write(beside, csv_file.read_text(encoding="utf-8").replace("4,A", "4,B"))
        with pytest.raises(InputError, match=rf"{subject}: its questions in \S+csv are others than .*parquet"):
            find_data(form, snapshot).read(subject, shots=0)
        beside.unlink()
    (snapshot / subject / "test-00000-of-00001.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(InputError, match=r"test-00000-of-00001\.parquet: not a Parquet file"):
        find_data(load_bench("cmmlu"), snapshot).read("logical", shots=0)


def test_the_split_folder_itself_is_understood(tmp_path):
    folder(tmp_path, "test", "anatomy")
    assert find_data(load_bench("mmlu"), tmp_path / "test").folder == tmp_path


def test_two_folders_with_the_benchmark_are_both_named(tmp_path):
    for inside in ("old", "new"):
        folder(tmp_path / inside, "test", "anatomy", "virology")
    with pytest.raises(InputError) as caught:
        find_data(load_bench("mmlu"), tmp_path)
    assert f"MMLU is in {tmp_path / 'new'}, {tmp_path / 'old'}" in caught.value.message
    assert caught.value.hint == f"--data {tmp_path / 'new'}"


def test_another_benchmarks_files_are_not_taken_for_it(tmp_path):
    """MMLU and C-Eval have `high_school_physics_test.csv` both."""
    folder(tmp_path / "ceval", "test", "high_school_physics", "law", "accountant")
    with pytest.raises(InputError, match="no MMLU file in it"):
        find_data(load_bench("mmlu"), tmp_path)


def test_a_split_that_is_not_there_and_those_that_are(tmp_path):
    folder(tmp_path, "dev", "anatomy")
    folder(tmp_path, "val", "anatomy")
    with pytest.raises(InputError) as caught:
        find_data(load_bench("mmlu"), tmp_path)
    assert caught.value.message == f"{tmp_path}: MMLU is there, but not its test split; there is dev, val"
    assert find_data(load_bench("mmlu").of_split("val"), tmp_path).subjects == ("anatomy",)
    with pytest.raises(InputError, match="CMMLU has no val split"):
        load_bench("cmmlu").of_split("val")


def test_an_archive_is_no_folder(tmp_path):
    import tarfile
    import zipfile

    folder(tmp_path / "in", "test", "anatomy")
    with zipfile.ZipFile(tmp_path / "mmlu.zip", "w") as archive:
        archive.write(tmp_path / "in" / "test" / "anatomy_test.csv", "test/anatomy_test.csv")
    with tarfile.open(tmp_path / "mmlu.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "in", "data")
    for name, command in (("mmlu.zip", "unzip"), ("mmlu.tar.gz", "tar -xf")):
        with pytest.raises(InputError, match="an archive, not a folder") as caught:
            find_data(load_bench("mmlu"), tmp_path / name)
        assert caught.value.hint.startswith(f"{command} {tmp_path / name}")
    with pytest.raises(InputError, match="a file, not a folder"):
        find_data(load_bench("mmlu"), tmp_path / "in" / "test" / "anatomy_test.csv")
    (tmp_path / "in" / "test" / "anatomy_test.csv").unlink()
    with pytest.raises(InputError, match="no MMLU file in it") as caught:
        find_data(load_bench("mmlu"), tmp_path)
    assert "unzip" in caught.value.hint or "tar -xf" in caught.value.hint


def test_benchmarks_are_whole():
    assert bench_names() == ["ceval", "cmmlu", "mini", "mmlu", "mmlu_pro"]
    mmlu, ceval, cmmlu = load_bench("mmlu"), load_bench("ceval"), load_bench("cmmlu")
    assert (len(mmlu.by_name), len(ceval.by_name), len(cmmlu.by_name)) == (57, 52, 67)
    sizes = {k: len(v) for k, v in mmlu.categories(mmlu.by_name).items()}
    assert sizes == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    sizes = {k: len(v) for k, v in ceval.categories(ceval.by_name).items()}
    assert sizes == {"STEM": 20, "humanities": 11, "social sciences": 10, "other": 11}
    assert len(ceval.subsets["hard"]) == 8
    sizes = {k: len(v) for k, v in cmmlu.categories(cmmlu.by_name).items()}
    assert sizes == {"STEM": 17, "humanities": 13, "social sciences": 22, "other": 15}
    assert len(cmmlu.subsets["China specific"]) == 15  # a second label: it is in no average over categories
    assert ceval.by_name["law"].label == "法学"


def test_subjects_are_those_of_lm_eval():
    from pathlib import Path

    from lm_eval.tasks import __file__ as tasks

    for name, prefix in (("mmlu", "mmlu/default/mmlu_"), ("ceval", "ceval/ceval-valid_"), ("cmmlu", "cmmlu/cmmlu_")):
        bench = load_bench(name)
        theirs = [p.relative_to(Path(tasks).parent).as_posix() for p in Path(tasks).parent.glob(f"{prefix}*.yaml")]
        assert {f"{prefix}{subject}.yaml" for subject in bench.by_name} == set(theirs)


def test_cmmlus_names_are_those_of_lm_evals_headers():
    from llmkit.evaluation.tasks import _definition

    bench = load_bench("cmmlu")
    for subject in bench.subjects:
        header = _definition(bench.definition.format(subject=subject.name))["description"]
        assert header == f"以下是关于{subject.label}的单项选择题，请直接给出正确答案的选项。\n\n"


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
