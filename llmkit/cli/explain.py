"""`llmkit explain`: the expression that made one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli import completion
from llmkit.cli.command import command
from llmkit.cli.output import Output


@command("llmkit explain vicuna-7b-int4 model.layers.0.self_attn.q_proj.weight_packed")
def explain(
    out: Output,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that llmkit wrote.")],
    tensor: Annotated[
        str, typer.Argument(metavar="TENSOR", autocompletion=completion.tensors, help="The name of a tensor in it.")
    ],
) -> None:
    """Show the whole expression that made a tensor, from the manifest.

    Inputs that llmkit wrote too are followed to where they came from.
    """
    from llmkit.inspection.expression import explain as explain_tensor
    from llmkit.inspection.expression import tree_lines

    entry = explain_tensor(folder, tensor)

    def render() -> None:
        shape = ", ".join(map(str, entry["shape"]))
        out.line(f"{entry['tensor']}  {entry['dtype']}[{shape}]  in {entry['file']}, xxh3 {entry['xxh3'][:16]}…")
        for line in tree_lines(entry["from"]):
            out.line(line)

    out.answer(entry, render)
