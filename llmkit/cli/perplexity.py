"""`llmkit perplexity`: how well a model predicts a text."""

from __future__ import annotations

import time
from dataclasses import asdict
from math import isfinite, isnan
from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.command import command
from llmkit.cli.options import Computing, ModelArgument
from llmkit.cli.output import Output, duration

_DEFAULT_CONTEXT = 2048


@command(
    "llmkit perplexity vicuna-7b --text wiki.test.txt",
    "llmkit perplexity vicuna-7b-int4 --text wiki.test.txt --context 1024 --stride 512",
)
def perplexity(
    out: Output,
    model: ModelArgument,
    computing: Computing,
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text file in UTF-8.")],
    context: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Tokens in a window (default: the model's, at most 2048).")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How far windows advance (default: they do not overlap).")
    ] = None,
) -> None:
    """Measure the perplexity of a text: exp of the mean negative log-likelihood of a token.

    Beyond the range of a float it is inf; the bits per token tell more then. The text is encoded whole and cut into
    windows; each token is predicted from those before it in its window.
    """
    from llmkit.checkpoint.tokenizer import load_tokenizer
    from llmkit.evaluation.identity import describe_model
    from llmkit.evaluation.perplexity import measure_perplexity
    from llmkit.formats.text_file import read_text

    content = read_text(text)
    ckpt = computing.open(out, model, "perplexity")
    ids = list(load_tokenizer(ckpt)(content, verbose=False)["input_ids"])
    decoder = computing.load(out, ckpt)
    n_context = context or min(decoder.context or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
    if decoder.context is not None and n_context > decoder.context:
        out.warning(f"{ckpt.label} was trained for {decoder.context} tokens: use --context {decoder.context} or less")
    started = time.monotonic()
    result = measure_perplexity(decoder, ids, context=n_context, stride=stride, progress=out.progress())
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

    if isnan(result.nll):
        out.warning(
            f"{ckpt.label} gives logits that are no numbers: its weights, or sums in {computing.dtype}, are not finite"
        )

    def render() -> None:
        spread = f" ± {result.perplexity * result.stderr:.4f}" if isfinite(result.perplexity) else ""
        out.record(
            {
                "perplexity": f"{result.perplexity:.4f}{spread}",
                "bits per token": f"{result.bits_per_token:.4f}",
                "tokens": f"{result.n_scored} scored of {result.n_tokens}, "
                f"windows of {result.context} every {result.stride}",
                "time": f"{duration(elapsed)} ({result.n_tokens / max(elapsed, 1e-9):.0f} tokens/s)",
            }
        )

    out.answer(document, render, brief=f"{result.perplexity:.6f}")
