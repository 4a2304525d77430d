"""`llmkit inspect`: what a model is, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Annotated, Any

import typer

from llmkit.cli.command import command
from llmkit.cli.decode import refuse_coded
from llmkit.cli.folding import fold_lines
from llmkit.cli.options import ModelArgument
from llmkit.cli.output import Output
from llmkit.cli.writing import described_step
from llmkit.errors import InputError, counted
from llmkit.tensors.spec import format_bytes

_MAX_VALUE = 60
_BEFORE, _AFTER = ("hidden", "layers"), ("ffn", "vocab", "context")


@command("llmkit inspect vicuna-7b", "llmkit inspect vicuna-7b --tensors --json", "llmkit inspect LLaMA/7B --identify")
def inspect(
    out: Output,
    model: ModelArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too.")] = False,
    identify: Annotated[
        bool, typer.Option("--identify", help="Hash everything: which published files these are, and a content hash.")
    ] = False,
) -> None:
    """Show what a model is: architecture, sizes, dtypes, quantization, tokenizer, and what is odd.

    Of an exported folder also its graph: ops, opset, inputs and outputs, and where its weights lie.

    Reads headers, config and tokenizer files only; it takes the same time for 1 GB as for 100. Only --identify reads
    the whole model. Its content hash is the same for the same weights in any container and shard size.
    """
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.inspection.summary import summarize

    try:
        ckpt = open_checkpoint(model)
    except InputError:
        refuse_coded(model, ": it must be decoded first", "BASE", model)
        raise
    summary = summarize(ckpt)
    document: dict[str, Any] = asdict(summary)
    if tensors:
        document["tensors"] = {
            name: {"dtype": t.dtype.name, "shape": list(t.shape), "nbytes": t.spec.nbytes, "file": _file(t)}
            for name, t in ckpt.tensors.items()
        }
    brief = summary.architecture or "unknown"
    if identify:
        from llmkit.inspection.identity import identify_model

        identity = identify_model(ckpt, progress=out.progress())
        document["identity"] = asdict(identity)
        brief = identity.content
    out.answer(document, lambda: _render(out, document), brief=brief)


def _file(lazy: Any) -> str | None:
    return ", ".join(dict.fromkeys(read.source.path.name for read in lazy.reads())) or None


def _render(out: Output, d: Mapping[str, Any]) -> None:
    vocabulary = d["vocabulary"]
    n_files = len(d["files"])
    out.record(
        {
            "model": f"{d['label']}  ({d['origin']})" if d["origin"] else d["label"],
            "contents": d["contents"] if d["kind"] != "model" else None,
            "architecture": _architecture(d) if d["kind"] == "model" or d["claimed"] else None,
            "layout": d["layout"] if d["layout"] != "hf" else None,
            "sizes": _sizes(d["dims"], d["mechanisms"]),
            "parameters": f"{_count(d['n_parameters'])}  ({d['n_parameters']:,})",
            "stored": f"{format_bytes(d['nbytes'])} in {counted(n_files, 'file')}, "
            + (f"{counted(d['n_tensors'], 'tensor')}, " if d["n_tensors"] else "")
            + ", ".join(f"{k} {format_bytes(v)}" if len(d["dtypes"]) > 1 else k for k, v in d["dtypes"].items()),
            "quantization": (d["quantization"] or "none").replace("; ", "\n"),
            "tokenizer": _tokenizer(vocabulary) if vocabulary else "none found",
            "made by": "\n".join(described_step(s) for s in d["recipe"]) or None,
        }
    )
    if d["parts"]:
        _render_parts(out, d["parts"])
    metadata = d["details"].get("metadata")
    if metadata:
        out.line()
        out.table(["metadata", "value"], [(key, _clipped(value)) for key, value in metadata.items()])
    if "onnx" in d["details"]:
        _render_graph(out, d["details"]["onnx"])
    for title in ("problems", "oddities"):
        if d[title]:
            out.line(f"\n{title}:")
            for text in d[title]:
                out.line(f"  - {text}")
    if "identity" in d:
        _render_identity(out, d["identity"])
    if "tensors" in d:
        _render_tensors(out, d["tensors"])


def _render_parts(out: Output, parts: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (p["name"], p["n_tensors"], ", ".join(p["dtypes"]), _count(p["n_parameters"]), format_bytes(p["nbytes"]))
        for p in parts
    ]
    out.line()
    out.table(["part", "tensors", "dtype", "parameters", "size"], rows, right=["tensors", "parameters", "size"])


def _render_tensors(out: Output, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    rows = [
        (name, t["dtype"], " × ".join(map(str, t["shape"])), format_bytes(t["nbytes"]), t["file"])
        for name, t in tensors.items()
    ]
    out.line()
    out.table(["tensor", "dtype", "shape", "size", "file"], rows, right=["size"])


def _render_graph(out: Output, d: Mapping[str, Any]) -> None:
    what = "constants" if d["n_parameters"] is None else "weights and constants"
    inside = [f"model.onnx: {format_bytes(d['inside_nbytes'])} of {what}"] if d["inside_nbytes"] else []
    weights = [f"{w['file']}: {w['dtype']} {format_bytes(w['nbytes'])}" for w in d["weights"]]
    out.line()
    out.record(
        {
            "graph": f"model.onnx, {format_bytes(d['graph_nbytes'])}, by {d['producer']}",
            "opset": ", ".join(f"{domain} {version}" for domain, version in d["opset"].items())
            + f" (IR {d['ir_version']})",
            "inputs": "\n".join(_values(d["inputs"])),
            "outputs": "\n".join(_values(d["outputs"])),
            "cache": _cache(d["kv_cache"]),
            "weights in": "\n".join([*weights, *inside]),
        }
    )
    out.line()
    fused = {op.rpartition(".")[2]: n for op, n in d["ops"].items() if "." in op}
    plain = {op: n for op, n in d["ops"].items() if "." not in op}
    out.record({"fused ops": _counts(fused), "other ops": _counts(plain)})


def _counts(ops: Mapping[str, int]) -> str | None:
    """`GroupQueryAttention 30, MatMulNBits 211, …` in lines of a width that terminals have."""
    # No-break spaces hold a name and its number together.
    return "\n".join(wrap(", ".join(f"{op}\u00a0{n}" for op, n in ops.items()), 66)).replace("\u00a0", " ") or None


def _cache(cache: Mapping[str, Any] | None) -> str | None:
    if cache is None:
        return None
    nbytes = cache["nbytes_per_token"]
    return f"keys and values in {cache['dtype']}" + (f", {format_bytes(nbytes)} a token" if nbytes is not None else "")


def _values(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Inputs or outputs of a graph, one a line; those of the layers share a line, with their number."""

    def shape(value: Mapping[str, Any]) -> str:
        return "?" if value["shape"] is None else " × ".join(map(str, value["shape"]))

    return fold_lines((value["name"], f"  {value['dtype']}  {shape(value)}") for value in values)


