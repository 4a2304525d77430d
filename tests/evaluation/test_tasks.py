"""Prompts are lm-eval's own, byte for byte."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.api.task import ConfigurableTask

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import InputError
from llmkit.evaluation.benches import load_bench
from llmkit.evaluation.csv_data import find_data
from llmkit.evaluation.execution import run_tasks
from llmkit.evaluation.runner import make_lm
from llmkit.evaluation.tasks import bench_task, load_lm_eval_tasks, quiet_lm_eval, set_shots

MMLU = {
    "dev": [(f" shot {i}? ", "0.50", "None", f"c{i}", 'say "d"', "ABCDA"[i]) for i in range(5)],
    "test": [
        ("first, with\na line break", "1e3", " two", "three ", "4", "D"),
        ("second", "N/A", "nan", "TRUE", "007", "B"),
    ],
}
CEVAL = {
    "dev": [(str(i), f"题{i}", "甲", "0.50", "None", "丁", "ABCDA"[i], "理由") for i in range(5)],
    "val": [("0", " 下列关于____。", "1", "2.0", "三", "四", "C"), ("1", "第二", "a", "b", "c", "d", "A")],
}


CMMLU = {
    "dev": [(str(i), f"题{i} ", "甲", "0.50", "None", "丁", "ABCDA"[i]) for i in range(5)],
    "test": [("0", " 下列 ", "1", "2.0", "三", "四", "C"), ("1", "第二", "a", "b", "c", "d", "A")],
}


@pytest.fixture
def data(tmp_path):
    for split, rows in MMLU.items():
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        with (tmp_path / "mmlu" / split / f"abstract_algebra_{split}.csv").open("w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows(rows)
    for split, rows in CEVAL.items():
        (tmp_path / "ceval" / split).mkdir(parents=True)
        header = ["id", "question", "A", "B", "C", "D", "answer", "explanation"][: len(rows[0])]
        with (tmp_path / "ceval" / split / f"law_{split}.csv").open("w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([header, *rows])
    for split, rows in CMMLU.items():
        (tmp_path / "cmmlu" / split).mkdir(parents=True)
        with (tmp_path / "cmmlu" / split / "logical.csv").open("w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([["", "Question", "A", "B", "C", "D", "Answer"], *rows])
    return tmp_path


def built(task, shots):
    set_shots(task, shots)
    with quiet_lm_eval():
        task.build_all_requests()
    return [instance.args for instance in task.instances]


def theirs(monkeypatch, name, splits):
    """lm-eval's own task by name, its hub data replaced by rows that we hand to `datasets`."""
    from pathlib import Path

    import datasets
    from lm_eval.tasks import __file__ as tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    made = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: made)
    config = load_yaml(Path(tasks).parent / name, resolve_func=True)
    config.pop("tag", None)
    return ConfigurableTask(config=config)


@pytest.mark.parametrize("shots", [0, 2, 5])
def test_mmlu_prompts_are_lm_evals(monkeypatch, data, shots):
    bench = load_bench("mmlu")
    ours = bench_task(bench, "abstract_algebra", find_data(bench, data).read("abstract_algebra", shots=shots))
    splits = {
        split: [
            {"question": q, "subject": "abstract_algebra", "choices": [a, b, c, d], "answer": "ABCD".index(answer)}
            for q, a, b, c, d, answer in rows
        ]
        for split, rows in MMLU.items()
    }
    their = theirs(monkeypatch, "mmlu/default/mmlu_abstract_algebra.yaml", splits)
    their.set_config("num_fewshot", shots)
    their.set_fewshot_seed(1234)
    their.build_all_requests()
    assert built(ours, shots) == [i.args for i in their.instances]
    first = ours.instances[0].args[0]
    assert first.startswith("The following are multiple choice questions (with answers) about abstract algebra.\n\n")
    assert first.endswith("first, with\na line break\nA. 1e3\nB.  two\nC. three \nD. 4\nAnswer:")
    assert ours.instances[0].args[1] == " A"


