"""The evaluation run: benchmarks become lm-eval tasks, the model becomes an lm-eval `LM`, results become a record.

Everything that can be wrong about names and files is found before the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from llmkit.architecture.prompts import ChatTemplate, Message, Raw, name_of
from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_tokenizer_folder
from llmkit.checkpoint.classification import classify, require_model
from llmkit.checkpoint.manifest import versions
from llmkit.decoder.preflight import model_warnings
from llmkit.errors import InputError, counted, listing
from llmkit.evaluation.answers import SUFFIX, Answers
from llmkit.evaluation.context import long_prompts
from llmkit.evaluation.engine import DEFAULT_ENGINE, Engine, EngineOptions, needs_weights, open_engine
from llmkit.evaluation.identity import PACKAGES, answers_key, describe_model
from llmkit.evaluation.planning import Prepared, Selection
from llmkit.evaluation.preview import PreviewEngine, SentPrompt
from llmkit.evaluation.protocol import Plan
from llmkit.evaluation.record import BenchResult, RunRecord
from llmkit.evaluation.shards import Shard
from llmkit.evaluation.submission import Submission, plan_submission
from llmkit.pipeline.journal import require_free
from llmkit.tensors.device import is_emulated

if TYPE_CHECKING:
    from llmkit.evaluation.lm import SharedPrefixLM
    from llmkit.evaluation.sharding import Part


@dataclass
class _Scores:
    """What came of a run."""

    benches: dict[str, BenchResult] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    n_drawn: int = 0


def evaluate(
    model: Checkpoint | str | Path,
    selection: Selection,
    *,
    engine: EngineOptions = DEFAULT_ENGINE,
    log_samples: bool = False,
    keep: Path | None = None,
    shard: Shard | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> RunRecord:
    """Score a model on benchmarks and lm-eval tasks.

    Args:
        model: a checkpoint, or what `open_checkpoint` takes.
        selection: what is scored.
        engine: what computes the model, and how.
        log_samples: keep every question's document, log-probabilities and prompt digest in the record.
        keep: a file in which answers are kept meanwhile; the same call goes on from one that was interrupted. It stays.
        shard: only this part of the run; `merging.merge_shards` puts the records of all parts together.
        tell: called before anything is scored with each line that is worth an interruption: prompts that do not fit,
            how a quantized model is computed.

    Raises:
        InputError: unknown names, missing or malformed files, nothing to score, more shards than subjects.
        OutputError: another process has `keep` open.
        RequirementError: no plugin describes the model, or the device is not there.
    """
    started = perf_counter()
    if keep is not None:
        require_free(keep, str(keep).removesuffix(SUFFIX))
    served = None
    if not needs_weights(engine):  # a wrong address is found before all files are read
        ckpt = _opened(model, weights=False)
        served = open_engine(ckpt, engine)
    prepared = selection.prepare()
    submitted = plan_submission(selection, prepared)
    if submitted is not None and shard is not None:
        raise InputError("--submission has the answers of the whole run, not of a part", hint="leave --shard out")
    if served is None:
        ckpt = _opened(model)
    plans = {p.work.bench.name: p.protocol.plan(p.work) for p in prepared}
    loaded = selection.load_tasks()
    part = None
    if shard is not None:
        from llmkit.evaluation.sharding import cut_run

        part = cut_run(shard, {name: plan.documents for name, plan in plans.items()}, loaded, selection.limit)
    lm = make_lm(ckpt, PreviewEngine(), max_length=selection.max_length, chat_template=selection.chat_template)
    for line in long_prompts(prepared, lm):
        tell(line)
    lm = lm.with_engine(served or open_engine(ckpt, engine))
    for line in _ways_of_computing(ckpt, lm, engine.dtype):
        tell(line)
    settings = _settings(selection, prepared, lm, engine) | ({} if shard is None else {"shard": str(shard)})
    described = describe_model(ckpt, engine.progress)
    computed = {"dtype": engine.dtype, "device": lm.scorer.device, "backend": lm.scorer.backend, **lm.scorer.runtime}
    key = answers_key(described, settings, computed)
    with closing(Answers(keep, key, str(keep).removesuffix(SUFFIX))) as answers:
        lm.scorer.answers = answers
        scores = _score(lm, selection, plans, loaded, part, submitted)
    return RunRecord(
        model=described | computed,
        settings=settings,
        versions=versions(*PACKAGES),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        elapsed_s=perf_counter() - started,
        benches=scores.benches,
        tasks=scores.tasks,
        continuations=lm.continuations,
        samples=scores.samples if log_samples else {},
        n_reused=answers.n_reused,
        shard=part.about if part is not None else {},
        warnings=(
            *ckpt.warnings,
            *model_warnings(ckpt, lm.scorer.backend),
            *_warnings(prepared, lm, selection.subjects, scores.n_drawn),
            *_shot_warnings(scores.benches, lm.max_length),
        ),
    )


def _ways_of_computing(ckpt: Checkpoint, lm: SharedPrefixLM, dtype: str) -> Iterator[str]:
    """How llmkit's decoder computes a model, where one may expect otherwise."""
    if lm.scorer.backend != "llmkit":
        return
    if (scheme := classify(ckpt).quantization) is not None:
        yield f"{ckpt.label} is quantized ({scheme}): computed with its weights dequantized to {dtype}, once"
    if is_emulated(dtype, lm.scorer.device):
        yield (
            f"this processor has no products of {dtype}: --dtype float32 computes several times as fast, with "
            "twice the memory for the weights"
        )


