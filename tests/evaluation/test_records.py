"""Records read back: what was written, older forms, lm-eval's own files, and files that are no records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_benchmarks import write_benchmarks

from llmkit.cli.app import main
from llmkit.errors import InputError
from llmkit.evaluation.benches import load_bench
from llmkit.evaluation.record import Question
from llmkit.evaluation.records import read_record
from llmkit.evaluation.report_inputs import read_inputs

MINI = load_bench("mini").own_data / "base"
SUBJECTS = ("star_lore", "vale_geography")


def subject(choices: str, targets: str, **columns) -> dict:
    n_right = sum(a == b for a, b in zip(choices, targets, strict=True))
    mean = {"n": len(targets), "acc": n_right / len(targets), "stderr": 0.25}
    return {"label": "", "category": "", "subcategory": "", **mean, "choices": choices, "targets": targets, **columns}


def body(form: str = "llmkit.eval/1", **subjects) -> dict:
    """A record as the first form had it."""
    bench = {"title": "mini", "subjects": subjects or {"star_lore": subject("ABCA", "ABDD")}, "missing": [], "shots": 2}
    return {
        "format": form, "created": "2026-01-02", "model": {"label": "m", "dtype": "float32"}, "settings": {},
        "versions": {"llmkit": "0.2.0"}, "scores": {}, "benches": {"mini": bench}, "tasks": {}, "continuations": {},
        "elapsed_s": 1.5, "warnings": ["w"],
    }  # fmt: skip


def write(path: Path, document) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def test_the_first_form_is_read(tmp_path):
    record = read_record(write(tmp_path / "run.json", body()))
    (result,) = record.benches["mini"].subjects
    assert [(q.id, q.choice, q.target, q.logprobs, q.prompt) for q in result.questions] == [
        ("0", "A", "A", None, ""),
        ("1", "B", "B", None, ""),
        ("2", "C", "D", None, ""),
        ("3", "A", "D", None, ""),
    ]
    assert record.scores == {"mini": 0.5}
    assert record.benches["mini"].bench.task_name("star_lore") == "mini_star_lore"
    assert (record.warnings, record.elapsed_s, record.model["label"]) == (("w",), 1.5, "m")


def test_marks_that_editors_and_shells_put_before_a_record(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(body()), encoding="utf-8-sig")
    assert read_record(path).scores == {"mini": 0.5}
    assert read_inputs([path]).records[0].scores == {"mini": 0.5}
    path.write_text(json.dumps(body()), encoding="utf-16")
    for read in (read_record, lambda path: read_inputs([path])):
        with pytest.raises(InputError, match=r"run.json is in UTF-16, expected UTF-8") as caught:
            read(path)
        assert caught.value.hint.startswith("iconv -f UTF-16 -t UTF-8 ")


def test_a_record_with_long_samples_is_read(tmp_path):
    prompt = "x" * 101_000_000  # more than a file of a checkpoint may have
    record = read_record(write(tmp_path / "run.json", body() | {"samples": {"mini_star_lore": [{"prompt": prompt}]}}))
    assert record.samples["mini_star_lore"][0]["prompt"] == prompt


def test_a_file_without_bounds_is_refused_unread(tmp_path):
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="a record has at most 1073741824"):
        read_record(tmp_path / "run.json")


def test_columns_of_the_second_form_are_read(tmp_path):
    columns = {"ids": ["q7", "q9"], "logprobs": [[-1.0, -2.0, -3.0, -4.0], None], "mass": [0.55, None]}
    columns |= {"prompts": ["00ff", ""], "choices": ["A", ""], "targets": ["A", "B"]}
    read = read_record(write(tmp_path / "r", body("llmkit.eval/2", star_lore=subject("AC", "AB") | columns)))
    assert read.benches["mini"].subjects[0].questions == (
        Question("q7", "A", "A", (-1.0, -2.0, -3.0, -4.0), 0.55, "00ff"),
        Question("q9", "", "B", None, None, ""),
    )


def test_an_unknown_benchmark_brings_its_categories(tmp_path):
    document = body(x=subject("A", "A") | {"category": "one"}, y=subject("B", "A") | {"category": "two"})
    document["benches"]["theirs"] = document["benches"].pop("mini") | {"title": "Theirs", "missing": ["z"]}
    record = read_record(write(tmp_path / "run.json", document))
    assert {k: v[0].value for k, v in record.benches["theirs"].categories.items()} == {"one": 1.0, "two": 0.0}
    assert [s.name for s in record.benches["theirs"].bench.subjects] == ["x", "y", "z"]


@pytest.fixture(scope="module")
def mini_run(tmp_path_factory) -> Path:
    """A record of a run over two subjects of the mini benchmark."""
    path = tmp_path_factory.mktemp("run") / "run.json"
    options = ["--limit", "5", "--subjects", ",".join(SUBJECTS), "-q", "--log-samples", "-o", str(path)]
    assert main(["eval", str(MINI), "--bench", "mini", *options]) == 0
    return path


def test_what_is_written_is_read(mini_run):
    assert json.loads(json.dumps(read_record(mini_run).to_json())) == json.loads(mini_run.read_text(encoding="utf-8"))


def by_lm_eval(folder: Path, bench, data: Path, subjects, shots: int) -> Path:
    """The folder that lm-eval's own loggers leave of a run of its `hf` backend over subjects of a benchmark."""
    from lm_eval.evaluator import evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM

    from llmkit.evaluation.csv_data import find_data
    from llmkit.evaluation.tasks import bench_task, quiet_lm_eval, set_shots

    found = find_data(bench, data)
    tasks = {bench.task_name(s): bench_task(bench, s, found.read(s, shots=shots)) for s in subjects}
    for task in tasks.values():
        set_shots(task, shots)
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args(
        model_source="hf", model_args="pretrained=x/tiny", system_instruction=None, chat_template=None,
        fewshot_as_multiturn=False,
    )  # fmt: skip
    with quiet_lm_eval():
        results = evaluate(HFLM(pretrained=str(MINI), device="cpu", dtype="float32"), tasks, limit=5)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, some in samples.items():
        tracker.save_results_samples(task_name=name, samples=some)
    return folder