@pytest.mark.parametrize("shots", [0, 5])
def test_ceval_prompts_are_lm_evals(monkeypatch, data, shots):
    bench = load_bench("ceval")
    ours = bench_task(bench, "law", find_data(bench, data).read("law", shots=shots))
    names = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    splits = {
        split: [dict.fromkeys(names, "") | dict(zip(names, row, strict=False)) for row in rows]
        for split, rows in CEVAL.items()
    }
    their = theirs(monkeypatch, "ceval/ceval-valid_law.yaml", splits)
    their.set_config("num_fewshot", shots)
    their.set_fewshot_seed(1234)
    their.build_all_requests()
    assert built(ours, shots) == [i.args for i in their.instances]
    assert ours.instances[0].args[0].endswith("下列关于____。\nA. 1\nB. 2.0\nC. 三\nD. 四\n答案：")
    assert [task_metric["metric"] for task_metric in ours.config.metric_list] == ["acc", "acc_norm"]


@pytest.mark.parametrize("shots", [0, 5])
def test_cmmlu_prompts_are_lm_evals(monkeypatch, data, shots):
    bench = load_bench("cmmlu")
    ours = bench_task(bench, "logical", find_data(bench, data).read("logical", shots=shots))
    names = ["Question", "A", "B", "C", "D", "Answer"]
    splits = {split: [dict(zip(names, row[1:], strict=True)) for row in rows] for split, rows in CMMLU.items()}
    their = theirs(monkeypatch, "cmmlu/cmmlu_logical.yaml", splits)
    their.set_config("num_fewshot", shots)
    their.set_fewshot_seed(1234)
    their.build_all_requests()
    assert built(ours, shots) == [i.args for i in their.instances]
    assert ours.instances[0].args[0].startswith("以下是关于逻辑学的单项选择题，请直接给出正确答案的选项。\n\n")


@pytest.mark.parametrize(("name", "subject", "split"), [("mmlu", "abstract_algebra", "dev"), ("ceval", "law", "dev")])
def test_another_split_has_the_same_template(data, name, subject, split):
    bench = load_bench(name).of_split(split)
    task = bench_task(bench, subject, find_data(bench, data).read(subject, shots=0))
    assert task.config.task == f"{load_bench(name).task_name(subject)}_{split}"
    usual = load_bench(name)
    docs = find_data(usual, data).read(subject, shots=0)
    assert built(task, 0) == built(bench_task(usual, subject, {usual.split: docs["dev"]}), 0)


def test_mini_uses_mmlus_template_with_its_own_header(data):
    bench = load_bench("mini")
    found = find_data(bench, data / "mmlu")
    assert found.subjects == ("abstract_algebra",)
    task = bench_task(bench, "abstract_algebra", found.read("abstract_algebra", shots=2))
    ours = built(task, 2)
    same = bench_task(load_bench("mmlu"), "abstract_algebra", found.read("abstract_algebra", shots=2))
    assert ours == built(same, 2)
    assert task.config.task == "mini_abstract_algebra"


