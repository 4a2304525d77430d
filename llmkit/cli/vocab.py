"""`llmkit vocab extend|trim|info`: a larger vocabulary, a smaller one, and a look at one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.cli import completion
from llmkit.cli.command import command
from llmkit.cli.options import ModelArgument, SeedOption, WriteOptions
from llmkit.cli.output import Output
from llmkit.cli.writing import write

PadOption = Annotated[
    int | None, typer.Option("--pad-to-multiple", metavar="N", min=1, help="Fill up the rows to a multiple of N.")
]
_N_SCRIPTS = 12


@command(
    "llmkit vocab extend vicuna-7b --with chinese_sp.model --init pieces -o vicuna-7b-zh",
    "llmkit vocab extend SmolLM2-135M --with words.txt --pad-to-multiple 64 -o out",
    "llmkit vocab extend SmolLM2-135M --with other/tokenizer.json --init mean -o out --dry-run",
)
def extend(
    out: Output,
    model: ModelArgument,
    source: Annotated[
        Path,
        typer.Option(
            "--with",
            metavar="FILE",
            help="Where the tokens are: a SentencePiece model, tokenizer.json, a tiktoken file, a folder with one, or "
            "a text file with one token a line.",
        ),
    ],
    writing: WriteOptions,
    init: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.inits,
            help="How new rows begin: mean, pieces, zero, normal or focus.",
        ),
    ] = "mean",
    as_: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="pieces|added",
            help="Enter them with merges, or as added tokens that are matched first (default: added for a text file).",
        ),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            metavar="zero|own|after",
            autocompletion=completion.scores,
            help="Scores of new SentencePiece pieces: 0 as Chinese-LLaMA, their own, or after all old ones, where "
            "tokenizer.json and tokenizer.model agree on every text (default: zero for BPE, own for Unigram).",
        ),
    ] = None,
    pad_to_multiple: PadOption = None,
    corpus: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text in the new language, for --init focus.")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Add the tokens that a model lacks: tokenizer files, embedding, head and configs in one step.

    SentencePiece models are merged as Chinese-LLaMA merges them: absent pieces are appended, ids stay. Byte-level BPE
    gets real merges after all old ones, so that text is cut as before and then joined further. The plan says how many
    tokens can be reached.
    """
    from llmkit.checkpoint.classification import open_model
    from llmkit.transforms import vocab

    result = vocab.extend(
        open_model(model, force=writing.force),
        source,
        init=init,
        as_=as_,
        scores=scores,
        pad_to_multiple=pad_to_multiple,
        corpus=corpus,
        seed=seed,
    )
    write(out, result, writing)


@command("llmkit vocab trim SmolLM2-135M --corpus my.txt -o small", "llmkit vocab trim M --corpus a.txt -o o")
def trim(
    out: Output,
    model: ModelArgument,
    corpus: Annotated[Path, typer.Option(metavar="FILE", help="The text (UTF-8) that must be cut as before.")],
    writing: WriteOptions,
    keep_id: Annotated[list[int] | None, typer.Option(metavar="ID", help="Keep this id too (may be repeated).")] = None,
    min_count: Annotated[
        int, typer.Option(metavar="N", min=1, help="Leave out tokens that are rarer in the corpus.")
    ] = 1,
    pad_to_multiple: PadOption = None,
) -> None:
    """Keep only the tokens that a text needs, and those that nothing can do without.

    Special tokens, the 256 bytes, ASCII and every symbol that a merge makes on its way stay. Text of the corpus is
    cut into the same tokens as before; their ids are new.
    """
    from llmkit.checkpoint.classification import open_model
    from llmkit.transforms import vocab

    ckpt = open_model(model, force=writing.force)
    with _showing(out, "cutting the corpus") as on_progress:
        result = vocab.trim(
            ckpt,
            corpus,
            keep_ids=keep_id or (),
            min_count=min_count,
            pad_to_multiple=pad_to_multiple,
            on_progress=on_progress,
        )
    write(out, result, writing)


@command(
    "llmkit vocab info vicuna-7b --text chinese.txt --against vicuna-7b-zh", "llmkit vocab info tokenizer.model --json"
)
def info(
    out: Output,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or a tokenizer file (sp.model, …).")
    ],
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="A text (UTF-8) to count the tokens of.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="OTHER", help="A second model or tokenizer, to compare with.")
    ] = None,
) -> None:
    """Show what a vocabulary holds: pieces by type and script, and how many tokens a text takes."""
    from llmkit.transforms import vocab

    first, second = vocab.open_tokenizer(model), vocab.open_tokenizer(against) if against else None
    with _showing(out, "cutting the text") as on_progress:
        description = vocab.info(first, text=text, against=second, on_progress=on_progress)
    out.answer(description, lambda: _render(out, description), brief=str(description["n_tokens"]))


@contextmanager
def _showing(out: Output, label: str) -> Iterator[Callable[[int, int], None]]:
    """A function that shows how many characters are done, of how many; 0 begins anew."""
    progress, before = out.progress(), 0

    def on_progress(done: int, total: int) -> None:
        nonlocal before
        if done == 0:
            progress.end()
            progress.begin(total, label, "characters")
        else:
            progress.advance(done - before)
        before = done

    try:
        yield on_progress
    finally:
        progress.end()


def _render(out: Output, d: Mapping[str, Any]) -> None:
    other = d.get("against") or {}
    out.record(
        {
            "tokenizer": f"{d['label']}, {d['kind']}",
            "tokens": f"{d['n_tokens']:,}" + (f", {d['n_added']} of them added" if d["n_added"] else ""),
            "types": ", ".join(f"{name} {n:,}" for name, n in d["types"].items()),
            "against": f"{other['label']}, {other['n_tokens']:,} tokens: {other['n_shared']:,} in both, "
            f"{other['n_only_here']:,} only here, {other['n_only_there']:,} only there"
            if other
            else None,
        }
    )
    out.line()
    scripts = list(d["scripts"].items())
    rows = [(name, f"{s['n']:,}", f"{s['mean_chars']:.2f}") for name, s in scripts[:_N_SCRIPTS]]
    if len(scripts) > _N_SCRIPTS:
        rest = sum(s["n"] for _, s in scripts[_N_SCRIPTS:])
        rows.append((f"{len(scripts) - _N_SCRIPTS} more scripts", f"{rest:,}", ""))
    out.table(["script", "pieces", "characters each"], rows, right=["pieces", "characters each"])
    texts = [(v["label"], v["text"]) for v in (d, other) if v.get("text")]
    if texts:
        out.line()
        out.table(
            ["tokenizer", "characters", "tokens", "tokens per character", "characters per token", "bytes"],
            [
                (
                    label, f"{t['n_chars']:,}", f"{t['n_tokens']:,}", f"{t['tokens_per_char']:.3f}",
                    f"{t['chars_per_token']:.3f}", f"{t['byte_fallback_share']:.1%}",
                )
                for label, t in texts
            ],
            right=["characters", "tokens", "tokens per character", "characters per token", "bytes"],
        )  # fmt: skip
