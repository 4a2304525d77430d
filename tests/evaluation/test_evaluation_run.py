"""The whole run on a tiny model and local files, and the record it leaves."""

from __future__ import annotations

import csv
import json

import pytest

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.errors import InputError, OutputError
from llmkit.evaluation.benches import load_bench
from llmkit.evaluation.record import BenchResult, RunRecord, SubjectResult
from llmkit.evaluation.statistics import Mean
from tests.evaluation.running import evaluate

SUBJECTS = ("abstract_algebra", "virology", "law_school")  # the last one is no subject of MMLU


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, n in (("dev", 3), ("test", 7)):
        (root / split).mkdir()
        for subject in SUBJECTS:
            with (root / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(
                    [f"Which {subject} {i}?", "apple", f"0.{i}0", "None", "river", "ABCD"[(i * i + len(subject)) % 4]]
                    for i in range(n)
                )
    return root


@pytest.fixture(scope="module")
def record(tiny_llama, data):
    return evaluate(tiny_llama, "mmlu", data=data, shots=1, log_samples=True, batch_tokens=64)


def test_results_are_those_of_lm_evals_hf_backend(record, tiny_llama, data):
    """The same tasks through HFLM and lm-eval's evaluate: the same accuracies, choices and log-probabilities."""
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM

    from llmkit.evaluation.csv_data import find_data
    from llmkit.evaluation.tasks import bench_task, quiet_lm_eval, set_shots

    bench = load_bench("mmlu")
    found = find_data(bench, data)
    tasks = {f"mmlu_{s}": bench_task(bench, s, found.read(s, shots=1)) for s in found.subjects}
    for task in tasks.values():
        set_shots(task, 1)
    with quiet_lm_eval():
        theirs = lm_evaluate(HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32"), tasks)
    result = record.benches["mmlu"]
    assert [s.name for s in result.subjects] == ["abstract_algebra", "virology"]
    for subject in result.subjects:
        name = f"mmlu_{subject.name}"
        assert subject.acc.value == pytest.approx(theirs["results"][name]["acc,none"])
        assert subject.acc.stderr == pytest.approx(theirs["results"][name]["acc_stderr,none"])
        samples = sorted(theirs["samples"][name], key=lambda s: s["doc_id"])
        for ours, their in zip(record.samples[name], samples, strict=True):
            assert [r[0] for r in ours["responses"]] == pytest.approx([r[0] for r in their["filtered_resps"]], abs=1e-4)
            assert ours["prompt_sha256"] == their["prompt_hash"]
            assert ours["acc"] == their["acc"]


def test_the_record_says_what_was_scored_and_how(record, tmp_path):
    record.write(tmp_path / "run.json")
    body = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(record.to_json())) == body
    mmlu = body["benches"]["mmlu"]
    assert mmlu["shots"] == 1
    assert len(mmlu["missing"]) == 55
    assert mmlu["micro"]["n"] == 14
    assert mmlu["subjects"]["virology"]["category"] == "other"
    assert len(mmlu["subjects"]["virology"]["choices"]) == 7
    assert mmlu["categories"]["STEM"]["macro"]["value"] == mmlu["subjects"]["abstract_algebra"]["acc"]
    assert mmlu["tokens"]["tokens"] < mmlu["tokens"]["tokens_unshared"]
    assert body["scores"] == {"mmlu": mmlu["micro"]["value"]}
    assert set(body["continuations"]) == {" A", " B", " C", " D"}
    assert {"llmkit", "lm-eval", "transformers", "torch"} <= set(body["versions"])
    assert body["model"]["header_digest"] != body["model"]["source_digest"]
    assert any("lacks 55 of 57 subjects" in w for w in body["warnings"])
    assert any("law_school" in w for w in body["warnings"])
    assert body["samples"]["mmlu_virology"][1]["doc"]["choices"][1:3] == ["0.10", "None"]


def test_limit_subjects_and_several_batch_sizes_change_no_score(record, tiny_llama, data):
    some = evaluate(tiny_llama, ["mmlu"], data=data, shots=1, limit=4, subjects=["virology"], log_samples=True)
    (subject,) = some.benches["mmlu"].subjects
    whole = next(s for s in record.benches["mmlu"].subjects if s.name == "virology")
    assert [q.choice for q in subject.questions] == [q.choice for q in whole.questions[:4]]
    for a, b in zip(some.samples["mmlu_virology"], record.samples["mmlu_virology"], strict=False):
        assert [r[0] for r in a["responses"]] == pytest.approx([r[0] for r in b["responses"]], abs=1e-4)
    assert not any("lacks" in w for w in some.warnings)


def test_a_derived_checkpoint_brings_its_tokenizer_along(record, tiny_llama, data):
    ckpt = open_checkpoint(tiny_llama).derive(step={"transform": "nothing"})
    assert ckpt.origin is None
    ckpt = ckpt.derive(files={k: FileContent(data=v.read()) for k, v in ckpt.files.items()})
    again = evaluate(ckpt, "mmlu", data=data, shots=1)
    assert again.scores == record.scores
    assert again.model["history"] == [{"transform": "nothing"}]
    assert again.samples == {}


def test_prompts_that_do_not_fit_are_reported(tiny_llama, data):
    cut = evaluate(tiny_llama, "mmlu", data=data, shots=3, subjects=["virology"], max_length=40)
    assert cut.benches["mmlu"].n_truncated == 7
    assert any("7 prompts were longer than 40 tokens" in w for w in cut.warnings)


def test_a_chat_template_wraps_prompts_and_shots(tiny_llama, data, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_llama, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = evaluate(folder, "mmlu", data=data, shots=1, subjects=["virology"], limit=2, chat_template=True)
    assert set(chat.continuations) == {"A", "B", "C", "D"}  # lm-eval puts no space after a chat template


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bench": ""}, "no benchmark named"),
        ({"bench": "mmlu", "limit": 0}, "--limit 0 leaves no question"),
        ({"bench": "mmlu", "limit": 1.5}, "--limit 1.5 is no number of questions"),
        ({"bench": "piqa", "subjects": ["law"]}, "--subjects is for ceval, .*; piqa is a task of lm-eval"),
        ({"bench": " piqa", "data": "nosuch"}, "--data nosuch: no such folder"),
        ({"bench": "mmlu", "limit": float("inf")}, "--limit inf is no number of questions"),
        ({"bench": "mini,hellaswag", "subjects": ["x"]}, "about one benchmark"),
        ({"bench": "mmlu", "subjects": ["vriology"]}, "no subject or category 'vriology'"),
        ({"bench": "mmlu", "subjects": ["anatomy"]}, "anatomy: no data"),
        ({"bench": "mmlu", "shots": 9}, "3 rows, but 9 shots"),
        ({"bench": "ceval"}, "no C-Eval file"),
        ({"bench": "mmlu", "split": "dev"}, "the dev split is scored, and the 5 shots would come from it too"),
        ({"bench": "mmlu", "split": "validation"}, "MMLU has no validation split"),
        ({"bench": "mmlu", "split": "val"}, "MMLU is there, but not its val split; there is dev, test"),
        (
            {"bench": "mmlu,hellaswag", "split": "val"},
            "--split is for ceval, cmmlu, mini, mmlu, mmlu_pro; hellaswag is a task",
        ),
    ],
)
def test_mistakes_are_found_before_the_model_is_opened(data, options, message):
    options = {"data": data} | options
    with pytest.raises(InputError, match=message):
        evaluate("/nowhere", **options)