@pytest.fixture(scope="module")
def lm_eval_run(tmp_path_factory) -> Path:
    """lm-eval's files of the questions of `mini_run`."""
    bench = load_bench("mini")
    return by_lm_eval(tmp_path_factory.mktemp("theirs"), bench, bench.own_data, SUBJECTS, shots=2)


def test_lm_evals_files_are_read_as_our_own(lm_eval_run, mini_run):
    theirs, ours = read_record(lm_eval_run), read_record(mini_run)
    a, b = theirs.benches["mini"], ours.benches["mini"]
    assert sorted(s.name for s in a.subjects) == sorted(SUBJECTS)
    assert (a.shots, a.task_version, theirs.model["label"]) == (2, b.task_version, "x/tiny")
    assert theirs.scores == pytest.approx(ours.scores)
    for subject_ in a.subjects:
        mine = next(s for s in b.subjects if s.name == subject_.name)
        assert subject_.acc.value == pytest.approx(mine.acc.value)
        assert subject_.acc.stderr == pytest.approx(mine.acc.stderr)
        for q, r in zip(subject_.questions, mine.questions, strict=True):
            assert (q.id, q.choice, q.target) == (r.id, r.choice, r.target)
            assert q.logprobs == pytest.approx(r.logprobs, abs=1e-4)
            assert 0 < q.mass < 1
    logged = theirs.samples["mini_star_lore"][0]
    assert logged["prompt_sha256"] == ours.samples["mini_star_lore"][0]["prompt_sha256"]
    assert logged["doc"] == ours.samples["mini_star_lore"][0]["doc"]


