"""What is to be scored: names and files become workloads, before a model is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, listing
from llmkit.evaluation.benches import Bench, bench_names, load_bench
from llmkit.evaluation.csv_data import LocalData, find_data
from llmkit.evaluation.protocol import DEFAULT, Protocol, Workload, protocol_named
from llmkit.evaluation.protocols.lm_eval import family_of
from llmkit.evaluation.task_files import check_task_names


@dataclass(frozen=True)
class Prepared:
    """A benchmark whose subjects are chosen and whose local files are read."""

    protocol: Protocol
    work: Workload
    data: LocalData | None


@dataclass(frozen=True)
class Selection:
    """What of which benchmarks is wanted, and how it is put to the model.

    Attributes:
        bench: names (or one string with commas): mmlu, mmlu_pro, ceval, cmmlu, mini, or any of lm-eval's tasks and
            groups.
        data: a folder with the benchmarks' published CSV files, and with the data sets of lm-eval's tasks as the hub
            has them; None takes the hub's (mini has its own).
        split: the split to score (val, test, dev); None takes the one each benchmark is usually scored on.
        protocol: how questions are put and answers read: lm-eval, or another that the benchmarks have
            (`protocol.protocol_names`).
        shots: None takes each benchmark's usual number (5; mini 2) and each task's own.
        limit: only the first questions of each subject; below 1 a share of them.
        subjects: subjects, categories or subsets of the benchmarks; all when empty.
        max_length: the longest input in tokens; None takes the model's.
        chat_template: put prompts in the checkpoint's chat format (its template, or its family's), shots as turns;
            a string names another format, and "raw" none.
        submission: a file for the answers, in the form that the benchmark's leaderboard takes; the split may be
            without the right ones then, and the record is without scores.
        include: a folder with definitions of tasks besides lm-eval's own.
    """

    bench: str | Sequence[str]
    data: str | Path | None = None
    split: str | None = None
    protocol: str = DEFAULT
    shots: int | None = None
    limit: float | None = None
    subjects: Sequence[str] = ()
    max_length: int | None = None
    chat_template: bool | str = False
    submission: Path | None = None
    include: Path | None = None

    @property
    def chat(self) -> bool:
        """Whether prompts are in a chat format."""
        return bool(self.chat_template) and self.chat_template != "raw"

    @cached_property
    def names(self) -> list[str]:
        """Of benchmarks and tasks."""
        return list(self._protocols)

    @cached_property
    def _protocols(self) -> dict[str, str]:
        """Benchmark or task -> protocol; lm-eval's groups of a benchmark's subjects are that benchmark."""
        found: dict[str, str] = {}
        listed = self.bench.split(",") if isinstance(self.bench, str) else self.bench
        for given in filter(None, (name.strip() for name in listed)):
            name, protocol = given, self.protocol
            if given not in bench_names() and (family := family_of(given)) is not None:
                name, protocol = family
                if self.protocol not in (DEFAULT, protocol):
                    raise InputError(
                        f"--bench {given} is --bench {name} --protocol {protocol}, found --protocol {self.protocol}",
                        hint=f"--bench {name} --protocol {self.protocol}",
                    )
            if found.setdefault(name, protocol) != protocol:
                raise InputError(
                    f"--bench {self.bench} names {name} twice, with the protocols {found[name]} and {protocol}",
                    hint="score them in two runs; llmkit report takes both records",
                )
        return found

    @cached_property
    def tasks(self) -> list[str]:
        """Names that are none of the benchmarks: lm-eval's."""
        return [n for n in self.names if n not in bench_names()]

    def load_tasks(self) -> Any:
        """lm-eval's tasks, in the form that its `evaluate` takes; None where none is wanted.

        Raises:
            LlmkitError: see `tasks.load_lm_eval_tasks`.
        """
        if not self.tasks:
            return None
        from llmkit.evaluation.tasks import load_lm_eval_tasks

        return load_lm_eval_tasks(self.tasks, Path(self.data) if self.data is not None else None, self.include)

    def prepare(self) -> list[Prepared]:
        """The benchmarks, their local files read.

        Raises:
            InputError: unknown names, missing or malformed files, nothing to score.
        """
        names, tasks = self.names, self.tasks
        if not names:
            raise InputError("no benchmark named", hint=f"--bench {' or '.join(bench_names())}, or an lm-eval task")
        if self.limit is not None and not self.limit > 0:
            raise InputError(f"--limit {self.limit:g} leaves no question", hint="leave it out to score all of them")
        if self.limit is not None and self.limit > 1 and not float(self.limit).is_integer():
            raise InputError(
                f"--limit {self.limit:g} is no number of questions", hint=f"--limit {int(min(self.limit, 1000))}"
            )
        if self.subjects and len(names) > 1:
            raise InputError(f"--subjects is about one benchmark, found {', '.join(names)}", hint=f"--bench {names[0]}")
        of_benches = {"--split": self.split, "--protocol": self.protocol != DEFAULT, "--subjects": self.subjects}
        for option, value in of_benches.items():
            if value and tasks:
                raise InputError(
                    f"{option} is for {listing(bench_names())}; {tasks[0]} is a task of lm-eval with its own",
                    hint=f"leave {option} out, or score {tasks[0]} in a run of its own",
                )
        for option, folder in (("--include-path", self.include), ("--data", self.data if tasks else None)):
            if folder is not None and not Path(folder).is_dir():
                raise InputError(f"{option} {folder}: no such folder", hint=f"{option} FOLDER, or leave it out")
        check_task_names(tasks, self.include)
        benches = [load_bench(n) for n in names if n in bench_names()]
        benches = [b if self.split is None else b.of_split(self.split) for b in benches]
        protocols = [protocol_named(b, self._protocols[b.name]) for b in benches]
        return [self._prepare(bench, protocol) for bench, protocol in zip(benches, protocols, strict=True)]

    def _prepare(self, bench: Bench, protocol: Protocol) -> Prepared:
        usual = bench.shots if protocol.shots is None else protocol.shots
        shots = usual if self.shots is None else self.shots
        if shots and bench.split == bench.shots_split:
            raise InputError(
                f"{bench.title}: the {bench.split} split is scored, and the {shots} shots would come from it too",
                hint="add --shots 0",
            )
        # a benchmark with questions of its own takes them, unless --data can only be meant for it
        folder = bench.own_data if bench.own_data and (self.data is None or len(self.names) > 1) else self.data
        if folder is None:
            if not bench.subjects:
                raise InputError(f"{bench.title}: its questions are not installed", hint="give them: --data FOLDER")
            chosen = bench.select(self.subjects, [s.name for s in bench.subjects])
            return Prepared(protocol, Workload(bench, dict.fromkeys(chosen), shots, self.limit, self.chat), None)
        local = find_data(bench, folder)
        chosen = bench.select(self.subjects, local.subjects)
        docs = {s: local.read(s, shots=shots, needs_answers=self.submission is None) for s in chosen}
        return Prepared(protocol, Workload(bench, docs, shots, self.limit, self.chat), local)