# sha256 over all prompts (context and the four continuations, each ended by \0) of a subject, 5-shot
PROMPTS = {
    ("ceval", "accountant"): "46cd0d7b1a4a0d1473e3c09fe890157f2270f0d23a11f7f35fe18ba6c39946b8",
    ("ceval", "basic_medicine"): "2568baf374ebfc268aa7d5d5515b624e63a038296817096abd9d28ebe9decedd",
    ("ceval", "chinese_language_and_literature"): "dfb236b2aafb1b903c41d953a093777179779f01cc0fc1caf24fb02442146e49",
    ("ceval", "civil_servant"): "f2356b68a2e932bb2baf64035ac7cae9fe3dd5a426c8b346fcc9959c781af99a",
    ("ceval", "computer_network"): "79edd9025430742455889149f62aad9c338ccdb34cb89a343993888681a1ef89",
    ("ceval", "discrete_mathematics"): "be7f77e2050d1b8c4f7eda04028915e6b96b683c0f72b9a4f602f4403601d08d",
    ("ceval", "education_science"): "21b0cb1b0906e0932578d727d22416f9e3234491d2169d11e818f2046b4e28c7",
    ("ceval", "high_school_physics"): "56e7b8e0ebb70aea619e9eb83ecbb2036fe99c3abec73df9fc07c1713bb7504e",
    ("ceval", "law"): "2b3bb0dde3cf0fcc06dea604511838b6261a28ab60d8a71a296e0629a278235e",
    ("ceval", "marxism"): "240e103fc2919546e26c190db48c0671d58a967ecd1a6e5827a911c0c016af56",
    ("cmmlu", "agronomy"): "f2f4a4e531228f654164f5a9e410a1b4eb94bd6bcdaa0fb67ab5accc80c51a0d",
    ("cmmlu", "anatomy"): "a45feca344bef40f4fded9afc40cebaf2bd34c71ceb7da2f3a4ca49c81dc24ff",
    ("cmmlu", "chinese_driving_rule"): "dc9ef6af0b753d4b2fd671a7cd77c190f37586cd37f0233c9c3c5c7ed594b477",
    ("cmmlu", "chinese_food_culture"): "928dd02ed01b49f30ecb84a78dab022753ceabe7463ab3bb73f17c76e22a580f",
    ("cmmlu", "college_mathematics"): "9df9e36fb704a6cf7fa2f9249781232297e96e47d16daae66ba1e10b76537de6",
    ("cmmlu", "conceptual_physics"): "043d1c4adc3c671c9fec342a75b858c3337d684a61389d6a6048080f3e0a94be",
    ("cmmlu", "high_school_politics"): "cb58bb1773f1a9ba31c36efcd72e0511c7cbd75a99460d7031bf25446f26958c",
    ("cmmlu", "logical"): "88deeb92b9bb787f2e8b979c3e3e67ddcdd94e3aa1e7eb5aaaa51e1688579580",
    ("cmmlu", "marketing"): "0f1e9c58ef6de0bd23b99b36579893e176e7e17134c98b3ad98b2b126feab9de",
    ("cmmlu", "virology"): "f9f483b32ef7d0406a1833a7d871048d3331e7a9b4d3cd37003c6d925eca7961",
    ("mmlu", "abstract_algebra"): "3692c2b7755f472d0bf75d4fe5573259fbe181ab1181a21df69967fb122b1a3b",
    ("mmlu", "anatomy"): "80f8955f0e2f80cd347d2539b4bb39dada349f20e83d51b6a92a459a0f338985",
    ("mmlu", "computer_security"): "a9d245f85acb8cc7996261703c43196a661dbaa3b95d3b0ba9c135a7dfa3db25",
    ("mmlu", "econometrics"): "4c8c90cbb806f511629a32cf3ace7d3a1a6725396f53d137f30ede0351167423",
    ("mmlu", "electrical_engineering"): "1f4ac162301bbd7b46a0f1f31609cd35ac9fcd47bba7a8a6ea7158473d22de9f",
    ("mmlu", "formal_logic"): "2570eb8d05c30788bc08d9dae52fa1afd1b47fa2df4581dc5b538bece17824da",
    ("mmlu", "global_facts"): "4a38ec34a110f85c2fb1fa101eaebe01bfc7134441774526f23710a527954e28",
    ("mmlu", "high_school_us_history"): "ef719f3aaf3df7c2be5432d5e952ecbb70ac460524384b457065f1df7c741738",
    ("mmlu", "marketing"): "b1ed22a89f6bb8ed9bcae7df6155a4bf5ba843bd4e26679146011e7e281fd331",
    ("mmlu", "philosophy"): "2d13db33b172d8c13cea0c3adc060f3a65af4b7c7f37c17e22743afc04281e84",
    ("mmlu", "sociology"): "151cb5f672ff1af87f62cc6f5794433955993da094457e8bc45f5d24bf1b0c2d",
    ("mmlu", "us_foreign_policy"): "5bb341250bbd341738e008bc07344209caee4eb1bb63d3f0f4117021af7df5e5",
}


@pytest.mark.shared
@pytest.mark.parametrize(("name", "subject"), sorted(PROMPTS))
def test_prompts_of_the_shared_subjects_stay_what_they_were(shared, name, subject):
    bench = load_bench(name)
    docs = find_data(bench, shared / "data").read(subject, shots=5)
    digest = hashlib.sha256()
    for context, continuation in built(bench_task(bench, subject, docs), 5):
        digest.update(context.encode() + b"\0" + continuation.encode() + b"\0")
    assert digest.hexdigest() == PROMPTS[name, subject]


def test_shots_follow_lm_evals_rules():
    class Task:
        def __init__(self, fixed):
            self.config = {"num_fewshot": fixed}

        def get_config(self, key):
            return self.config[key]

        def set_config(self, key, value):
            self.config[key] = value

        def set_fewshot_seed(self, seed):
            self.seed = seed

    for fixed, asked, wanted in [(None, None, 0), (None, 3, 3), (0, 3, 0), (4, None, 4), (4, 1, 1)]:
        task = Task(fixed)
        set_shots(task, asked)
        assert (task.config["num_fewshot"], task.seed) == (wanted, 1234)


