"""lm-eval's tasks by their own definitions and names over data sets in a folder, against its `hf` backend."""

from __future__ import annotations

import json
import logging

import datasets
import lm_eval.tasks
import pytest
from small_tasks import KINDS, NAMES, THINGS

from llmkit.errors import InputError
from llmkit.evaluation.tasks import load_lm_eval_tasks, quiet_lm_eval
from tests.evaluation.running import evaluate

pytestmark = pytest.mark.slow
LIMIT = 3
N = 6  # documents of each split: GSM8K takes five examples
# task -> where its data set lies in the folder, in one of the forms that are read
PLACES = {
    "arc_easy": "ai2_arc/ARC-Easy",
    "hellaswag": "Rowan/hellaswag",
    "piqa": "piqa",
    "winogrande": "allenai/winogrande",
    "wikitext": "wikitext_document_level/wikitext-2-raw-v1",
    "gsm8k": "openai/gsm8k",
}


def _ifeval(i: int) -> dict:
    """An instruction in the form of google/IFEval, where arguments that are not given are null."""
    asked = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 5 + i}),
        ("change_case:english_lowercase", {}),
        ("keywords:letter_frequency", {"let_relation": "less than", "letter": "e", "let_frequency": 9}),
    ][i % 2 : 2 + i % 3]
    keys = {"relation": None, "num_words": None, "let_relation": None, "letter": None, "let_frequency": None}
    return {
        "key": i,
        "prompt": f"Write a line about {THINGS[i % 8]} and {NAMES[i % 8]}.",
        "instruction_id_list": [name for name, _ in asked],
        "kwargs": [keys | given for _, given in asked],
    }


def _write(folder, document, splits=("train", "validation", "test")):
    folder.mkdir(parents=True)
    for split in splits:
        rows = [json.dumps(document(i + 1000 * (split == "train"))) + "\n" for i in range(N)]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    for name, place in PLACES.items():
        _write(root / place, KINDS[name][1])
    # a configuration that the card describes, as on the hub
    for file in (root / "openai/gsm8k").glob("*.jsonl"):
        file.rename(file.with_suffix(".of-main.jsonl"))
    files = "".join(f"\n  - {{split: {s}, path: {s}.of-main.jsonl}}" for s in ("train", "test"))
    card = f"---\nconfigs:\n- config_name: main\n  data_files:{files}\n---\n"
    (root / "openai/gsm8k/README.md").write_text(card, encoding="utf-8")
    _write(root / "google/IFEval", _ifeval, ("train",))
    return root


def both(model, data, names, include=None):
    """Our record, and what lm-eval's `hf` backend says of the same tasks."""
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    record = evaluate(model, names, data=data, include=include, limit=LIMIT, log_samples=True)
    loaded = load_lm_eval_tasks(names, data, include)
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(seed=1234)
    with quiet_lm_eval():
        lm = HFLM(pretrained=str(model), device="cpu", dtype="float32")
        theirs = lm_evaluate(lm, loaded, limit=LIMIT, bootstrap_iters=0)
    for name in names:
        for ours, their in zip(record.samples[name], theirs["samples"][name], strict=True):
            assert ours["prompt_sha256"] == their["prompt_hash"]
            assert ours["doc"] == json.loads(json.dumps(their["doc"]))
    return record, theirs


def metrics(results):
    return {k: v for k, v in results.items() if isinstance(v, float) and "stderr" not in k}


def test_tasks_over_a_folder_of_data_sets_have_the_metrics_of_lm_evals_hf_backend(model, data):
    record, theirs = both(model, data, list(PLACES))
    for name in PLACES:
        wanted = metrics(theirs["results"][name])
        assert wanted
        assert metrics(record.tasks[name]) == pytest.approx(wanted, rel=1e-4)
    assert record.scores["gsm8k"] == theirs["results"]["gsm8k"]["exact_match,strict-match"]


def test_ifeval_by_its_own_definition_follows_the_instructions_that_lm_eval_counts(model, data, tmp_path):
    pytest.importorskip("langdetect", reason="IFEval needs langdetect and immutabledict")
    pytest.importorskip("immutabledict", reason="IFEval needs langdetect and immutabledict")
    definition = (
        "include: {}\ntask: ifeval_short\ngeneration_kwargs: {{until: [], do_sample: false, max_gen_toks: 24}}\n"
    )
    path = lm_eval.tasks.__path__[0] + "/ifeval/ifeval.yaml"
    (tmp_path / "short.yaml").write_text(definition.format(path), encoding="utf-8")
    record, theirs = both(model, data, ["ifeval_short"], tmp_path)
    wanted = metrics(theirs["results"]["ifeval_short"])
    assert set(wanted) == {
        f"{level}_{how}_acc,none" for level in ("prompt_level", "inst_level") for how in ("strict", "loose")
    }
    assert metrics(record.tasks["ifeval_short"]) == pytest.approx(wanted)
    assert len(set(wanted.values()) - {0.0, 1.0}) > 0
    for ours, their in zip(record.samples["ifeval_short"], theirs["samples"]["ifeval_short"], strict=True):
        assert ours["responses"] == their["filtered_resps"]
        assert ours["inst_level_loose_acc"] == their["inst_level_loose_acc"]
    assert record.scores == {"ifeval_short": wanted["prompt_level_strict_acc,none"]}


@pytest.mark.parametrize(
    ("break_it", "message", "hint"),
    [
        (lambda root: None, "has no data set baber/piqa; expected a folder baber/piqa or piqa in it", "hf download"),
        (lambda root: (root / "piqa").mkdir(), "piqa has no data of baber/piqa", "hf download baber/piqa"),
    ],
)
def test_a_folder_without_the_data_set_is_refused_by_name(tmp_path, break_it, message, hint):
    break_it(tmp_path)
    before = datasets.load_dataset
    with pytest.raises(InputError, match=message) as caught:
        load_lm_eval_tasks(["piqa"], tmp_path)
    assert hint in caught.value.hint
    assert datasets.load_dataset is before


def test_fewer_examples_than_shots_are_refused_with_the_number_there_is(model, data):
    with pytest.raises(InputError, match="gsm8k: 9 shots, but its data have 6 examples for them") as caught:
        evaluate(model, "gsm8k", data=data, shots=9)
    assert caught.value.hint == "--shots 6"
