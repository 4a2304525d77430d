"""`llmkit export`: a folder that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.command import command
from llmkit.cli.options import ModelArgument, Writing
from llmkit.cli.output import Output
from llmkit.cli.writing import write

if TYPE_CHECKING:
    from pathlib import Path

    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.onnx.parity import Difference

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        "export",
        examples=[
            "llmkit export vicuna-7b --to onnx -o vicuna-7b-onnx",
            "llmkit export vicuna-7b --to onnx --weights copy --attention attention -o out",
        ],
    )(export)


def export(
    out: Output,
    model: ModelArgument,
    writing: Writing,
    to: Annotated[str, typer.Option("--to", metavar="onnx", help="The format to export to.")] = "onnx",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="link|copy",
            help="link: the graph refers to the model's own files, hard-linked into OUT. copy: OUT has weights of its "
            "own. (default: link)",
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            "--attention",
            metavar="gqa|attention|mha",
            help="The op that computes attention (default: the fastest that can).",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help="Compute in float32, float16 or bfloat16.")
    ] = "float32",
    via: Annotated[
        str | None,
        typer.Option(
            "--via", metavar="optimum", help="Let Optimum trace transformers' model: where no plugin describes it."
        ),
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare the folder's logits with the torch decoder's.")
    ] = False,
) -> None:
    """Export a model to ONNX, built from its architecture: fused attention, weights left in the files they are in.

    The folder runs in ONNX Runtime through llmkit (generate, eval, perplexity take it), in ONNX Runtime GenAI and in
    Optimum. Afterwards its logits are compared with the torch decoder's; exit code 1 when they differ.
    """
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.errors import InputError
    from llmkit.onnx.export import ATTENTIONS
    from llmkit.onnx.export import export as export_checkpoint

    if to != "onnx":
        raise InputError(f"--to {to!r} is no format that llmkit exports; expected onnx", hint="llmkit convert --help")
    if attention is not None and attention not in ATTENTIONS:
        raise InputError(f"--attention {attention!r} is unknown; expected {', '.join(ATTENTIONS)}")
    ckpt = open_checkpoint(model)
    if via is not None:
        from llmkit.cli.export_via import export_via

        refused = {"--attention": attention, "--weights": weights, "--dtype": None if dtype == "float32" else dtype}
        export_via(out, ckpt, writing, via, refused=refused, check=not no_check)
        return
    after = export_checkpoint(ckpt, weights=weights or "link", dtype=dtype, attention=attention)  # type: ignore[arg-type]
    failed: list[Difference] = []

    def finish(_manifest: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
        if no_check:
            return {"parity": None}, lambda: None
        found, tolerance = _checked(ckpt, writing.output, dtype)
        failed.extend(d for d in found if not d.largest <= tolerance)

        def render() -> None:
            rows = [(d.case, f"{d.largest:.1e}", f"{d.same_choice:.1%}") for d in found]
            out.table(["against torch", "largest difference", "same token"], rows, right=["largest difference"])

        document = [{"case": d.case, "largest": d.largest, "same_choice": d.same_choice} for d in found]
        return {"parity": document, "tolerance": tolerance}, render

    write(out, after, writing, finish=finish)
    if failed:
        _mark(writing.output)
        worst = max(failed, key=lambda d: d.largest)
        out.refuse(f"the exported model differs from the torch decoder: {worst.case} by {worst.largest:.1e}")


def _checked(ckpt: Checkpoint, folder: Path, dtype: str) -> tuple[list[Difference], float]:
    from llmkit.architecture import registry
    from llmkit.architecture.keys import Computed
    from llmkit.decoder import load_decoder
    from llmkit.onnx.parity import TOLERANCES, compare_decoders
    from llmkit.onnx.session import load_onnx

    architecture = registry.require(dict(ckpt.config), ckpt.label)
    ends = architecture.prompt_ends
    if isinstance(ends, Computed):
        ends = tuple(ends.bind(dict(ckpt.config)))
    return compare_decoders(load_onnx(folder), load_decoder(ckpt), ends=ends), TOLERANCES[dtype]


def _mark(folder: Path) -> None:
    """Say in the folder that its check failed."""
    (folder / "PARITY_FAILED").write_text("The logits of this model differ from the torch decoder's.\n")