def test_lm_evals_results_alone_have_averages_without_questions(lm_eval_run, tmp_path):
    (source,) = lm_eval_run.glob("*/results_*.json")
    record = read_record(write(tmp_path / source.name, source.read_text(encoding="utf-8")))
    assert all(s.questions == () and s.acc.n == 5 for s in record.benches["mini"].subjects)
    assert record.scores == read_record(lm_eval_run).scores


def results(*tasks: str) -> dict:
    """What lm-eval writes of such tasks."""
    return {
        "results": {t: {"alias": t, "acc,none": 0.25, "acc_stderr,none": "N/A"} for t in tasks},
        "configs": {t: {} for t in tasks}, "versions": dict.fromkeys(tasks, 1.0), "n-shot": dict.fromkeys(tasks, 5),
        "n-samples": {t: {"original": 9, "effective": 4} for t in tasks},
    }  # fmt: skip


def test_lm_evals_families_of_a_benchmark_are_protocols_of_it(tmp_path):
    """The usual family is the benchmark where both were scored; what is no subject is a task of its own."""
    other = ["mmlu_virology_continuation", "mmlu_anatomy_continuation", "arc_easy"]
    record = read_record(write(tmp_path / "results_1.json", results(*other)))
    result = record.benches["mmlu"]
    assert (result.protocol, result.title) == ("continuation", "MMLU continuation")
    assert [(s.name, s.acc.value, s.acc.stderr, s.acc.n) for s in result.subjects] == [
        ("anatomy", 0.25, None, 4),
        ("virology", 0.25, None, 4),
    ]
    assert list(record.tasks) == ["arc_easy"]
    both = read_record(write(tmp_path / "results_1.json", results(*other, "mmlu_anatomy")))
    assert (both.benches["mmlu"].protocol, len(both.benches["mmlu"].subjects)) == ("lm-eval", 1)
    assert sorted(both.tasks) == sorted(other)


