"""lm-eval's files: its own tools read them, and `report` reads them back as the record they were made of."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import report_world as world

from llmkit.evaluation.formats.format import format_for
from llmkit.evaluation.records import read_record
from llmkit.evaluation.report_inputs import ReportInputs


@pytest.fixture(scope="module")
def record():
    return world.run("org/vicuna-7b", world.mmlu(seed=3, only=2, n=12), samples=True)


@pytest.fixture(scope="module")
def folder(record, tmp_path_factory):
    out = tmp_path_factory.mktemp("lm-eval")
    written = format_for(out, "lm-eval").write(ReportInputs((record,)), out)
    assert [p.name for p in written] == [
        "results_2026-11-29T12-00-00.000000.json",
        "samples_mmlu_abstract_algebra_2026-11-29T12-00-00.000000.jsonl",
        "samples_mmlu_college_mathematics_2026-11-29T12-00-00.000000.jsonl",
    ]
    return written[0].parent


def test_lm_evals_own_table_is_made_of_it(record, folder):
    from lm_eval.utils import get_file_task_name, get_results_filenames, get_sample_results_filenames, make_table

    paths = [str(p) for p in sorted(folder.iterdir())]
    (results,) = get_results_filenames(paths)
    samples = get_sample_results_filenames(paths)
    assert [get_file_task_name(p.rpartition("/")[2]) for p in samples] == [
        "mmlu_abstract_algebra",
        "mmlu_college_mathematics",
    ]
    body = json.loads((folder / results).read_text(encoding="utf-8"))
    rows = [[cell.strip() for cell in line.split("|")] for line in make_table(body).splitlines()[2:]]
    found = {row[1]: (row[4], row[7], row[9]) for row in rows}
    bench = record.benches["mmlu"]
    assert found["MMLU"] == ("5", f"{bench.micro.value:.4f}", f"{bench.micro.stderr:.4f}")
    for subject in bench.subjects:
        assert found[f"- {subject.name}"] == ("5", f"{subject.acc.value:.4f}", f"{subject.acc.stderr:.4f}")
    assert "MMLU" in make_table(body, "groups")


def test_datasets_loads_the_samples(record, folder, tmp_path):
    """As lm-eval says its samples are loaded: every column has one type."""
    import datasets

    (path, *_) = folder.glob("samples_mmlu_abstract_algebra_*.jsonl")
    rows = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path), split="train")
    questions = record.benches["mmlu"].subjects[0].questions
    assert [row["acc"] for row in rows] == [float(q.is_right) for q in questions]
    assert [row["target"] for row in rows] == [str("ABCD".index(q.target)) for q in questions]


def test_hashes_are_lm_evals(folder):
    from lm_eval.utils import hash_string

    (path, *_) = folder.glob("samples_*.jsonl")
    sample = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert sample["prompt_hash"] == hash_string(sample["arguments"]["gen_args_0"]["arg_0"])
    assert sample["target_hash"] == hash_string(sample["target"])
    assert sample["doc_hash"] == hash_string(json.dumps(sample["doc"], indent=2, ensure_ascii=False))


@pytest.mark.parametrize(("keeps_samples", "protocol"), [(True, "lm-eval"), (False, "original"), (False, "lm-eval")])
def test_it_is_read_back_as_it_was(record, keeps_samples, protocol, tmp_path):
    record = record if keeps_samples else replace(record, samples={})
    record = replace(record, benches={"mmlu": replace(record.benches["mmlu"], protocol=protocol)})
    format_for(tmp_path, "lm-eval").write(ReportInputs((record,)), tmp_path)
    again = read_record(tmp_path)
    ours, theirs = record.benches["mmlu"], again.benches["mmlu"]
    assert (theirs.shots, theirs.missing, theirs.protocol) == (ours.shots, ours.missing, protocol)
    for a, b in zip(ours.subjects, theirs.subjects, strict=True):
        assert (a.subject, a.acc) == (b.subject, b.acc)
        assert [(q.choice, q.target) for q in a.questions] == [(q.choice, q.target) for q in b.questions]
        for x, y in zip(a.questions, b.questions, strict=True):
            assert x.logprobs == pytest.approx(y.logprobs)
    assert again.model["label"] == "org/vicuna-7b"