def _settings(
    selection: Selection, prepared: Sequence[Prepared], lm: SharedPrefixLM, engine: EngineOptions
) -> dict[str, Any]:
    """What the record says of how a run was asked for."""
    return {
        "bench": selection.names,
        "data": str(selection.data) if selection.data is not None else None,
        "include_path": str(selection.include) if selection.include is not None else None,
        "split": selection.split,
        "protocol": ",".join(dict.fromkeys(p.protocol.name for p in prepared)) or selection.protocol,
        "shots": selection.shots,
        "limit": selection.limit,
        "subjects": list(selection.subjects),
        "batch_tokens": engine.batch_tokens,
        "memory": engine.memory,
        "max_length": lm.max_length,
        "chat_template": selection.chat and selection.chat_template,
        "prompt_format": None if lm.prompt is None else name_of(lm.prompt),
    }


def _score(
    lm: SharedPrefixLM,
    selection: Selection,
    plans: Mapping[str, Plan],
    loaded: Any,
    part: Part | None,
    submitted: Submission | None,
) -> _Scores:
    """Score the benchmarks, then lm-eval's tasks; of a part what is its own."""
    from llmkit.evaluation.execution import run_tasks

    found = _Scores()
    for name, plan in plans.items():
        mine = list(plan.documents) if part is None else part.subjects[name]
        if mine:
            found.benches[name], logged = plan.score(lm, mine)
            found.samples |= logged
    if submitted is not None:
        found.n_drawn = submitted.write(found.benches[submitted.bench.name])
        if not submitted.is_scored:
            found.benches, found.samples = {}, {}
    if loaded is not None and (part is None or part.tasks):
        found.tasks, logged, values = run_tasks(
            lm,
            loaded if part is None else {"tasks": dict(part.tasks)},
            shots=selection.shots,
            limit=selection.limit,
            chat_template=selection.chat,
            questions=part.questions if part is not None else None,
        )
        found.samples |= logged
        if part is not None and part.questions:
            part.about["values"] = values
    return found


def preview(model: Checkpoint | str | Path, selection: Selection) -> list[SentPrompt]:
    """What `evaluate` would send, in the order of the questions; no weights are read.

    Of a protocol that asks twice (first for an explanation) it is what is sent first.

    Raises:
        InputError: as `evaluate`.
    """
    prepared = selection.prepare()
    ckpt = _opened(model, weights=False)
    plans = [item.protocol.plan(item.work) for item in prepared]
    engine = PreviewEngine()
    lm = make_lm(ckpt, engine, max_length=selection.max_length, chat_template=selection.chat_template)
    sent = []
    for plan in plans:
        result, _ = plan.score(lm, list(plan.documents))
        for subject in result.subjects:
            sent += [engine.sent(lm, result.bench.name, subject.name, q.id, q.prompt) for q in subject.questions]
    if selection.tasks:
        from llmkit.evaluation.execution import run_tasks

        engine.prompts.clear()
        names = ",".join(selection.tasks)
        run_tasks(
            lm, selection.load_tasks(), shots=selection.shots, limit=selection.limit, chat_template=selection.chat
        )
        sent += [engine.sent(lm, names, "", str(i), prompt) for i, prompt in enumerate(engine.prompts)]
    return sent


