"""The benchmarks that are known by name: their subjects, categories and subsets, read from `evalsets/`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, listing, suggestion


@dataclass(frozen=True, slots=True)
class Subject:
    """One subject of a benchmark.

    Attributes:
        name: as in file and task names (`abstract_algebra`).
        category: STEM, humanities, social sciences or other; empty where the benchmark has none.
        subcategory: the finer group (`math`); equal to the category where there is none.
        label: what the prompt calls it, where that is not the name (C-Eval's Chinese names).
    """

    name: str
    category: str = ""
    subcategory: str = ""
    label: str = ""


@dataclass(frozen=True)
class Bench:
    """A benchmark of multiple-choice subjects, each of which is one lm-eval task.

    Attributes:
        name: what `--bench` takes.
        title: what tables print.
        subjects: in published order of categories; empty when the data folder decides.
        subsets: further groups of subjects (`hard`).
        task: pattern of lm-eval's task names.
        definition: pattern of the task's YAML file below lm-eval's tasks folder.
        description: pattern of the prompt's header, where the YAML file has none.
        csv: the form of the CSV files (`llmkit.evaluation.csv_forms`).
        split, shots_split: the scored split, and the one the shots come from.
        shots: how many shots are usual.
        splits: the published ones (dev, val, test) -> their names on the hub.
        labelled: the split that is scored usually.
        dataset: its id on the hub; empty where it has none.
        submitted: the split whose answers a leaderboard takes; empty where there is none.
    """

    name: str
    title: str
    subjects: tuple[Subject, ...]
    subsets: Mapping[str, tuple[str, ...]]
    task: str
    definition: str
    description: str
    csv: str
    split: str
    shots_split: str
    shots: int
    splits: Mapping[str, str] = field(default_factory=dict)
    labelled: str = ""
    dataset: str = ""
    submitted: str = ""

    @cached_property
    def by_name(self) -> dict[str, Subject]:
        """Subjects by name."""
        return {s.name: s for s in self.subjects}

    @property
    def own_data(self) -> Path | None:
        """The folder of CSV files that ships with llmkit, if one does."""
        folder = Path(str(files("llmkit_evalsets"))) / self.name
        return folder if (folder / self.split).is_dir() else None

    def task_name(self, subject: str) -> str:
        """The name of a subject's lm-eval task; a split that is not scored usually is named in it."""
        name = self.task.format(subject=subject)
        return name if self.split == self.labelled else f"{name}_{self.split}"

    def of_split(self, split: str) -> Bench:
        """The benchmark with another scored split.

        Raises:
            InputError: it has no such split.
        """
        if split not in self.splits:
            raise InputError(f"{self.title} has no {split} split", hint=f"--split {' or '.join(self.splits)}")
        return replace(self, split=split)

    def categories(self, subjects: Iterable[str]) -> dict[str, list[str]]:
        """The given subjects by category, in published order; empty for a benchmark without categories."""
        return self._grouped(subjects, {s.name: s.category for s in self.subjects})

    def subcategories(self, subjects: Iterable[str]) -> dict[str, list[str]]:
        """The given subjects by subcategory, in published order; empty where they are the categories."""
        groups = {s.name: s.subcategory if s.subcategory != s.category else "" for s in self.subjects}
        return self._grouped(subjects, groups)

    def groups(self, subjects: Sequence[str]) -> dict[str, Sequence[str]]:
        """Subsets, subcategories and categories by name."""
        return {**self.subsets, **self.subcategories(subjects), **self.categories(subjects)}

    def _grouped(self, subjects: Iterable[str], group_of: Mapping[str, str]) -> dict[str, list[str]]:
        present = set(subjects)
        groups: dict[str, list[str]] = {}
        for name, group in group_of.items():
            if group and name in present:
                groups.setdefault(group, []).append(name)
        return groups

    def select(self, wanted: Sequence[str], available: Sequence[str]) -> list[str]:
        """The subjects that `--subjects` means: names of subjects, categories, subcategories or subsets.

        Args:
            wanted: what the user wrote; empty for all that are available.
            available: the subjects there is data for, in order.

        Raises:
            InputError: an unknown name, or a subject without data.
        """
        names = [s.name for s in self.subjects] or list(available)
        groups = {k.lower(): v for k, v in self.groups(names).items()}
        chosen: list[str] = []
        for word in wanted:
            if word in names:
                if word not in available:
                    raise InputError(
                        f"{self.title} subject {word}: no data for it; there is {listing(available)}",
                        hint="leave it out of --subjects, or add its files to the --data folder",
                    )
                chosen.append(word)
            elif word.lower() in groups:
                chosen += [s for s in groups[word.lower()] if s in available]
            else:
                raise InputError(
                    f"{self.title} has no subject or category {word!r}",
                    hint=suggestion(word, [*names, *groups], f"known: {listing([*groups, *names], 12)}", "--subjects "),
                )
        if wanted and not chosen:
            raise InputError(
                f"--subjects {','.join(wanted)}: no data for any of them; there is {listing(available)}",
                hint="add their files to the --data folder",
            )
        return [s for s in available if s in chosen] if wanted else list(available)


def bench_names() -> list[str]:
    """The benchmarks known by name."""
    folder = files("llmkit_evalsets")
    return sorted(p.name for p in folder.iterdir() if (p / "bench.json").is_file())


def load_bench(name: str) -> Bench:
    """A benchmark by name.

    Raises:
        InputError: no such benchmark (any other name is one of lm-eval's tasks; see `tasks.load_lm_eval_tasks`).
    """
    if name not in bench_names():
        raise InputError(
            f"no benchmark {name!r}; known are {', '.join(bench_names())}",
            hint=suggestion(name, bench_names(), "--bench mini needs no data of its own", "--bench "),
        )
    body: dict[str, Any] = json.loads((files("llmkit_evalsets") / name / "bench.json").read_text(encoding="utf-8"))
    labels: dict[str, str] = body.get("names", {})
    subjects = tuple(
        Subject(subject, category, subcategory, labels.get(subject, ""))
        for category, groups in body["categories"].items()
        for subcategory, members in groups.items()
        for subject in members
    )
    fields = {k: body[k] for k in ("title", "task", "definition", "csv", "split", "shots_split", "shots", "splits")}
    return Bench(
        name=name,
        subjects=subjects,
        subsets={k: tuple(v) for k, v in body.get("subsets", {}).items()},
        description=body.get("description", ""),
        labelled=body["split"],
        dataset=body.get("dataset", ""),
        submitted=body.get("submitted", ""),
        **fields,
    )
