"""Parts of a run: the same cut everywhere, and records that make one run again or are refused."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from completions_server import Completions, serving
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import save_tiny_llama
from tiny_tokenizer import train_tokenizer

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import end_tokens, load_tokenizer
from llmkit.decoder import load_decoder
from llmkit.errors import InputError
from llmkit.evaluation.merging import merge_shards
from llmkit.evaluation.records import read_record
from llmkit.evaluation.shards import Shard, cut_questions, cut_units, read_shard, started_by
from tests.evaluation.running import evaluate

OPTIONS = {"shots": 1, "limit": 3}


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({"RANK": "1", "WORLD_SIZE": "3"}, "2/3"),  # torchrun, accelerate launch
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "1/2"),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, "4/4"),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "5"}, "3/5"),
        ({"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "4"}, "3/4"),
        (  # --array=0-6:2
            {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_STEP": "2"},
            "3/4",
        ),
        (  # an array of two jobs, two processes in each
            {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            "4/4",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, "1/2"),
    ],
)
def test_the_environment_says_which_part(environment, shard):
    assert str(read_shard("auto", environment)) == shard


@pytest.mark.parametrize(
    ("text", "message"),
    [("0/3", "no part"), ("4/3", "no part"), ("2", "no part"), ("a/b", "no part"), ("auto", "does not say which")],
)
def test_parts_that_cannot_be(text, message):
    with pytest.raises(InputError, match=message):
        read_shard(text, {"RANK": "1"})


def test_who_started_several_processes():
    assert started_by({"RANK": "0", "WORLD_SIZE": "2"}) == ("torchrun", 2)
    assert started_by({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert started_by({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None  # so says a batch script, too
    assert Shard(2, 3).path_beside(Path("a/run.json")) == Path("a/run.shard-2-of-3.json")


@given(st.dictionaries(st.integers(), st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 12))
def test_every_unit_is_in_one_part_and_no_part_is_much_heavier(costs, count):
    parts = cut_units(costs, count)
    assert sorted(u for part in parts for u in part) == sorted(costs)
    loads = [sum(costs[u] for u in part) for part in parts]
    assert max(loads) - min(loads) <= max(costs.values())


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 12))
def test_every_question_is_in_one_part(costs, count):
    parts = [cut_questions(costs, Shard(i + 1, count)) for i in range(count)]
    assert [i for part in parts for i in part] == list(range(len(costs)))


@pytest.fixture(scope="module")
def whole(tiny_llama):
    return evaluate(tiny_llama, "mini", **OPTIONS)


@pytest.fixture(scope="module")
def shards(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    paths = [folder / f"{i}.json" for i in (1, 2, 3)]
    for i, path in enumerate(paths):
        evaluate(tiny_llama, "mini", shard=Shard(i + 1, 3), **OPTIONS).write(path)
    return paths


def read(paths):
    return [(path.name, read_record(path)) for path in paths]


def figures(record):
    body = json.loads(json.dumps(record.to_json()))
    for place in (body, *body["benches"].values()):
        place.pop("elapsed_s")
    for bench in body["benches"].values():
        for count in ("tokens_unshared", "head_rows"):
            assert bench["tokens"][count]
        bench["tokens"].pop("forwards")
        for subject in bench["subjects"].values():  # one batch or another: the last bits
            subject["logprobs"] = [[round(x, 4) for x in row] for row in subject["logprobs"]]
            subject.pop("mass", None)
    return {k: v for k, v in body.items() if k != "created"}


def test_three_parts_make_the_record_of_the_whole(shards, whole):
    parts = read(shards)
    held = [s.name for _, r in parts for s in r.benches["mini"].subjects]
    assert sorted(held) == sorted(s.name for s in whole.benches["mini"].subjects)
    assert all(r.benches["mini"].subjects for _, r in parts)
    ((_, merged),) = merge_shards(parts[::-1])
    assert figures(merged) == figures(whole)
    assert not merged.shard


def test_runs_that_are_whole_already_stay_as_they_are(shards, whole):
    assert [name for name, _ in merge_shards([("a", whole), *read(shards), ("b", whole)])] == ["a", "1.json", "b"]
    twice = [(f"other-{n}", replace(r, model=r.model | {"content_digest": "f" * 64})) for n, r in read(shards)]
    assert len(merge_shards([*read(shards), *twice])) == 2


def changed(record, **shard):
    return replace(record, shard={**record.shard, **shard})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r[:2], "1 of 3 shards is missing: 3"),
        (lambda r: r[1:2], "2 of 3 shards are missing: 1, 3"),
        (lambda r: [*r[:2], ("all.json", replace(r[2][1], shard={}))], "missing: 3; all.json is of a whole run"),
        (lambda r: [*r, ("again.json", r[1][1])], "again.json and 2.json are both shard 2 of 3"),
        (
            lambda r: [*r[:2], ("3.json", replace(r[2][1], model=r[2][1].model | {"content_digest": "beef"}))],
            "3.json and 1.json are no shards of one run: model: content digest is beef",
        ),
        (
            lambda r: [*r[:2], ("3.json", replace(r[2][1], settings=r[2][1].settings | {"shots": 5}))],
            "setting: shots is 5 and 1",
        ),
        (lambda r: [*r[:2], ("3.json", changed(r[2][1], data="other"))], "no shards of one run: data is other"),
        (
            lambda r: [
                *r[:2],
                ("3.json", replace(r[2][1], benches={"mini": replace(r[2][1].benches["mini"], task_digest="x")})),
            ],
            "definition of mini is x",
        ),
        (
            lambda r: [
                *r[:2],
                ("3.json", replace(r[2][1], benches={"mini": replace(r[2][1].benches["mini"], subjects=())})),
            ],
            r"mini: \w+ is in no shard, expected in one",
        ),
        (
            lambda r: [*r[:2], ("3.json", replace(r[2][1], benches=r[1][1].benches))],
            r"mini: \w+ is in (no shard|2.json and 3.json), expected in one",
        ),
    ],
)
def test_records_that_make_no_run(shards, spoil, message):
    with pytest.raises(InputError, match=message):
        merge_shards(spoil(read(shards)))


def test_more_parts_than_subjects(tiny_llama, whole):
    n = len(whole.benches["mini"].subjects)
    with pytest.raises(InputError, match=f"{n} subjects stay whole") as caught:
        evaluate(tiny_llama, "mini", shard=Shard(1, n + 1), **OPTIONS)
    assert re.search(f"at most {n} shards", caught.value.hint)


DOCS = [{"text": f"Which of these is a fruit {i}? " * (1 + i % 3), "answer": "apple"[: 1 + i % 5]} for i in range(11)]
TASKS = {
    "chosen": {
        "output_type": "multiple_choice", "doc_to_text": "text", "doc_to_choice": ["apple", "river stone"],
        "doc_to_target": 0, "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "spoken": {
        "output_type": "generate_until", "doc_to_text": "text", "doc_to_target": "answer",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture
def tasks_at_hand(monkeypatch):
    """lm-eval's tasks of these names are these, in a group."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    from llmkit.evaluation import planning, tasks

    def load(names, data, include):
        made = {
            n: tasks.LocalTask(
                {"task": n, "test_split": "test", **TASKS[n]}, {"test": DOCS[: 7 if n == "chosen" else 11]}
            )
            for n in names
        }
        group = Group(
            "all", aggregate_metric_list=[AggMetricConfig(metric="acc"), AggMetricConfig(metric="exact_match")]
        )
        for task in made.values():
            group.add(task)
        return {"tasks": made, "groups": {"all": group}, "group_map": {"all": list(made)}}

    monkeypatch.setattr(planning, "check_task_names", lambda names, include: None)
    monkeypatch.setattr(tasks, "load_lm_eval_tasks", load)


