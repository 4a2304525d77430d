"""`llmkit plugins new`: a plugin drafted from a checkpoint; what `plugins check --model` compares."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli.command import command
from llmkit.cli.options import ModelArgument
from llmkit.cli.output import Output
from llmkit.errors import InputError, LlmkitError, OutputError, PluginError, listing

if TYPE_CHECKING:
    from llmkit.architecture.architecture import Architecture
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.decoder.contract import Check

_KIND = "a plugin of llmkit"


@command("llmkit plugins new some-model -o my_family.py", "llmkit plugins new some-model | less")
def new(
    out: Output,
    model: ModelArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.py", help="Where to write it (default: stdout).")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the plugin (default: the config's model_type).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.py.")] = False,
) -> None:
    """Draft a plugin from a checkpoint's headers and config, after the plugin whose name table fits best.

    It has that plugin's computation with the names, sizes and keys of this checkpoint: `check:` marks what headers
    cannot tell, and it lists tensors and keys of config.json that it does not know. Every command takes it with
    --plugin FILE.py, or by the variable LLMKIT_PLUGINS. Reads no tensor data.
    """
    from llmkit.drafting.draft import draft_plugin, plugin_text
    from llmkit.pipeline.files import check_file, write_file

    if output is not None:
        if output.exists() and not overwrite:
            raise OutputError(f"{output} already exists", hint="choose another -o, or add --overwrite to replace it")
        check_file(output, _KIND, _is_plugin)
    ckpt = _float_model(model)
    if existing := _known(ckpt.config):
        out.note(f"the plugin {existing} describes this model already; this is another draft of it")
    wanted = _identifier(name or str(ckpt.config.get("model_type") or ckpt.label))
    specs = ckpt.specs
    draft = draft_plugin(specs, ckpt.config, name=wanted, label=ckpt.label)
    text, problems = plugin_text(draft, ckpt.label), list(draft.problems)
    if output is not None:
        write_file(output, text.encode(), _KIND, _is_plugin)
    checks = [line.strip() for line in text.splitlines() if "# check:" in line]
    document = {
        "name": wanted,
        "file": str(output) if output else None,
        "text": text,
        "fits": not problems,
        "problems": problems,
        "checks": checks,
        "after": draft.like.name,
        "special": list(draft.unknown),
        "unused_keys": dict(draft.unread),
    }

    def render() -> None:
        if output is None:
            out.text(text)
            return
        fits = "names and shapes fit" if not problems else "names and shapes do not fit yet"
        left = f"{len(checks)} lines to check, {len(draft.unread)} keys unread"
        out.line(f"wrote {output}, after {draft.like.name}: {fits} {ckpt.label}; {left}")

    out.answer(document, render, brief=str(output) if output else text.rstrip("\n"))
    for text_line in draft.unknown:
        out.warning(text_line)
    for problem in problems:
        out.warning(f"the draft does not fit {ckpt.label}: {problem}")
    if output is not None:
        _say_how_to_use(out, output, wanted, model)


def _float_model(model: str) -> Checkpoint:
    """The checkpoint, if its headers and config show what a plugin states.

    Raises:
        InputError: it is no model, has no config, or is quantized.
    """
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.checkpoint.classification import require_model
    from llmkit.checkpoint.quantized import describe, is_quantized

    ckpt = require_model(open_checkpoint(model), "plugins new")
    if is_quantized(ckpt):
        raise InputError(
            f"{model} is quantized ({describe(ckpt)}): its headers do not show the shapes of the float weights",
            hint="draft from the float model, then open this one with the plugin",
        )
    if not ckpt.config:
        raise InputError(f"{model} has no config.json: a plugin cannot be drafted without it")
    return ckpt


def _say_how_to_use(out: Output, output: Path, name: str, model: str) -> None:
    from llmkit.architecture.registry import GROUP

    file = shlex.quote(str(output) if "/" in str(output) else f"./{output}")
    out.note(f"use it at once: llmkit inspect {shlex.quote(model)} --plugin {file} (or export LLMKIT_PLUGINS={file})")
    out.note("to install it, put it into a package whose pyproject.toml has these two lines:")
    out.note(f'  [project.entry-points."{GROUP}"]')
    out.note(f'  {name} = "{output.stem}:ARCHITECTURE"')
    out.hint(f"llmkit plugins check {file} --model {shlex.quote(model)}")


def _is_plugin(head: bytes) -> bool:
    return not head or b"llmkit.architecture" in head


def compare(architecture: Architecture, model: str) -> Check:
    """Names and shapes of a checkpoint against an architecture that need not be installed."""
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.decoder.contract import Check

    ckpt = open_checkpoint(model)
    try:
        report = architecture.bind(dict(ckpt.config)).check(ckpt.specs)
    except LlmkitError as error:
        return Check(f"{ckpt.label}: names and shapes", None, error.message)
    return Check(f"{ckpt.label}: names and shapes", None, listing(report.problems, 3) or None)


def _known(config: object) -> str | None:
    from llmkit.architecture.registry import find

    try:
        architecture = find(dict(config)) if isinstance(config, dict) else None
    except PluginError:
        return None
    return architecture.name if architecture is not None else None


def _identifier(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_").lower() or "drafted"
