"""`llmkit perplexity`: how well a model predicts a text."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from math import isfinite, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli.command import command
from llmkit.cli.options import ComputeOptions, ModelArgument
from llmkit.cli.output import Output, duration

if TYPE_CHECKING:
    from llmkit.evaluation.divergence import Divergence
    from llmkit.evaluation.perplexity import Perplexity

_DEFAULT_CONTEXT = 2048


@command(
    "llmkit perplexity vicuna-7b --text wiki.test.txt",
    "llmkit perplexity vicuna-7b-int4 --text wiki.test.txt --context 1024 --stride 512",
    "llmkit perplexity vicuna-7b-int4 --text wiki.test.txt --reference vicuna-7b.reference",
)
def perplexity(
    out: Output,
    model: ModelArgument,
    computing: ComputeOptions,
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text file in UTF-8.")],
    context: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Tokens in a window (default: the model's, at most 2048).")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How far windows advance (default: they do not overlap).")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where no file is yet, store the model's distributions there; else compare the model with them.",
        ),
    ] = None,
) -> None:
    """Measure the perplexity of a text: exp of the mean negative log-likelihood of a token.

    Beyond the range of a float it is inf; the bits per token tell more then. The text is encoded whole and cut into
    windows; each token is predicted from those before it in its window.

    With --reference, a first run stores the model's distribution before every token (two bytes an entry of the
    vocabulary), and a run of another model tells how far it is from them: Kullback-Leibler divergence, likeliest tokens
    that are others, and both perplexities with the paired interval of their ratio.
    """
    from llmkit.checkpoint.tokenizer import load_tokenizer
    from llmkit.evaluation.divergence import measure_divergence
    from llmkit.evaluation.identity import describe_model
    from llmkit.evaluation.perplexity import measure_perplexity
    from llmkit.evaluation.reference import ReferenceWriter, check_reference_path, read_reference, subject_of
    from llmkit.formats.text_file import read_text

    content = read_text(text)
    stored = read_reference(reference) if reference is not None and reference.exists() else None
    if reference is not None and stored is None:
        check_reference_path(reference)
    ckpt = computing.open(out, model, "perplexity")
    ids = list(load_tokenizer(ckpt)(content, verbose=False)["input_ids"])
    if stored is not None:
        context = context or stored.subject.context
        stride = stride or min(stored.subject.stride, context)
        stored.check(subject_of(content, ids, context, stride))
    decoder = computing.load(out, ckpt)
    n_context = context or min(decoder.context or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
    step = stride or n_context
    if decoder.context is not None and n_context > decoder.context:
        out.warning(f"{ckpt.label} was trained for {decoder.context} tokens: use --context {decoder.context} or less")
    measure = partial(measure_perplexity, decoder, ids, context=n_context, stride=step, progress=out.progress())
    started = time.monotonic()
    divergence = None
    if stored is not None:
        divergence = measure_divergence(stored, decoder, ids, context=n_context, stride=step, progress=out.progress())
        result = divergence.after
    elif reference is not None:
        with ReferenceWriter(reference, ckpt.label, subject_of(content, ids, n_context, step)) as writer:
            result = measure(keep=writer.add)
    else:
        result = measure()
    elapsed = time.monotonic() - started
    document = {
        "model": describe_model(ckpt)
        | {"dtype": computing.dtype, "device": str(decoder.device), "backend": decoder.backend},
        "text": text.name,
        "perplexity": result.perplexity,
        "bits_per_token": result.bits_per_token,
        **asdict(result),
        "elapsed_s": round(elapsed, 3),
    }
    if stored is not None and divergence is not None:
        document["reference"] = {"file": str(reference), "model": stored.model, **divergence.as_dict()}

    if isnan(result.nll):
        out.warning(
            f"{ckpt.label} gives logits that are no numbers: its weights, or sums in {computing.dtype}, are not finite"
        )

    def render() -> None:
        if stored is not None and divergence is not None:
            _render_divergence(out, divergence, stored.model)
        _render(out, result, written=reference if stored is None else None, elapsed_s=elapsed)

    out.answer(document, render, brief=f"{result.perplexity:.6f}")


def _render(out: Output, result: Perplexity, *, written: Path | None, elapsed_s: float) -> None:
    spread = f" ± {result.perplexity * result.stderr:.4f}" if isfinite(result.perplexity) else ""
    out.record(
        {
            "perplexity": f"{result.perplexity:.4f}{spread}",
            "bits per token": f"{result.bits_per_token:.4f}",
            "tokens": f"{result.n_scored} scored of {result.n_tokens}, "
            f"windows of {result.context} every {result.stride}",
            "reference": f"stored in {written}" if written is not None else None,
            "time": f"{duration(elapsed_s)} ({result.n_tokens / max(elapsed_s, 1e-9):.0f} tokens/s)",
        }
    )


def _render_divergence(out: Output, d: Divergence, model: str) -> None:
    low, high = d.ratio_interval
    out.record(
        {
            f"perplexity of {model}": f"{d.before.perplexity:.4f}",
            "perplexity here": f"{d.after.perplexity:.4f}",
            "ratio": f"{d.ratio:.5f}, 95 % interval {low:.5f} to {high:.5f} (paired)",
            "KL divergence": f"mean {d.kl:.6f}, median {d.kl_median:.6f}, 99 % {d.kl_99:.5f} nats",
            "other likeliest token": f"{d.flipped:.2%} of {d.after.n_scored}",
        }
    )
    out.line()
