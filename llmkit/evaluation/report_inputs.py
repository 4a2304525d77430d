"""The inputs of a report: files and folders that runs wrote, recognised by their contents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.checkpoint.manifest import MANIFEST_NAME, load_manifest
from llmkit.errors import InputError
from llmkit.evaluation.merging import merge_shards
from llmkit.evaluation.record import RunRecord
from llmkit.evaluation.records import read_record
from llmkit.formats.json_fields import Fields
from llmkit.formats.json_text import REMEDY, as_object, read_json
from llmkit.formats.paths import expanded
from llmkit.tensors.spec import DType, TensorSpec


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text: an answer of `llmkit perplexity --json`.

    Attributes:
        model: label, path, digests, dtype, device.
        nll, stderr: mean negative log-likelihood of a token in nats, and its standard error.
        body: the whole answer.
    """

    model: Mapping[str, Any]
    perplexity: float
    nll: float
    stderr: float
    n_scored: int
    elapsed_s: float
    body: Mapping[str, Any]

    @property
    def reference(self) -> Mapping[str, Any]:
        """What was measured against another model's distributions; empty where nothing was."""
        found = self.body.get("reference")
        return found if isinstance(found, Mapping) else {}

    @property
    def label(self) -> str:
        """The text, and the windows in which it was read: perplexities compare where these are equal."""
        windows = f"windows of {self.body.get('context')}"
        if self.body.get("stride") != self.body.get("context"):
            windows += f" every {self.body.get('stride')}"
        return f"{self.body.get('text', 'a text')}, {windows}"


@dataclass(frozen=True)
class CheckpointFacts:
    """What llmkit wrote down while it made a checkpoint: its manifest, or the answer of the command that wrote it.

    Attributes:
        path: the folder.
        recipe: the steps that made it.
        nbytes: of all tensors; None where only files are known.
        sizes: bytes and bits per weight before and after quantization (`llmkit.quantization.quality.Sizes`).
        errors: relative error of each quantized weight.
        evaluation: perplexities and divergence that `quantize --evaluate` measured.
    """

    path: str
    recipe: Sequence[Mapping[str, Any]]
    nbytes: int | None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name of the folder."""
        return Path(self.path).name


@dataclass(frozen=True)
class ReportInputs:
    """All inputs of a report, in the order given."""

    records: tuple[RunRecord, ...] = ()
    texts: tuple[TextScore, ...] = ()
    checkpoints: tuple[CheckpointFacts, ...] = ()


def checkpoint_key(model: Mapping[str, Any]) -> str:
    """A key that is equal for records of one checkpoint: its folder, else its digests."""
    return str(model.get("path") or model.get("source_digest") or model.get("label"))


def steps_of(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps that made a checkpoint, as its record has them."""
    history = model.get("history")
    return [step for step in history if isinstance(step, Mapping)] if isinstance(history, list) else []


def run_names(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each run: the model's label, with its dtype or a number where labels repeat."""
    names = [str(m.get("label") or "model") for m in models]
    with_dtype = [
        f"{n} ({m['dtype']})" if names.count(n) > 1 and m.get("dtype") else n
        for n, m in zip(names, models, strict=True)
    ]
    seen: dict[str, int] = {}
    for i, name in enumerate(with_dtype):
        seen[name] = seen.get(name, 0) + 1
        if with_dtype.count(name) > 1:
            with_dtype[i] = f"{name} #{seen[name]}"
    return with_dtype


def read_inputs(paths: Sequence[str | Path]) -> ReportInputs:
    """Read run records (llmkit's, lm-eval's), answers of `perplexity --json` and of `quantize --json`, and folders.

    A checkpoint that a record names is looked at as well, where its folder is still there.

    Raises:
        InputError: a path is missing, cannot be read, or is none of these.
    """
    read: list[tuple[str, RunRecord]] = []
    texts: list[TextScore] = []
    checkpoints: dict[str, CheckpointFacts] = {}
    for path in map(expanded, paths):
        if (path / MANIFEST_NAME).is_file():
            facts = _of_manifest(path)
            checkpoints[facts.path] = facts
            continue
        body = _document(path) if path.is_file() else None
        if body is not None and "perplexity" in body.body and "nll" in body.body:
            texts.append(_text_score(body))
        elif body is not None and "recipe" in body.body and "out" in body.body:
            facts = _of_answer(body)
            checkpoints.setdefault(facts.path, facts)
        else:
            read.append((str(path), read_record(path)))
    records = [record for _, record in merge_shards(read)]
    for model in (*(r.model for r in records), *(t.model for t in texts)):
        folder = model.get("path")
        if isinstance(folder, str) and folder not in checkpoints:
            with suppress(InputError, OSError, ValueError):  # it was not asked for, and may be no path
                if (Path(folder) / MANIFEST_NAME).is_file():
                    checkpoints[folder] = _of_manifest(Path(folder))
    return ReportInputs(tuple(records), tuple(texts), tuple(checkpoints.values()))


def _document(path: Path) -> Fields:
    try:
        return Fields(as_object(read_json(path, takes_mark=True), str(path)), str(path))
    except InputError as error:
        hint = "make the file again, or copy it again" if error.hint in (None, REMEDY) else error.hint
        raise InputError(error.message, hint=hint) from error


def _text_score(body: Fields) -> TextScore:
    model = body.object("model", {}).body
    return TextScore(
        model=model,
        perplexity=_number(body, "perplexity"),
        nll=_number(body, "nll"),
        stderr=_number(body, "stderr"),
        n_scored=body.count("n_scored"),
        elapsed_s=body.number("elapsed_s", 0.0),
        body=body.body,
    )


def _number(body: Fields, key: str) -> float:
    """A number, which stands as text where JSON has none (inf, nan)."""
    value = body.body.get(key)
    if value in ("inf", "-inf", "nan"):
        return float(str(value))
    return body.number(key)


def _of_manifest(folder: Path) -> CheckpointFacts:
    manifest = load_manifest(folder)
    tensors = manifest["tensors"].values()
    nbytes = sum(TensorSpec(DType[t["dtype"]], tuple(t["shape"])).nbytes for t in tensors)
    run = Fields(manifest.get("run", {}), f"{folder / MANIFEST_NAME}: run")
    return _facts(str(folder.resolve()), manifest["recipe"], nbytes or None, run)


def _of_answer(body: Fields) -> CheckpointFacts:
    recipe = [as_object(step, body.where) for step in body.array("recipe")]
    sizes = body.object("sizes", {})
    nbytes = sizes.count("after_nbytes") if sizes.body else None
    return _facts(str(Path(body.text("out")).resolve()), recipe, nbytes, body)


def _facts(path: str, recipe: Sequence[Mapping[str, Any]], nbytes: int | None, body: Fields) -> CheckpointFacts:
    errors = body.object("errors", {})
    return CheckpointFacts(
        path=path,
        recipe=recipe,
        nbytes=nbytes,
        sizes=body.object("sizes", {}).body,
        errors={name: errors.number(name) for name in errors.body},
        evaluation=body.object("evaluation", {}).body,
    )
