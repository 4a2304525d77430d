"""The index of what is asked for against lm-eval's own index of everything."""

from __future__ import annotations

import lm_eval.tasks
import pytest
from lm_eval.tasks._index import TaskIndex

from llmkit.evaluation.task_index import task_manager

FILES = {
    "a/one.yaml": "task: z_one\ntag: [z_tag, z_other]\ninclude: base\n",
    "a/two.yaml": "include:\n  - base\n  - ../shared.yaml\ntask: 'z_two'\n",
    "a/base": "tag: z_based\ndataset_path: json\n",
    "b/again.yaml": "task: z_one\ntag: z_late\n",  # the first of a name counts, and its tags
    "b/quoted.yaml": "\"include\": '../a/named'\ntag: z_tag # more\n",
    "a/named": "task: z_named\n",
    "c/group.yaml": "group: z_group\ntask:\n- z_two\n- task: z_named\n  num_fewshot: 3\n- group: z_inner\n- z_tag\n",
    "c/inner.yaml": "group: z_inner\ntask: [{group: z_inline, task: [z_alone]}]\n",
    "c/alone.yaml": "task: z_alone\ninclude: [../a/base]\n",
    "c/broken.yaml": "task: z_broken\ninclude: nowhere\n",
    "shared.yaml": "task: z_shared\ntag: z_tag\n",
    "__pycache__/old.yaml": "task: z_old\n",
}
BELONG = {
    "z_one": {"z_one"},
    "z_tag": {"z_tag", "z_one", "z_two", "z_named", "z_shared"},
    "z_based": {"z_based", "z_alone"},
    "z_group": {"z_group", "z_two", "z_named", "z_inner", "z_alone", "z_tag", "z_one", "z_shared"},
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", [*BELONG, "z_late", "z_other", "z_named", "z_broken", "z_old", "z_none"])
def test_what_belongs_to_a_name_is_what_lm_evals_index_of_all_files_has(folder, name):
    whole = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False).task_index
    found = task_manager([name], folder).task_index
    for each in BELONG.get(name, {name}):
        assert found.get(each) == whole.get(each)
        assert (each in whole) == (name in BELONG or name in ("z_other", "z_named"))


def test_files_that_do_not_have_the_name_are_not_read_by_lm_eval(monkeypatch):
    listed = []
    process = TaskIndex.process_cfg
    monkeypatch.setattr(
        TaskIndex,
        "process_cfg",
        staticmethod(lambda cfg, path, index: (listed.append(path), process(cfg, path, index))),
    )
    manager = task_manager(["piqa"])
    assert manager.task_index["piqa"].yaml_path.parts[-2:] == ("piqa", "piqa.yaml")
    assert 0 < len(listed) < 1000  # of 14,000