def _render_identity(out: Output, d: Mapping[str, Any]) -> None:
    n_weights = sum(f["is_weights"] for f in d["files"])
    releases = [f"{release} ({n} of {n_weights} weight files)" for release, n in d["releases"].items()]
    out.line()
    out.record(
        {"identified as": "\n".join(releases) or "no published model in the table", "content hash": d["content"]}
    )
    out.line()
    out.table(
        ["file", "sha256", "known as"],
        [
            (f["name"], f["sha256"], f"{f['release']}{' (prefix match)' if f['is_prefix_match'] else ''}")
            if f["release"]
            else (f["name"], f["sha256"], "")
            for f in d["files"]
        ],
    )
    for note in d["notes"]:
        out.line(f"  - {note}")


def _clipped(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]!r}… ({len(text)} characters)"


def _architecture(d: Mapping[str, Any]) -> str:
    if d["architecture"]:
        return f"{d['architecture']}  ({d['claimed']})"
    return f"{d['claimed']}, which no plugin describes" if d["claimed"] else "not stated (no config.json)"


def _sizes(dims: Mapping[str, int], mechanisms: Sequence[str]) -> str | None:
    if not dims:
        return None
    before, after = ([f"{k} {dims[k]}" for k in names if k in dims] for names in (_BEFORE, _AFTER))
    return ", ".join([*before, *mechanisms, *after])


def _tokenizer(v: Mapping[str, Any]) -> str:
    added = f", {v['n_added']} of them added" if v["n_added"] else ""
    template = ", chat template" if v["has_chat_template"] else ", no chat template"
    return f"{v['kind']} ({v['file']}), {v['n_tokens']} tokens{added}{template}"


def _count(n: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.4g} {unit}"
    return str(n)