@pytest.mark.parametrize(
    ("names", "count"), [("chosen,rolling,spoken", 2), ("chosen,rolling,spoken", 5), ("chosen", 3)]
)
def test_lm_evals_tasks_are_cut_by_task_or_by_question(tiny_llama, tasks_at_hand, tmp_path, names, count):
    whole = evaluate(tiny_llama, names, limit=9)
    paths = [tmp_path / f"{i}.json" for i in range(count)]
    for i, path in enumerate(paths):
        evaluate(tiny_llama, names, limit=9, shard=Shard(i + 1, count)).write(path)
    ((_, merged),) = merge_shards(read(paths))
    assert merged.tasks.keys() == whole.tasks.keys() == {*names.split(","), "all"}
    for name, wanted in whole.tasks.items():
        found = merged.tasks[name]
        numbers = [k for k, v in wanted.items() if isinstance(v, float)]
        assert numbers
        assert [found[k] for k in numbers] == pytest.approx([wanted[k] for k in numbers], rel=1e-5), name
        assert {k: v for k, v in found.items() if k not in numbers} == {
            k: wanted[k] for k in wanted.keys() - {*numbers}
        }


def test_a_task_with_a_function_of_its_own_is_not_cut_by_questions(tiny_llama, tasks_at_hand, monkeypatch):
    metric = {"metric": "exact_match", "aggregation": lambda items: sum(items), "higher_is_better": True}
    monkeypatch.setitem(TASKS, "spoken", TASKS["spoken"] | {"metric_list": [metric]})
    with pytest.raises(InputError, match="spoken is not cut by questions: it puts exact_match together by a") as caught:
        evaluate(tiny_llama, "spoken", shard=Shard(1, 2))
    assert caught.value.hint == "leave --shard out"
    with pytest.raises(InputError, match="is not cut by questions") as caught:
        evaluate(tiny_llama, "chosen,spoken", shard=Shard(1, 3))
    assert caught.value.hint == "at most 2 shards"