def _opened(model: Checkpoint | str | Path, *, weights: bool = True) -> Checkpoint:
    """The checkpoint that is scored; where no weights are needed also a folder with the tokenizer alone."""
    if isinstance(model, Checkpoint):
        return require_model(model, "eval")
    tokenizer = None if weights else open_tokenizer_folder(model)
    return tokenizer or require_model(open_checkpoint(model), "eval")


def make_lm(
    ckpt: Checkpoint,
    engine: Engine | EngineOptions = DEFAULT_ENGINE,
    *,
    max_length: int | None = None,
    chat_template: bool | str = False,
) -> SharedPrefixLM:
    """The lm-eval `LM` of a checkpoint; lm-eval's own `simple_evaluate(model=...)` takes it too.

    Args:
        engine: what computes the model, or how it is opened.
        max_length, chat_template: as of a `Selection`.

    Raises:
        InputError: a chat format is wanted and neither the checkpoint nor its family has one, or none has that name.
    """
    from llmkit.checkpoint.tokenizer import end_tokens, load_tokenizer
    from llmkit.evaluation.lm import SharedPrefixLM, resolve_max_length
    from llmkit.tokenization.chat import apply_template, encode_pieces, prompt_of

    tokenizer = load_tokenizer(ckpt)
    prompt = None
    if chat_template and chat_template != "raw":
        prompt = prompt_of(ckpt, tokenizer, chat_template if isinstance(chat_template, str) else None)
        if isinstance(prompt, Raw) and chat_template is True:
            raise InputError(
                f"{ckpt.label} has no chat template, and no plugin a prompt format for it",
                hint="name a format: --chat-template vicuna, alpaca, llama-2-chat, …",
            )
    if prompt is not None and not isinstance(prompt, ChatTemplate):
        encode_pieces(tokenizer, prompt.pieces([Message("user", "?")]))  # has the tokenizer the format's tokens?
    elif prompt is not None:
        apply_template(tokenizer, [Message("user", "?")])  # one that fails does so before the weights are read
    return SharedPrefixLM(
        open_engine(ckpt, engine) if isinstance(engine, EngineOptions) else engine,
        tokenizer,
        max_length=max_length or resolve_max_length(ckpt.config, tokenizer),
        eos_ids=end_tokens(ckpt),
        prompt=prompt,
    )


def _warnings(prepared: Sequence[Prepared], lm: SharedPrefixLM, chosen: Sequence[str], n_drawn: int) -> list[str]:
    warnings = []
    for item in prepared:
        if item.data and item.data.missing and not chosen:
            n = len(item.data.missing)
            warnings.append(
                f"{item.work.bench.title}: the data folder lacks {n} of {len(item.work.bench.subjects)} subjects "
                f"({listing(item.data.missing)}): the averages are over those present"
            )
        warnings += item.data.warnings if item.data else []
        if item.data and item.data.unknown:
            warnings.append(
                f"{item.work.bench.title}: left out files that are no subjects of it: {listing(item.data.unknown)}"
            )
    if n_drawn:
        warnings.append(f"{counted(n_drawn, 'answer')} of the submission could not be read, and were drawn (seed 0)")
    if lm.n_without_system:
        warnings.append(
            "the chat template refuses a system message: prompts have no header, as with lm-eval's hf backend"
        )
    warnings += lm.scorer.warnings
    if lm.n_truncated:
        warnings.append(
            f"{lm.n_truncated} prompts were longer than {lm.max_length} tokens and lost their beginning; "
            "fewer --shots keep them whole"
        )
    return warnings


def _shot_warnings(results: Mapping[str, BenchResult], max_length: int) -> list[str]:
    return [
        f"{r.title}: {r.n_fewer_shots} of {r.micro.n} prompts have fewer than {r.shots} shots, so that they fit "
        f"(the model takes {max_length} tokens)"
        for r in results.values()
        if r.n_fewer_shots
    ]
