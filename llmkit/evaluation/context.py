"""Prompts that are longer than the model's context, found before anything is scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmkit.errors import listing
from llmkit.evaluation.planning import Prepared
from llmkit.evaluation.preview import PreviewEngine
from llmkit.evaluation.protocol import Protocol, Workload

if TYPE_CHECKING:
    from llmkit.evaluation.csv_forms import Doc
    from llmkit.evaluation.lm import SharedPrefixLM

_UNLIMITED = 1 << 40
_AROUND_NBYTES = 300  # of a question or a shot: labels of choices, the words before an answer, a turn of a chat


def long_prompts(prepared: Sequence[Prepared], lm: SharedPrefixLM) -> Iterator[str]:
    """A line for each benchmark of which prompts do not fit, with the number of shots that does.

    The longest question of each subject goes through the protocol, with no model behind it. Protocols that leave out
    shots by themselves are rarely named here. Data of the hub is not looked at.
    """
    for item in prepared:
        suspects = {s: d for s, d in item.work.docs.items() if d and _most(item.work, d) > lm.max_length}
        if not suspects:
            continue
        work = replace(item.work, docs={s: _longest(item.work, d) for s, d in suspects.items()}, limit=None)
        if not _truncated(item.protocol, work, lm, lm.max_length)[0]:
            continue
        needed = _truncated(item.protocol, work, lm, _UNLIMITED)[1]
        subjects = sorted((s for s, n in needed.items() if n > lm.max_length), key=lambda s: -needed[s])
        fewer = (k for k in reversed(range(work.shots)))
        fits = next(
            (k for k in fewer if not _truncated(item.protocol, replace(work, shots=k), lm, lm.max_length)[0]), None
        )
        yield (
            f"{work.bench.title}: prompts with {work.shots} shots need up to {max(needed.values())} tokens, the model "
            f"takes {lm.max_length}: they lose their beginning in {listing(subjects)}; "
            + ("even --shots 0 does not fit" if fits is None else f"--shots {fits} fits")
        )


def _truncated(protocol: Protocol, work: Workload, lm: SharedPrefixLM, max_length: int) -> tuple[int, dict[str, int]]:
    """How many prompts lose their beginning, and by subject how many tokens the longest needs."""
    engine = PreviewEngine()
    probe = lm.with_engine(engine, max_length)
    plan = protocol.plan(work)
    result, _ = plan.score(probe, list(plan.documents))
    needed = {s.name: max(engine.needs.get(q.prompt, 0) for q in s.questions) for s in result.subjects}
    return probe.n_truncated, needed


def _most(work: Workload, docs: Mapping[str, Sequence[Doc]]) -> int:
    """More bytes than a prompt of a subject has, and so more tokens."""
    shots = docs.get(work.bench.shots_split, ())[: work.shots]
    return sum(map(_nbytes, shots)) + max(map(_nbytes, docs[work.bench.split])) + 2 * _AROUND_NBYTES


def _nbytes(doc: Doc) -> int:
    return sum(len(str(value).encode()) for value in doc.values()) + _AROUND_NBYTES


def _longest(work: Workload, docs: Mapping[str, Sequence[Doc]]) -> dict[str, Sequence[Doc]]:
    return {**docs, work.bench.split: [max(docs[work.bench.split], key=_nbytes)]}
