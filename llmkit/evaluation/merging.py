"""Records of shards, put together into the record of one run.

Averages are made of the questions themselves, or of each metric's values by lm-eval's own functions, so that they are
those of a run that was never cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.errors import InputError, listing
from llmkit.evaluation.record import BenchResult, RunRecord

_MODEL = ("content_digest", "header_digest", "tokenizer_digest", "dtype", "backend", "served_model")
_PLACES = {"data", "include_path", "shard"}  # settings that differ from machine to machine


def merge_shards(records: Sequence[tuple[str, RunRecord]]) -> list[tuple[str, RunRecord]]:
    """Records with every shard replaced by the run that it is part of, at the place of the first of its shards.

    Args:
        records: what each is called in messages, and the record.

    Raises:
        InputError: shards are of different models, settings, data or software, one is there twice, or one is missing.
    """
    whole = [name for name, record in records if not record.shard]
    runs: dict[str, list[tuple[str, RunRecord]]] = {}
    merged: list[tuple[str, list[tuple[str, RunRecord]]]] = []
    for name, record in records:
        if not record.shard:
            merged.append((name, [(name, record)]))
            continue
        some = runs.setdefault(repr(_identity(record)), [])
        if not some:
            merged.append((name, some))
        some.append((name, record))
    if any(not _is_whole(some) for some in runs.values()):
        _refuse([(name, record) for name, record in records if record.shard], whole)
    return [(name, _merged(some) if some[0][1].shard else some[0][1]) for name, some in merged]


def _identity(record: RunRecord) -> dict[str, Any]:
    """What shards of one run have in common."""
    found: dict[str, Any] = {f"model: {key}": record.model.get(key) for key in _MODEL}
    found |= {f"setting: {k}": v for k, v in record.settings.items() if k not in _PLACES}
    found |= {f"version of {k}": v for k, v in record.versions.items()}
    found |= {k: record.shard.get(k) for k in ("count", "data", "benches", "tasks")}
    found |= {f"definition of {k}": b.task_digest for k, b in record.benches.items()}
    return found


def _is_whole(some: Sequence[tuple[str, RunRecord]]) -> bool:
    return sorted(r.shard["index"] for _, r in some) == list(range(1, some[0][1].shard["count"] + 1))


def _refuse(shards: Sequence[tuple[str, RunRecord]], whole: Sequence[str]) -> None:
    first_name, first = shards[0]
    wanted = _identity(first)
    for name, record in shards[1:]:
        found = _identity(record)
        for key in wanted.keys() & found.keys():
            if wanted[key] != found[key]:
                shown = [f"{str(x)[:16]}" for x in (found[key], wanted[key])]
                raise InputError(
                    f"{name} and {first_name} are no shards of one run: {key.replace('_', ' ')} is {shown[0]} "
                    f"and {shown[1]}",
                    hint="report the shards of one run at a time",
                )
    by_index: dict[int, str] = {}
    for name, record in shards:
        index = record.shard["index"]
        if index in by_index:
            raise InputError(
                f"{name} and {by_index[index]} are both shard {index} of {record.shard['count']}",
                hint=f"leave {name} out",
            )
        by_index[index] = name
    count = first.shard["count"]
    left = [i for i in range(1, count + 1) if i not in by_index]
    others = f"; {listing(whole)} {'is of a whole run' if len(whole) == 1 else 'are of whole runs'}" if whole else ""
    missing = f"{'is' if len(left) == 1 else 'are'} missing: {listing([str(i) for i in left])}"
    raise InputError(
        f"{len(left)} of {count} shards {missing}{others}",
        hint=f"run it again alone: --shard {left[0]}/{count}",
    )


def _merged(shards: Sequence[tuple[str, RunRecord]]) -> RunRecord:
    ordered = sorted(shards, key=lambda s: s[1].shard["index"])
    records = [record for _, record in ordered]
    first, about = records[0], records[0].shard
    return replace(
        first,
        settings={k: v for k, v in first.settings.items() if k != "shard"},
        created=max(r.created for r in records),
        elapsed_s=sum(r.elapsed_s for r in records),
        benches={name: _bench(name, sizes, ordered) for name, sizes in about["benches"].items()},
        tasks=_tasks(ordered),
        continuations={k: v for r in records for k, v in r.continuations.items()},
        samples=_samples(records),
        warnings=_warnings(records),
        n_reused=sum(r.n_reused for r in records),
        shard={},
    )


def _bench(name: str, sizes: Mapping[str, int], shards: Sequence[tuple[str, RunRecord]]) -> BenchResult:
    parts = [(file, r.benches[name]) for file, r in shards if name in r.benches]
    found = {s.name: (file, s) for file, part in parts for s in part.subjects}
    for subject, n in sizes.items():
        files = [file for file, part in parts if any(s.name == subject for s in part.subjects)]
        if len(files) != 1:
            where = f"in {' and '.join(files)}" if files else "in no shard"
            raise InputError(f"{name}: {subject} is {where}, expected in one")
        if found[subject][1].acc.n != n:
            raise InputError(f"{name}: {files[0]} has {found[subject][1].acc.n} questions of {subject}, expected {n}")
    _, first = parts[0]
    by_name = {subject: found[subject][1] for subject in sizes}
    known = [by_name[s.name].subject if s.name in by_name else s for s in first.bench.subjects]
    others = [r.subject for r in by_name.values() if r.name not in {s.name for s in known}]
    return replace(
        first,
        bench=replace(first.bench, subjects=(*known, *others)),
        subjects=tuple(by_name.values()),
        n_truncated=sum(part.n_truncated for _, part in parts),
        n_fewer_shots=sum(part.n_fewer_shots for _, part in parts),
        elapsed_s=sum(part.elapsed_s for _, part in parts),
        tokens=_sums(part.tokens for _, part in parts),
    )


def _sums(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for some in counts:
        for key, n in some.items():
            total[key] = total.get(key, 0) + n
    return total


def _warnings(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """Each once; those that begin with a number (`9 prompts were longer …`) with the sum of it."""
    counts: dict[str, int] = {}
    for text in (w for r in records for w in r.warnings):
        number, _, rest = text.partition(" ")
        if number.isdecimal():
            counts[rest] = counts.get(rest, 0) + int(number)
        else:
            counts[text] = 0
    return tuple(f"{n} {text}" if n else text for text, n in counts.items())


def _samples(records: Sequence[RunRecord]) -> dict[str, list[Mapping[str, Any]]]:
    together: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        for name, some in record.samples.items():
            together.setdefault(name, []).extend(some)
    return {name: sorted(some, key=lambda s: int(s.get("doc_id", 0))) for name, some in together.items()}


def _tasks(shards: Sequence[tuple[str, RunRecord]]) -> dict[str, Any]:
    """Results of lm-eval's tasks and groups."""
    about = shards[0][1].shard
    results: dict[str, Any] = {}
    for name, n in about["tasks"].items():
        parts = [(file, r) for file, r in shards if name in r.tasks]
        if not any(r.shard.get("values") for _, r in parts):
            if len(parts) != 1:
                where = f"in {' and '.join(file for file, _ in parts)}" if parts else "in no shard"
                raise InputError(f"{name} is {where}, expected in one")
            results[name] = parts[0][1].tasks[name]
            continue
        results[name] = _of_questions(name, n, parts, about["aggregations"][name])
    if about["groups"]:
        from llmkit.evaluation.lm_eval_metrics import group_metrics

        groups = {name: group_metrics(name, group, results) for name, group in about["groups"].items()}
        results |= groups
    return results


def _of_questions(
    name: str, n: int, parts: Sequence[tuple[str, RunRecord]], aggregations: Mapping[str, str | None]
) -> dict[str, Any]:
    """The results of a task whose questions were scored by several shards."""
    from llmkit.evaluation.lm_eval_metrics import task_metrics

    values: dict[str, dict[int, Any]] = {}
    for file, record in parts:
        for metric, pairs in (record.shard.get("values") or {}).get(name, {}).items():
            held = values.setdefault(metric, {})
            double = [i for i, _ in pairs if i in held]
            if double:
                raise InputError(f"{name}: {file} scores question {double[0]}, which another shard scores as well")
            held |= dict(pairs)
    scored = {i for by_question in values.values() for i in by_question}
    if left := sorted(set(range(n)) - scored):
        raise InputError(f"{name}: {len(left)} of {n} questions are in no shard: {listing([str(i) for i in left])}")
    first = parts[0][1].tasks[name]
    if not scored:
        raise InputError(f"{name}: its shards hold no values of its questions")
    columns = {metric: [held[i] for i in sorted(held)] for metric, held in values.items()}
    return {**first, "sample_len": n, **task_metrics(name, columns, aggregations)}
