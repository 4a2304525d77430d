"""Benchmarks as lm-eval defines them: its task files, prompts, filters and metrics.

MMLU also in its two variants: `continuation` scores the choices' texts, which the prompt does not show, and
`generative` compares generated text with the letter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmkit.evaluation.benches import Bench, bench_names, load_bench
from llmkit.evaluation.protocol import (
    DEFAULT,
    Average,
    Plan,
    Protocol,
    Workload,
    protocol_named,
    protocol_names,
)


@dataclass(frozen=True)
class LmEval(Protocol):
    """One of lm-eval's families of tasks.

    Attributes:
        definition, task: as of `Bench`, where they are not the benchmark's own.
    """

    name: str
    definition: str = ""
    task: str = ""
    average: Average = "micro"  # its groups have weight_by_size

    def plan(self, work: Workload) -> Plan:
        """The tasks of all subjects."""
        from llmkit.evaluation.execution import run_bench
        from llmkit.evaluation.tasks import bench_task, documents_of, set_shots

        bench = replace(
            work.bench, definition=self.definition or work.bench.definition, task=self.task or work.bench.task
        )
        work = replace(work, bench=bench)
        tasks = {subject: bench_task(bench, subject, docs) for subject, docs in work.docs.items()}
        for task in tasks.values():
            set_shots(task, work.shots)
        documents = {subject: documents_of(task) for subject, task in tasks.items()}
        return Plan(documents, lambda lm, subjects: run_bench(lm, work, tasks, self, subjects))


PROTOCOL = LmEval(DEFAULT)
MMLU_CONTINUATION = LmEval("continuation", "mmlu/continuation/mmlu_{subject}.yaml", "mmlu_{subject}_continuation")
MMLU_GENERATIVE = LmEval("generative", "mmlu/generative/mmlu_{subject}.yaml", "mmlu_{subject}_generative")


def families() -> Iterator[tuple[Bench, LmEval]]:
    """The families of lm-eval's tasks that are a benchmark's subjects, the usual one of each benchmark first."""
    for bench in map(load_bench, bench_names()):
        for name in protocol_names(bench.name):
            protocol = protocol_named(bench, name)
            if isinstance(protocol, LmEval):
                yield replace(bench, task=protocol.task or bench.task), protocol


def family_of(group: str) -> tuple[str, str] | None:
    """The benchmark and the protocol that lm-eval's group of all subjects is (`mmlu_generative`); None for others."""
    for bench, protocol in families():
        if bench.dataset and bench.task.replace("_{subject}", "") == group:
            return bench.name, protocol.name
    return None