def test_lean_leaves_lm_eval_as_it_was():
    import lm_eval.api.task
    import lm_eval.utils

    before = (lm_eval.api.task.tqdm, lm_eval.utils.apply_template)
    with quiet_lm_eval():
        assert lm_eval.utils.apply_template("{{a}}-{{b|upper}}\n", {"a": 1, "b": "x"}) == "1-X\n"
        assert before != (lm_eval.api.task.tqdm, lm_eval.utils.apply_template)
    assert before == (lm_eval.api.task.tqdm, lm_eval.utils.apply_template)


def test_without_data_and_network_the_hint_is_data(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match="the hub did not give cais/mmlu") as caught:
        bench_task(load_bench("mmlu"), "anatomy", None)
    assert "--data" in caught.value.hint


@pytest.mark.slow
def test_an_unknown_task_has_a_nearest_name(monkeypatch):
    folder = Path(lm_eval.tasks.__file__).parent / "hellaswag"  # of its 14,000 files a few
    few = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path: few)
    with pytest.raises(InputError) as caught:
        load_lm_eval_tasks(["hellaswagg"])
    assert caught.value.hint == "did you mean --bench hellaswag?"


DEFINITION = """task: my_own_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: [a, b]
doc_to_target: a
"""


@pytest.mark.parametrize(
    ("old", "new", "data", "words"),
    [
        ("task: my", "include: absent.yaml\ntask: my", "", ("mine.yaml is no definition", "absent.yaml")),
        ("task: my", "include: mine.yaml\ntask: my", "", ("mine.yaml is no definition", "cycle")),
        ("[a, b]", "[a, b", "", ("mine.yaml is no definition", "ParserError")),
        ("{{q}}", "{{q", '{"q": "x", "a": 0}', ("TemplateSyntaxError", "see its definition", "mine.yaml")),
        ("", "", '{"q": "x", "a": 0', ("ArrowInvalid", "see its definition", "mine.yaml")),
        ("", "", None, ("FileNotFoundError", "data.jsonl", "see its definition", "mine.yaml")),
    ],
)
def test_a_definition_of_ones_own_that_fails_is_named(tmp_path, old, new, data, words):
    if data is not None:
        (tmp_path / "data.jsonl").write_text(data)
    text = DEFINITION.format(data=tmp_path / "data.jsonl")
    assert old in text
    (tmp_path / "mine.yaml").write_text(text.replace(old, new, 1) if old else text)
    with pytest.raises(InputError) as caught:
        load_lm_eval_tasks(["my_own_task"], None, tmp_path)
    said = f"{caught.value} {caught.value.hint}"
    assert [word for word in words if word not in said] == []
    assert "network" not in said


FUNCTION = "import sys\ndef text(doc):\n    return doc['q'] if doc['a'] == 0 else {}\n"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("1 / 0", ["ZeroDivisionError: division by zero", "utils.py, line 3"]),
        ("doc['absent']", ["KeyError: 'absent'", "utils.py, line 3"]),
        ("sys.exit(0)", ["SystemExit: 0", "utils.py, line 3"]),
        ("int('x')", ["ValueError: invalid literal", "utils.py, line 3"]),
    ],
)
def test_a_function_of_ones_own_that_fails_at_a_question_is_named(tmp_path, tiny_llama, body, words):
    rows = [{"q": "x", "a": 0}, {"q": "y", "a": 1}]  # lm-eval itself tries the first
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "utils.py").write_text(FUNCTION.format(body))
    text = DEFINITION.format(data=tmp_path / "data.jsonl").replace('"{{q}}"', "!function utils.text")
    (tmp_path / "mine.yaml").write_text(text)
    loaded = load_lm_eval_tasks(["my_own_task"], None, tmp_path)
    with pytest.raises(InputError, match="lm-eval could not score my_own_task") as caught:
        run_tasks(make_lm(open_checkpoint(tiny_llama)), loaded, shots=0, limit=None, chat_template=False)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("returned", "words"), [("{}", "returned no metric"), ("{'told': False}", ""), ("None", "AttributeError")]
)
def test_a_task_of_ones_own_without_a_metric_is_named(tmp_path, tiny_llama, returned, words):
    (tmp_path / "data.jsonl").write_text('{"q": "x", "a": 0}\n')
    (tmp_path / "utils.py").write_text(f"def results(doc, found):\n    return {returned}\n")
    text = DEFINITION.format(data=tmp_path / "data.jsonl") + "process_results: !function utils.results\n"
    (tmp_path / "mine.yaml").write_text(text)
    loaded = load_lm_eval_tasks(["my_own_task"], None, tmp_path)
    lm = make_lm(open_checkpoint(tiny_llama))
    if not words:  # lm-eval takes the mean of any number
        assert run_tasks(lm, loaded, shots=0, limit=None, chat_template=False)[0]["my_own_task"]["told,none"] == 0
        return
    with pytest.raises(InputError, match=f"my_own_task.*{words}"):
        run_tasks(lm, loaded, shots=0, limit=None, chat_template=False)