def test_a_labelled_split_of_another_name_is_scored(tiny_llama, data, tmp_path):
    """The same questions as test and as val have the same score."""
    import shutil

    for split in ("val", "dev"):
        (tmp_path / split).mkdir()
    for subject in SUBJECTS[:2]:
        shutil.copy(data / "test" / f"{subject}_test.csv", tmp_path / "val" / f"{subject}_val.csv")
        shutil.copy(data / "dev" / f"{subject}_dev.csv", tmp_path / "dev")
    usual = evaluate(tiny_llama, "mmlu", data=data, shots=1).benches["mmlu"]
    other = evaluate(tiny_llama, "mmlu", data=tmp_path, shots=1, split="val", log_samples=True)
    chosen = [[[q.choice for q in s.questions] for s in b.subjects] for b in (other.benches["mmlu"], usual)]
    assert chosen[0] == chosen[1]
    assert set(other.samples) == {"mmlu_abstract_algebra_val", "mmlu_virology_val"}
    assert other.settings["split"] == "val"
    dev = evaluate(tiny_llama, "mmlu", data=tmp_path, shots=0, split="dev", subjects=["virology"]).benches["mmlu"]
    assert [s.acc.n for s in dev.subjects] == [3]


def test_a_second_label_of_subjects_is_in_no_average():
    cmmlu = load_bench("cmmlu")
    names = ["chinese_history", "philosophy", "anatomy"]
    made = [
        SubjectResult(cmmlu.by_name[n], Mean(a, 0.1, 10), "", "") for n, a in zip(names, (1.0, 0.0, 0.5), strict=True)
    ]
    result = BenchResult(cmmlu, tuple(made), (), 5, 0, "1.0", "", 1.0, {})
    assert result.micro.value == result.macro.value == pytest.approx(0.5)
    assert result.micro.n == 30
    assert result.macro_categories.value == pytest.approx(0.5)
    assert list(result.categories) == ["STEM", "humanities"]
    assert result.subsets["China specific"][0].value == 1.0