def places(body, *path):
    """The paths of all values in an object, two keys deep and below."""
    for key, value in body.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, *path, key)


def test_a_spoilt_shard_is_refused_and_no_bug(tiny_llama, tasks_at_hand, tmp_path):
    paths = [tmp_path / f"{i}.json" for i in range(5)]
    for i, path in enumerate(paths):
        evaluate(tiny_llama, "chosen,rolling,spoken", limit=9, shard=Shard(i + 1, 5)).write(path)
    others, spoilt = read(paths[1:]), tmp_path / "spoilt.json"
    text = paths[0].read_text()
    n_refused = 0
    for *inside, key in [p for p in places(json.loads(text)) if p[0] in ("shard", "tasks")]:
        for value in (None, [], "x", 7, {}):
            body = json.loads(text)
            place = body
            for name in inside:
                place = place[name]
            place[key] = value
            spoilt.write_text(json.dumps(body))
            try:
                merge_shards([("spoilt.json", read_record(spoilt)), *others])
            except InputError:
                n_refused += 1
    assert n_refused > 100


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """MMLU's and C-Eval's files, two subjects each."""
    root = tmp_path_factory.mktemp("published")
    for bench, subjects, splits in (
        ("mmlu", ("anatomy", "virology"), ("dev", "test")),
        ("ceval", ("law", "logic"), ("dev", "val")),
    ):
        for split in splits:
            (root / bench / split).mkdir(parents=True)
            for subject in subjects:
                rows = [[f"Which {subject} {i}?", "apple", f"0.{i}", "None", "river", "ABCD"[i % 4]] for i in range(5)]
                if bench == "ceval":
                    rows = [["id", "question", *"ABCD", "answer"], *([str(i), *row] for i, row in enumerate(rows))]
                with (root / bench / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                    csv.writer(file).writerows(rows)
    return root


def choices(record, bench):
    return {s.name: [(q.id, q.choice, q.prompt) for q in s.questions] for s in record.benches[bench].subjects}


@pytest.mark.parametrize(
    ("bench", "options"),
    [
        ("mmlu", {"protocol": "original", "shots": 2}),
        ("mmlu", {"protocol": "continuation", "shots": 0}),
        ("mmlu", {"protocol": "generative", "shots": 0, "limit": 2}),  # its answers are long
        ("mmlu", {"chat_template": "vicuna", "shots": 1}),
        ("ceval", {"protocol": "official", "shots": 1}),
    ],
)
def test_every_protocol_is_cut_up_and_served_alike(tiny_long, published, tmp_path, bench, options):
    options = {"data": published, **options}
    whole = evaluate(tiny_long, bench, **options)
    parts = [tmp_path / f"{i}.json" for i in (1, 2)]
    for i, path in enumerate(parts):
        evaluate(tiny_long, bench, shard=Shard(i + 1, 2), **options).write(path)
    ((_, merged),) = merge_shards(read(parts))
    ckpt = open_checkpoint(tiny_long)
    with serving(Completions(load_decoder(ckpt), load_tokenizer(ckpt), end_tokens(ckpt))) as url:
        served = evaluate(tiny_long, bench, backend="openai", url=url, max_length=600, **options)
    for by, again in (("shards", merged), ("a server", served)):
        assert choices(again, bench) == choices(whole, bench), by
        assert again.scores == whole.scores, by


@pytest.fixture(scope="module")
def tiny_long(tmp_path_factory):
    """The tiny model with room for a chat format and shots."""
    folder = tmp_path_factory.mktemp("long")
    save_tiny_llama(folder, max_length=700)
    train_tokenizer(folder)
    return folder