@pytest.mark.parametrize(
    ("module", "words"),
    [(None, "!function NAME.FUNCTION is of NAME.py"), ("import sys\nsys.exit(0)\n", "SystemExit")],
)
def test_a_module_of_ones_own_that_is_missing_or_ends_the_program_is_named(tmp_path, module, words):
    (tmp_path / "data.jsonl").write_text('{"q": "x", "a": 0}\n')
    if module is not None:
        (tmp_path / "utils.py").write_text(module)
    text = DEFINITION.format(data=tmp_path / "data.jsonl").replace('"{{q}}"', "!function utils.text")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match="lm-eval could not load my_own_task") as caught:
        load_lm_eval_tasks(["my_own_task"], None, tmp_path)
    assert words in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    ("members", "message", "hint"),
    [
        ("[my_own_task, my_own_taks]", "the group my_group has 'my_own_taks', which is no task", "mean my_own_task?"),
        ("[my_own_task, my_group]", "the group my_group has my_group, which it is in itself", ""),
        ("[other_group]", "the group other_group has my_group, which it is in itself", ""),
        ("[{group: inner, task: [my_own_task, my_own_taks]}]", "has 'my_own_taks', which is no task", "my_own_task?"),
        ("[{group: a, task: [{group: b, task: [zzzzqqqq]}]}]", "my_group has 'zzzzqqqq', which is no task", "correct"),
        ("[{task: zzzzqqqq, num_fewshot: 1}]", "my_group has 'zzzzqqqq', which is no task", "correct the name"),
        ("[{num_fewshot: 1}]", "my_group has .*num_fewshot.*, which names no task", "task: NAME"),
        ("[1]", "my_group has '1', which names no task", "name one"),
        ("[null]", "my_group has 'None', which names no task", "name one"),
    ],
)  # fmt: skip
def test_a_group_of_ones_own_with_a_wrong_member_is_named(tmp_path, members, message, hint):
    (tmp_path / "mine.yaml").write_text(DEFINITION.format(data=tmp_path / "data.jsonl"))
    (tmp_path / "group.yaml").write_text(f"group: my_group\ntask: {members}\n")
    (tmp_path / "other.yaml").write_text("group: other_group\ntask: [my_group]\n")
    with pytest.raises(InputError, match=message) as error:
        load_lm_eval_tasks(["my_group"], None, tmp_path)
    assert hint in (error.value.hint or "")


def test_a_group_without_a_task_scores_nothing(tiny_llama):
    with pytest.raises(InputError, match="nothing to score"):
        run_tasks(make_lm(open_checkpoint(tiny_llama)), {"tasks": {}}, shots=0, limit=None, chat_template=False)


def test_an_error_of_llmkits_own_model_side_is_not_laid_to_the_definition(tmp_path, tiny_llama, monkeypatch):
    (tmp_path / "data.jsonl").write_text('{"q": "x", "a": 0}\n')
    (tmp_path / "mine.yaml").write_text(DEFINITION.format(data=tmp_path / "data.jsonl"))
    lm = make_lm(open_checkpoint(tiny_llama))
    monkeypatch.setattr(type(lm.scorer), "score", lambda *args, **more: 1 / 0)
    loaded = load_lm_eval_tasks(["my_own_task"], None, tmp_path)
    with pytest.raises(ZeroDivisionError):
        run_tasks(lm, loaded, shots=0, limit=None, chat_template=False)