def test_a_record_that_cannot_be_written(record, tmp_path):
    with pytest.raises(OutputError):
        record.write(tmp_path / "no" / "run.json")
    assert not list(tmp_path.glob("*.partial"))


def test_averages_of_categories_and_the_hard_subset():
    ceval = load_bench("ceval")

    def subject(name, value, n):
        s = ceval.by_name[name]
        return SubjectResult(s, Mean(value, 0.1, n))

    made = [subject("college_physics", 0.2, 10), subject("logic", 0.6, 30), subject("law", 0.3, 10)]
    result = BenchResult(ceval, tuple(made), (), 5, 0, "2.0", "", 1.0, {})
    assert result.categories["humanities"][0].value == pytest.approx((0.6 * 30 + 0.3 * 10) / 40)
    assert result.categories["humanities"][1].value == pytest.approx(0.45)
    assert result.macro_categories.value == pytest.approx((0.2 + 0.45) / 2)
    assert result.subsets["hard"][0].value == pytest.approx(0.2)
    assert result.subcategories == {}


def test_other_lm_eval_tasks_run_as_with_hflm(tiny_llama):
    """Rolling log-likelihoods and generation, through lm-eval's own metrics."""
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM

    from llmkit.evaluation.execution import run_tasks
    from llmkit.evaluation.runner import make_lm
    from llmkit.evaluation.tasks import LocalTask, quiet_lm_eval

    docs = {"test": [{"text": "Which of these is a fruit? " * n, "answer": "apple"} for n in (1, 3, 7)]}
    rolling = {
        "task": "rolling",
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    }
    spoken = {
        "task": "spoken",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "text",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }

    def tasks():
        made = {name: LocalTask(config, docs) for name, config in (("rolling", rolling), ("spoken", spoken))}
        return {"tasks": made}

    options = {"shots": None, "limit": None, "chat_template": False}
    scores, samples, _ = run_tasks(make_lm(open_checkpoint(tiny_llama)), tasks(), **options)
    with quiet_lm_eval():
        theirs = lm_evaluate(
            HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32"), tasks(), bootstrap_iters=0
        )
    for metric in ("word_perplexity,none", "bits_per_byte,none"):
        assert scores["rolling"][metric] == pytest.approx(theirs["results"]["rolling"][metric], rel=1e-4)
    assert scores["spoken"]["exact_match,none"] == theirs["results"]["spoken"]["exact_match,none"]
    assert [s["responses"] for s in samples["spoken"]] == [s["filtered_resps"] for s in theirs["samples"]["spoken"]]


def test_the_score_of_other_tasks_is_their_accuracy():
    def made(metrics):
        return RunRecord({}, {}, {}, "", 0.0, {}, {"t": metrics}, {}).scores

    assert made({"acc,none": 0.25, "acc_norm,none": 0.5, "version": "1"}) == {"t": 0.25}
    assert made({"exact_match,strict": 0.75}) == {"t": 0.75}
    assert made({"word_perplexity,none": 9.0}) == {}


# Accuracies are the model's own; what is held is agreement, over every kind of subject there is data for.
@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize(("bench", "pattern"), [("mmlu", "mmlu_"), ("ceval", "ceval-valid_"), ("cmmlu", "cmmlu_")])
def test_smollm2_scores_as_lm_evals_hf_backend_does(shared, shallow_smollm2, bench, pattern):
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM

    from llmkit.evaluation.csv_data import find_data
    from llmkit.evaluation.tasks import bench_task, quiet_lm_eval, set_shots

    subjects = {
        "mmlu": ["econometrics", "global_facts"],
        "ceval": ["high_school_physics"],
        "cmmlu": ["chinese_food_culture"],
    }[bench]
    known = load_bench(bench)
    found = find_data(known, shared / "data")
    ours = evaluate(shallow_smollm2, bench, data=shared / "data", limit=2, subjects=subjects, log_samples=True)
    tasks = {f"{pattern}{s}": bench_task(known, s, found.read(s, shots=5)) for s in subjects}
    for task in tasks.values():
        set_shots(task, 5)
    with quiet_lm_eval():
        theirs = lm_evaluate(HFLM(pretrained=str(shallow_smollm2), device="cpu", dtype="float32"), tasks, limit=2)
    for name in tasks:
        their = sorted(theirs["samples"][name], key=lambda s: s["doc_id"])
        for a, b in zip(ours.samples[name], their, strict=True):
            assert [r[0] for r in a["responses"]] == pytest.approx([r[0] for r in b["filtered_resps"]], abs=1e-4)
            assert a["acc"] == b["acc"]
