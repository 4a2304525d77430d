"""`llmkit demo`: the main job on the mini model: base + delta + adapter, quantized to 8 and 4 bits, each evaluated."""

from __future__ import annotations

import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.command import command
from llmkit.cli.output import Output, duration
from llmkit.errors import OutputError
from llmkit.pipeline.progress import Progress
from llmkit.tensors.spec import format_bytes

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint

_CONTEXT = 256
_NEW_SUBJECT = "star_lore"  # what only the adapter teaches


@command("llmkit demo", "llmkit demo --keep mini-models")
def demo(
    out: Output,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the models in this new folder.")] = None,
) -> None:
    """Run the main job on a tiny trained model that ships with llmkit, in under a minute and offline.

    Applies a delta to its base, merges an adapter that teaches one more subject, quantizes the result to 8 and 4 bits,
    scores each on the mini benchmark, and prints one table.
    """
    started = time.monotonic()
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="llmkit-demo-") as folder:
            rows = _run(out, Path(folder))
    else:
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise OutputError(f"{keep} already exists", hint="choose another folder for --keep")
        keep.mkdir(parents=True, exist_ok=True)
        rows = _run(out, keep)
    elapsed = time.monotonic() - started
    document = {"models": rows, "elapsed_s": round(elapsed, 3), "kept": str(keep) if keep is not None else None}

    def render() -> None:
        _render(out, rows)
        out.line(f"\n{rows[0]['questions']} questions, 2 shots; all in {duration(elapsed)}")
        if keep is not None:
            out.hint(f"llmkit inspect {keep / 'int4'}")

    out.answer(document, render, brief="\n".join(f"{r['model']} {r['accuracy']:.4f}" for r in rows))


def _run(out: Output, folder: Path) -> list[dict[str, Any]]:
    from llmkit.api import save
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.transforms import delta, lora
    from llmkit.transforms.quantize import quantize

    mini = Path(str(files("llmkit_evalsets"))) / "mini"
    progress = out.progress()
    base = open_checkpoint(mini / "base")
    out.note("base + delta")
    save(delta.apply(base, open_checkpoint(mini / "delta")), folder / "tuned")
    tuned = open_checkpoint(folder / "tuned")
    out.note("merge the adapter")
    save(lora.merge(tuned, [lora.open_adapter(mini / "adapter")]), folder / "merged")
    merged = open_checkpoint(folder / "merged")
    for bits in (8, 4):
        out.note(f"quantize to {bits} bits")
        save(quantize(merged, bits=bits), folder / f"int{bits}")
    models = {"base": base, "+ delta": tuned, "+ adapter": merged}
    models |= {f"int{bits}": open_checkpoint(folder / f"int{bits}") for bits in (8, 4)}
    text = (mini / "text.txt").read_text(encoding="utf-8")
    rows = []
    for name, ckpt in models.items():
        out.note(f"evaluate {name}")
        rows.append({"model": name, **_measure(ckpt, text, progress)})
    return rows


def _measure(ckpt: Checkpoint, text: str, progress: Progress) -> dict[str, Any]:
    from llmkit.checkpoint.quantized import dequantized
    from llmkit.checkpoint.tokenizer import load_tokenizer
    from llmkit.decoder import load_decoder
    from llmkit.evaluation.engine import EngineOptions
    from llmkit.evaluation.perplexity import measure_perplexity
    from llmkit.evaluation.planning import Selection
    from llmkit.evaluation.runner import evaluate

    started = time.monotonic()
    bench = evaluate(ckpt, Selection("mini"), engine=EngineOptions(progress=progress)).benches["mini"]
    score = bench.micro
    ids = list(load_tokenizer(ckpt)(text, verbose=False)["input_ids"])
    measured = measure_perplexity(load_decoder(ckpt), ids, context=_CONTEXT, progress=progress)
    n_parameters = sum(t.spec.numel for t in dequantized(ckpt).tensors.values())
    return {
        "nbytes": ckpt.nbytes,
        "bits_per_weight": 8 * ckpt.nbytes / n_parameters,
        "accuracy": score.value,
        "stderr": score.stderr,
        "questions": score.n,
        "subjects": {s.name: s.acc.value for s in bench.subjects},
        "perplexity": measured.perplexity,
        "elapsed_s": round(time.monotonic() - started, 3),
    }


def _render(out: Output, rows: list[dict[str, Any]]) -> None:
    columns = ["size", "bits per weight", "accuracy", "±", _NEW_SUBJECT, "perplexity", "time"]
    out.table(
        ["model", *columns],
        [
            (
                r["model"],
                format_bytes(r["nbytes"]),
                f"{r['bits_per_weight']:.2f}",
                f"{r['accuracy']:.1%}",
                f"{r['stderr']:.1%}",
                f"{r['subjects'][_NEW_SUBJECT]:.1%}",
                f"{r['perplexity']:.3f}",
                duration(r["elapsed_s"]),
            )
            for r in rows
        ],
        right=columns,
    )
