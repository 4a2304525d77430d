"""What an evaluation needs of whatever computes the model: scores of token sequences, and their continuations.

`Scorer` answers with any `LanguageModel`. A serving engine answers in its stead: one module, registered in the group
`llmkit.engines` under the name that `--backend` takes. Prompts, token ids and the record are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.entry_points import by_name, entries
from llmkit.errors import InputError, require_choice
from llmkit.evaluation.answers import Answers
from llmkit.evaluation.encoding import Encoder
from llmkit.evaluation.generation import Request
from llmkit.evaluation.prefix import Query
from llmkit.evaluation.scoring import Scorer, Usage
from llmkit.evaluation.targets import Score
from llmkit.onnx.backend import BACKENDS, load_backend
from llmkit.pipeline.progress import NO_PROGRESS, Progress

_GROUP = "llmkit.engines"


class Engine(Protocol):
    """Scores and continues sequences of token ids.

    Attributes:
        backend: as `--backend` calls it.
        device: where it computes, in words.
        runtime: what the record says of it: versions, the name that a server has for the model. Part of the key of
            kept answers.
        answers: where answers are kept; set by whoever runs it.
        usage: what was computed.
        warnings: what the user should know of how it went.
    """

    answers: Answers
    usage: Usage
    warnings: list[str]

    @property
    def backend(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def runtime(self) -> Mapping[str, Any]: ...

    def score(self, queries: Sequence[Query], label: str = "scoring") -> list[Score]:
        """The scores, in the order of the queries."""

    def generate(self, requests: Sequence[Request], encoder: Encoder, eos_ids: Sequence[int]) -> list[str]:
        """The answers, in the order of the requests."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The options of what computes a model.

    Attributes:
        backend: llmkit, transformers, onnx, auto, or a registered engine.
        dtype: the compute dtype; scores are float32 always.
        device: a torch device.
        provider: ONNX Runtime's, for an exported folder: cpu or cuda.
        url: of the server, for an engine that asks one.
        batch_tokens: how many tokens one forward takes at most; None leaves it to the scorer.
        memory: what the process may take, in bytes.
        progress: is told what is computed.
    """

    backend: str = "auto"
    dtype: str = "float32"
    device: str = "cpu"
    provider: str | None = None
    url: str | None = None
    batch_tokens: int | None = None
    memory: int | None = None
    progress: Progress = field(default=NO_PROGRESS, compare=False)


DEFAULT_ENGINE = EngineOptions()


@dataclass(frozen=True)
class EngineKind:
    """A registered engine.

    Attributes:
        open: makes it for a checkpoint.
        takes: those of dtype, device, provider, url and memory that it honours; others are refused.
        needs_weights: whether it reads the checkpoint's tensors; else its tokenizer is enough, and it is opened before
            anything is read.
    """

    open: Callable[[Checkpoint, EngineOptions], Engine]
    takes: frozenset[str] = frozenset()
    needs_weights: bool = True


def engine_names() -> list[str]:
    """What `--backend` takes here."""
    return [*BACKENDS, *sorted(e.name for e in entries(_GROUP))]


def needs_weights(options: EngineOptions) -> bool:
    """Whether the engine reads the checkpoint's tensors; options that it does not have are refused.

    Raises:
        InputError: no such backend, or options that it does not have.
    """
    kind = _kind(options)
    return kind is None or kind.needs_weights


def open_engine(ckpt: Checkpoint, options: EngineOptions) -> Engine:
    """The engine of a checkpoint.

    Raises:
        InputError: no such backend, or options that it does not have.
        RequirementError: it does not know the architecture, or is not installed.
    """
    kind = _kind(options)
    if kind is not None:
        return kind.open(ckpt, options)
    decoder = load_backend(
        ckpt, backend=options.backend, dtype=options.dtype, device=options.device, provider=options.provider
    )
    scorer = Scorer(decoder, options.batch_tokens, progress=options.progress, memory=options.memory)
    scorer.warnings += decoder.doubts
    return scorer


def _kind(options: EngineOptions) -> EngineKind | None:
    """The registered engine; None for a backend that computes the model here."""
    require_choice("--backend", options.backend, engine_names())
    is_own = options.backend in BACKENDS
    kind = None if is_own else by_name(_GROUP, options.backend, "--backend", EngineKind)
    _refuse(options, kind.takes if kind is not None else frozenset({"dtype", "device", "provider", "memory"}))
    return kind


def _refuse(options: EngineOptions, takes: frozenset[str]) -> None:
    for name in ("dtype", "device", "provider", "url", "memory"):
        if name not in takes and getattr(options, name) != getattr(DEFAULT_ENGINE, name):
            raise InputError(f"--{name} is not for --backend {options.backend}", hint=f"leave --{name} out")
