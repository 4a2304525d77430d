"""The forms that others read, held against their own packages where these are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec

import pytest
import report_world as world
import yaml

from llmkit.errors import InputError
from llmkit.evaluation.benches import load_bench
from llmkit.evaluation.formats.format import format_for, formats
from llmkit.evaluation.report_inputs import ReportInputs, TextScore
from llmkit.evaluation.statistics import Mean


@pytest.fixture(scope="module")
def record():
    return world.run(
        "org/vicuna-7b", world.mmlu(seed=3, only=25, n=12), world.ceval(seed=4, only=2, n=12), samples=True
    )


@pytest.fixture(scope="module")
def inputs(record):
    return ReportInputs((record,))


def test_each_is_one_module_that_registers_itself():
    assert set(formats()) == {"every-eval-ever", "html", "hub", "lm-eval", "markdown", "model-index", "record"}
    endings = [ending for each in formats().values() for ending in each.endings]
    assert len(endings) == len(set(endings))


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("eee")
    return format_for(out, "every-eval-ever").write(inputs, out)


def test_every_eval_ever_holds_together(record, written):
    """What the schemas cannot say: names, sums and references agree with each other and with the record."""
    import hashlib

    aggregates = [p for p in written if p.suffix == ".json"]
    assert [p.parts[-5:-1] for p in aggregates] == [("data", b, "org", "vicuna-7b") for b in ("mmlu", "ceval")]
    for path, bench in zip(aggregates, record.benches.values(), strict=True):
        body = json.loads(path.read_text(encoding="utf-8"))
        results = {r["evaluation_result_id"]: r for r in body["evaluation_results"]}
        assert len(results) == len(body["evaluation_results"])
        first = results[f"{bench.bench.name}:accuracy"]["score_details"]
        assert first["score"] == bench.micro.value
        assert first["uncertainty"]["num_samples"] == bench.micro.n
        detail = body["detailed_evaluation_results"]
        samples = path.with_name(path.stem + "_samples.jsonl")
        assert samples.as_posix().endswith(detail["file_path"])
        assert hashlib.sha256(samples.read_bytes()).hexdigest() == detail["checksum"]
        rows = [json.loads(line) for line in samples.read_bytes().splitlines()]
        assert len(rows) == detail["total_rows"] == bench.micro.n
        assert {row["evaluation_id"] for row in rows} == {body["evaluation_id"]}
        for subject in bench.subjects:
            name = f"{bench.bench.task_name(subject.name)}:accuracy"
            scores = [row["evaluation"]["score"] for row in rows if row["evaluation_result_id"] == name]
            assert sum(scores) / len(scores) == pytest.approx(results[name]["score_details"]["score"])


@pytest.mark.skipif(
    find_spec("every_eval_ever") is None, reason="every-eval-ever is not installed (it needs Python 3.12)"
)
def test_every_eval_ever_is_valid_by_its_own_validator(written):
    done = subprocess.run(
        [sys.executable, "-m", "every_eval_ever", "validate", "--format", "json", *map(str, written)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads(done.stdout)) == len(written)


def test_the_same_record_gives_the_same_files(inputs, written, tmp_path):
    again = format_for(tmp_path, "every-eval-ever").write(inputs, tmp_path)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in written]


def test_the_hub_reads_its_entries(record, inputs, tmp_path):
    parse = pytest.importorskip("huggingface_hub", minversion="1.3").parse_eval_result_entries
    paths = format_for(tmp_path, "hub").write(inputs, tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in paths] == [".eval_results/mmlu.yaml", ".eval_results/ceval.yaml"]
    for path, bench in zip(paths, record.benches.values(), strict=True):
        (entry,) = parse(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert (entry.dataset_id, entry.task_id) == (bench.bench.dataset, bench.bench.name)
        assert entry.value == pytest.approx(100 * bench.micro.value, abs=0.005)
        assert entry.date == "2026-11-29T12:00:00Z"
        assert {"5-shot", "float32", f"{bench.micro.n} questions"} <= set(entry.notes.split(", "))


def test_the_hub_shows_one_run_of_a_benchmark_that_it_has(record, tmp_path):
    hub = format_for(tmp_path, "hub")
    with pytest.raises(InputError, match="two of the runs are of MMLU"):
        hub.write(ReportInputs((record, record)), tmp_path)
    own = world.run("m", world.bench_result(replace(load_bench("mmlu"), name="own", dataset=""), only=1))
    with pytest.raises(InputError, match="no run of a benchmark that has a dataset"):
        hub.write(ReportInputs((own,)), tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_hub_reads_the_model_index(record, inputs, tmp_path):
    from huggingface_hub.repocard_data import model_index_to_eval_results

    (path,) = format_for(tmp_path, "model-index").write(inputs, tmp_path / "index.yaml")
    name, results = model_index_to_eval_results(yaml.safe_load(path.read_text(encoding="utf-8"))["model-index"])
    assert name == "org/vicuna-7b"
    found = {r.dataset_type: r.metric_value for r in results}
    assert found == {b.bench.dataset: pytest.approx(100 * b.micro.value, abs=0.005) for b in record.benches.values()}


class Cells(HTMLParser):
    """The text of a table's cells, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_markdown_table_is_read_as_one(record, tmp_path):
    """By Python-Markdown, which the documentation is made with; a name full of signs stays a name."""
    import markdown

    odd = replace(record, model={**record.model, "label": "a|b *c* <b>_d_</b> `e`"}, samples={})
    (path,) = format_for(tmp_path / "card.md", None).write(ReportInputs((record, odd)), tmp_path / "card.md")
    page = Cells()
    page.feed(markdown.markdown(path.read_text(encoding="utf-8"), extensions=["tables"]))
    assert page.rows[0] == ["", "org/vicuna-7b", "a|b *c* <b>_d_</b> `e`"]
    assert page.tags <= {"table", "thead", "tbody", "tr", "th", "td", "strong", "p"}
    assert {len(row) for row in page.rows} == {3}
    mmlu = record.benches["mmlu"].micro
    assert page.rows[1] == ["MMLU", *[f"{100 * mmlu.value:.1f} ± {100 * mmlu.stderr:.1f}"] * 2]
    assert [row[0] for row in page.rows[2:5]] == ["— mean of subjects", "— STEM", "— humanities"]


