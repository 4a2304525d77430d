"""`llmkit plugins list|show|check`: the architectures that llmkit knows (`new`: `llmkit.cli.draft`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli import completion, draft
from llmkit.cli.command import command
from llmkit.cli.output import Output
from llmkit.errors import InputError, PluginError, suggestion

if TYPE_CHECKING:
    from llmkit.architecture.architecture import Architecture
    from llmkit.architecture.registry import Plugin
    from llmkit.decoder.contract import Check

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", autocompletion=completion.plugins, help="The name of a plugin.")
]


@command("llmkit plugins list", name="list")
def list_plugins(out: Output) -> None:
    """List the plugins: what they describe and where they come from."""
    from llmkit.architecture.registry import default_registry

    registry = default_registry()
    entries = []
    for plugin, architecture in registry.load_all().items():
        entry: dict[str, Any] = {"name": plugin.name, "origin": plugin.origin, "target": plugin.target, "error": None}
        if isinstance(architecture, PluginError):
            entry |= {"error": architecture.message, "matches": [], "releases": []}
        else:
            entry |= {"matches": list(architecture.matches), "releases": list(architecture.releases)}
        entries.append(entry)
    clashes = registry.clashes()

    def render() -> None:
        rows = [(e["name"], ", ".join(e["matches"]), ", ".join(e["releases"]), e["origin"]) for e in entries]
        out.table(["plugin", "architectures", "releases", "from"], rows)
        for entry in entries:
            if entry["error"]:
                out.warning(entry["error"])
        for clash in clashes:
            out.warning(clash)

    out.answer({"plugins": entries, "clashes": clashes}, render, brief="\n".join(e["name"] for e in entries))


@command("llmkit plugins show llama")
def show(out: Output, name: NameArgument) -> None:
    """Show what a plugin says: kinds, name table and the tiny model's tensors."""
    from llmkit.architecture.prompts import name_of

    plugin, architecture = _find(name)
    config = architecture.tiny_config()
    model = architecture.bind(config)
    prompt = architecture.prompt_of(config)
    document = {
        "name": architecture.name,
        "origin": plugin.origin,
        "matches": list(architecture.matches),
        "releases": list(architecture.releases),
        "model_types": list(architecture.model_types),
        "dims": {k: str(v) for k, v in vars(architecture.dims).items()},
        "block": {k: str(v) for k, v in vars(model.block).items()},
        "head": str(model.head),
        "variants": list(architecture.variants),
        "equivalents": list(architecture.equivalents),
        "prompt": name_of(prompt) if prompt is not None else None,
        "tokenizer_file": architecture.tokenizer.file if architecture.tokenizer is not None else None,
        "slots": {s.id: {"name": s.name, "formula": s.formula, "kind": s.kind} for s in model.slots.values()},
    }

    def render() -> None:
        out.record(
            {
                "plugin": f"{architecture.name}  ({plugin.origin})",
                "claims": ", ".join(architecture.matches),
                "releases": ", ".join(architecture.releases),
                **{k: str(v) for k, v in vars(model.block).items()},
                "head": str(model.head),
                "variants": ", ".join(architecture.variants),
                "can be stored as": ", ".join(architecture.equivalents) or None,
                "chat format": document["prompt"],
                "tokenizer": document["tokenizer_file"],
            }
        )
        out.line()
        shown = [s for s in model.slots.values() if s.layer in (None, 0)]
        out.table(
            ["slot", "tensor", "shape"],
            [(s.id.replace("layers.0.", "layers.i."), s.name.replace(".0.", ".{i}."), s.formula) for s in shown],
        )

    out.answer(document, render)


@command(
    "llmkit plugins check llama",
    "llmkit plugins check --all --json",
    "llmkit plugins check ./my_family.py --model some-model",
)
def check(
    out: Output,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            autocompletion=completion.plugins,
            help="The name of a plugin, or a plugin file (default: all).",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Check every plugin, one line for each.")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also compare names and shapes with this checkpoint.")
    ] = None,
) -> None:
    """Check the contract of plugins: they load, claim no other's models, and their tiny models fit themselves.

    Each variant of the tiny model is built at random and run: whole, one by one with a cache, in a padded batch, packed
    behind a shared prefix. Where transformers knows the architecture, its logits must agree within 1e-5, and so must
    those of the ONNX graph, where ONNX Runtime is installed. Exit code 1 when not.
    """
    from llmkit.architecture.registry import default_registry, plugins_in
    from llmkit.decoder.contract import Check, check_architecture
    from llmkit.onnx.contract import check_graphs

    if name and every:
        raise InputError(f"both a plugin ({name}) and --all were given", hint="llmkit plugins check --all")
    registry = default_registry()
    if model and not name:
        raise InputError(
            f"--model {model} needs the plugin to compare it with", hint=f"llmkit plugins check NAME --model {model}"
        )
    chosen: Mapping[Plugin, Architecture | PluginError]
    if not name:
        chosen = registry.load_all()
    else:
        chosen = plugins_in(Path(name)) if name.endswith(".py") or "/" in name else dict([_find(name)])
    results: dict[str, list[Check]] = {}
    for plugin, architecture in chosen.items():
        if isinstance(architecture, PluginError):
            results[plugin.name] = [Check("loads", None, architecture.message)]
            continue
        compared = [draft.compare(architecture, model)] if model else []  # first: a model that is none is told at once
        results[plugin.name] = [*check_architecture(architecture), *check_graphs(architecture), *compared]
    clashes = registry.clashes()
    is_ok = not clashes and all(c.is_ok for checks in results.values() for c in checks)
    document = {
        "ok": is_ok,
        "clashes": clashes,
        "plugins": {n: [vars(c) | {"ok": c.is_ok} for c in checks] for n, checks in results.items()},
    }

    def render() -> None:
        if name is None:
            rows = [(n, len(checks), _largest(checks), _verdict(checks)) for n, checks in results.items()]
            out.table(["plugin", "clauses", "largest difference", ""], rows, right=["clauses", "largest difference"])
            return
        for plugin, checks in results.items():
            out.table(
                [plugin, "largest difference", ""],
                [(c.name, _largest([c]), c.problem or c.note or "ok") for c in checks],
                right=["largest difference"],
            )

    out.answer(document, render, brief="ok" if is_ok else "not ok")
    if not is_ok:
        out.refuse("a plugin breaks its contract: " + "; ".join([*clashes, *_problems(results)]))


def _largest(checks: Sequence[Check]) -> str:
    differences = [c.difference for c in checks if c.difference is not None]
    return f"{max(differences):.1e}" if differences else ""


def _verdict(checks: Sequence[Check]) -> str:
    bad = [c for c in checks if not c.is_ok]
    return f"{len(bad)} broken, the first: {bad[0].name}" if bad else "ok"


def _problems(results: dict[str, Any]) -> list[str]:
    return [f"{n} {c.name}: {c.problem}" for n, checks in results.items() for c in checks if not c.is_ok][:5]


def _find(name: str) -> tuple[Plugin, Architecture]:
    from llmkit.architecture.registry import default_registry

    registry = default_registry()
    for plugin in registry.plugins:
        if plugin.name == name:
            return plugin, registry.load(plugin)
    raise PluginError(
        f"no plugin is named {name!r}",
        hint=suggestion(name, [p.name for p in registry.plugins], "llmkit plugins list shows all"),
    )