def test_lm_evals_group_of_generated_letters_is_the_benchmark_with_its_averages(tmp_path):
    """Scored under lm-eval's name of the group, and by lm-eval itself: the same questions, subjects and averages."""
    data, path = write_benchmarks(tmp_path / "data", lambda bench: ("dev", "test")), tmp_path / "run.json"
    options = ["--data", str(data / "mmlu"), "--shots", "1", "-q", "-o", str(path)]
    assert main(["eval", str(MINI), "--bench", "mmlu_generative", *options]) == 0
    bench = replace(
        load_bench("mmlu"), task="mmlu_{subject}_generative", definition="mmlu/generative/mmlu_{subject}.yaml"
    )
    theirs = read_record(by_lm_eval(tmp_path / "theirs", bench, data / "mmlu", ("virology", "anatomy"), shots=1))
    ours = read_record(path)
    assert ours.settings["bench"] == ["mmlu"]
    a, b = (record.benches["mmlu"] for record in (theirs, ours))
    assert a.protocol == b.protocol == ours.settings["protocol"] == "generative"
    assert not theirs.tasks
    assert (a.micro.value, a.macro.value, a.macro_categories.value) == pytest.approx(
        (b.micro.value, b.macro.value, b.macro_categories.value)
    )
    assert sorted(a.categories) == sorted(b.categories) == ["other"]
    by_name = {s.name: s for s in b.subjects}
    for subject_ in a.subjects:
        mine = by_name[subject_.name]
        assert [(q.id, q.choice, q.target) for q in subject_.questions] == [
            (q.id, q.choice, q.target) for q in mine.questions
        ]
        assert len(mine.questions) == 3


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["--limit", "1.5"], "--limit 1.5 is no number of questions", "--limit 1"),
        (
            ["--backend", "onnxruntime", "--limit", "1"],
            "--backend 'onnxruntime' is unknown; expected auto, ",
            "did you mean onnx?",
        ),
        (["--protocol", "original"], "is --bench mmlu --protocol generative", "--bench mmlu --protocol original"),
        (
            ["--fail-under", "mmlu_generative=0.3"],
            "mmlu_generative is not scored; scored are mmlu",
            "leave mmlu_generative out of --fail-under",
        ),
    ],
)
def test_a_group_and_what_contradicts_it(options, message, hint, capsys):
    assert main(["eval", str(MINI), "--bench", "mmlu_generative", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert hint in said


def test_a_truncated_sample_file_is_refused_by_its_line(lm_eval_run, tmp_path):
    (source,) = (p.parent for p in lm_eval_run.glob("*/results_*.json"))
    for path in source.iterdir():
        cut = len(path.read_bytes()) - 40 if path.name.startswith("samples_mini_star_lore") else None
        (tmp_path / path.name).write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"samples_mini_star_lore_.*jsonl, line 5 is not valid JSON"):
        read_record(tmp_path)


def test_a_sample_with_a_field_of_another_type_is_refused_by_its_line(lm_eval_run, tmp_path):
    (source,) = (p.parent for p in lm_eval_run.glob("*/results_*.json"))
    for path in source.iterdir():
        text = path.read_text(encoding="utf-8").replace('"metrics": ["acc"]', '"metrics": [["acc"]]')
        (tmp_path / path.name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"jsonl, line 1: metrics: expected an array of texts"):
        read_record(tmp_path)


def broken(**changes) -> dict:
    return body(star_lore=subject("ABCA", "ABDD") | changes)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("", "is not valid JSON"),
        (json.dumps(body())[:200], "is not valid JSON"),
        ("[]", "expected an object, found an array"),
        ({"format": "llmkit.manifest/1"}, "is no record of an evaluation"),
        ({"weight_map": {}}, "is no record of an evaluation"),
        ({"format": "llmkit.eval/9"}, "of the form llmkit.eval/9, expected llmkit.eval/1 or llmkit.eval/2"),
        ({k: v for k, v in body().items() if k != "benches"}, "benches: expected an object, found nothing"),
        (broken(choices="ABC"), "3 choices and 4 targets"),
        (broken(acc=0.75), "acc is 0.75, but 2 of 4 answers are right"),
        (broken(n=5), "5 questions are counted, but 4 are listed"),
        (broken(n=0), "n is 0"),
        (broken(stderr=1e308), "stderr: expected a standard error, found 1e+308"),
        (broken() | {"benches": {"mini": body()["benches"]["mini"] | {"average": "mean"}}}, "expected micro or macro"),
        (broken(acc=45, choices=None, targets=None), "acc is 45, expected a share from 0 to 1"),
        (body() | {"samples": {"mini_star_lore": ["x"]}}, "samples: expected arrays of objects"),
        (body() | {"continuations": {" A": [1.5]}}, "continuations: expected arrays of token ids"),
        (broken(n=True), "n: expected a count, found True"),
        (broken(ids=["a", "b", "c", "a"]), "ids: one of them occurs twice"),
        (broken(mass=[1, 2, 3, "x"]), "mass: expected numbers, found x"),
        (broken(logprobs=[1, 2, 3, 4]), "logprobs: expected arrays of numbers, found 1"),
        (broken(logprobs=[[1], None, [3], [None]]), "logprobs: expected numbers, found None"),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(tmp_path, document, message, capsys):
    path = write(tmp_path / "run.json", document)
    assert main(["report", str(path)]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert message in error
    assert str(path) in error
    assert hint.startswith("hint: ")


def test_folders_and_paths_that_hold_none(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere.json", "empty"):
        assert main(["report", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err
    for i in range(2):
        write(tmp_path / f"results_{i}.json", {})
    with pytest.raises(InputError, match=r"holds 2 runs of lm-eval: results_0\.json, results_1\.json"):
        read_record(tmp_path)


def test_report_prints_the_table_of_the_run_again(tmp_path, capsys):
    path = tmp_path / "run.json"
    call = ["eval", str(MINI), "--bench", "mini", "--limit", "3", "--subjects", "star_lore", "-o", str(path)]
    assert main(call) == 0
    *table, _, _ = capsys.readouterr().out.splitlines()
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == table
    assert main(["report", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(path.read_text(encoding="utf-8"))