def test_formats_without_a_run_of_a_benchmark_say_so(tmp_path):
    text = TextScore({"label": "m"}, 9.5, 2.25, 0.1, 100, 1.0, {})
    for name in ("every-eval-ever", "hub", "lm-eval", "markdown", "model-index"):
        with pytest.raises(InputError):
            format_for(tmp_path, name).write(ReportInputs((), (text,)), tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_a_single_question_has_no_standard_error_anywhere(tmp_path):
    one = world.run("m", world.mmlu(seed=1, n=1, only=1))
    assert one.benches["mmlu"].micro == Mean(one.benches["mmlu"].micro.value, None, 1)
    for name in formats():
        for path in format_for(tmp_path, name).write(ReportInputs((one,)), tmp_path / name):
            text = path.read_text(encoding="utf-8")
            assert "NaN" not in text
            assert "None" not in text


def test_a_full_disk_leaves_no_file_that_speaks_of_others(inputs, tmp_path, monkeypatch):
    """What refers to the samples is written when they are there; here the disk takes three files."""
    import errno

    from llmkit.errors import OutputError
    from llmkit.pipeline import files

    written = []

    def write(path, data):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        path.write_bytes(data)

    monkeypatch.setattr(files, "write_synced", write)
    with pytest.raises(OutputError, match="No space left"):
        format_for(tmp_path, "lm-eval").write(inputs, tmp_path)
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert len(left) == 3
    assert all(name.startswith("samples_") for name in left)


def test_no_name_in_a_record_leads_out_of_the_folder(tmp_path):
    odd = "../../../x/..\0\ud800"
    first = world.mmlu(seed=1, only=1, n=2)
    subject = replace(first.subjects[0], subject=replace(first.subjects[0].subject, name=odd))
    result = replace(first, bench=replace(first.bench, name=odd, title=odd), subjects=(subject,))
    for label in (odd, "..", ".", "", "/etc"):
        run = world.run(label, result, samples=True)
        run = replace(run, samples={**run.samples, odd: next(iter(run.samples.values()))})
        for name in formats():
            out = tmp_path / "inside" / "out"
            out.mkdir(parents=True, exist_ok=True)
            path = out if not formats()[name].endings else out / f"file{formats()[name].endings[0]}"
            for file in format_for(path, name).write(ReportInputs((run,)), path):
                assert file.resolve().is_relative_to(out.resolve())
                assert file.is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["inside"]
    assert [p.name for p in (tmp_path / "inside").iterdir()] == ["out"]
