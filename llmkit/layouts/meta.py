"""The layout of Meta's releases: `consolidated.NN.pth`, one file for each model-parallel rank, and params.json.

Rows of q, k, v, gate, up and of the output lie distributed over the files, columns of the others; norms are in every
file. The embedding is split by columns, since Llama 3 by rows. Rotary pairs are interleaved. The last file holds the
remaining rows where the vocabulary does not divide (49,953 rows over two: 24,976 and 24,977).

Source: facebookresearch/llama (llama/model.py), transformers' convert_llama_weights_to_hf.py, ymcui's merge scripts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmkit.architecture import registry
from llmkit.architecture.names import Names, NameTable
from llmkit.errors import InputError, counted, listing
from llmkit.formats import torch_pickle
from llmkit.formats.torch_zip import TorchNamedFiles
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.described import with_config_beside
from llmkit.layouts.layout import Layout, OpenedLayout, Spelling, WrittenLayout, commonest_dtype, to_hf, weights_for
from llmkit.layouts.params import PARAMS, config_of, params_of
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.moving import TakeRows
from llmkit.tensors.rearrange import gather_rows, join_columns, split_columns
from llmkit.tensors.spec import DType

NAME = "meta"
_FILE = re.compile(r"consolidated\.(\d\d)\.pth")
SPELLING = Spelling(
    Names(
        embed="tok_embeddings",
        final_norm="norm",
        head="output",
        block="layers.{i}.",
        slots={
            "attn_norm": "attention_norm",
            "attn.q": "attention.wq",
            "attn.k": "attention.wk",
            "attn.v": "attention.wv",
            "attn.o": "attention.wo",
            "mlp_norm": "ffn_norm",
            "mlp.gate": "feed_forward.w1",
            "mlp.down": "feed_forward.w2",
            "mlp.up": "feed_forward.w3",
        },
        ignored=("rope.freqs", "*.rope.freqs"),
    ),
    "interleaved",
)
_TABLE = NameTable(SPELLING.names)
_BY_COLUMNS = ("attn.o.weight", "mlp.down.weight")
_BY_ROWS = (
    "attn.q.weight", "attn.k.weight", "attn.v.weight", "mlp.gate.weight", "mlp.up.weight", "head.weight",
)  # fmt: skip
_MOST_FILES = 100  # two digits in their names
_ROWS_THETA = 500000.0  # of Llama 3, whose embedding is split by rows


def find(candidate: Candidate) -> OpenedLayout | None:
    """What a folder of consolidated.NN.pth holds, or a file of such a folder; None for anything else.

    Raises:
        InputError: a file is missing, params.json is, or it contradicts the tensors.
    """
    folder, files = candidate.folder, candidate.own_files(_FILE)
    if not files:
        return None
    if not (folder / PARAMS).is_file():
        if len(files) == 1:
            return None  # its tensors under their own names; without params.json no model
        raise InputError(
            f"{folder} holds {len(files)} consolidated files and no {PARAMS}",
            hint=f"put the {PARAMS} of this model into {folder}",
        )
    return _read(candidate, files)


def _read(candidate: Candidate, files: Sequence[Path]) -> OpenedLayout:
    folder = candidate.folder
    where = str(folder / PARAMS)
    params = candidate.json(PARAMS)
    numbers = [int(p.name[13:15]) for p in files]
    absent = [f"consolidated.{i:02d}.pth" for i in range(max(numbers) + 1) if i not in numbers]
    shards = [torch_pickle.read(p) for p in files]
    n = _count_expected(params, shards[0], len(files) + len(absent))
    if n > _MOST_FILES:
        raise InputError(
            f"{where}: dim is {params['dim']!r:.60}, of which a file holds {params['dim'] // n}: too many files",
            hint="give the params.json of this model",
        )
    absent += [f"consolidated.{i:02d}.pth" for i in range(max(numbers) + 1, n)]
    if absent or n != len(files):
        what = f"{listing(absent)} missing" if absent else f"found {len(files)}"
        raise InputError(
            f"{folder}: the tensors are shares of {n} files: {what}",
            hint="download the missing files" if absent else "remove the files of another model",
        )
    tensors = _joined(folder, files, shards, params.get("dim"))
    head, gate = tensors.get("output.weight"), tensors.get("layers.0.feed_forward.w1.weight")
    if head is None or gate is None:
        raise InputError(f"{files[0]}: no output.weight or no layers.0.feed_forward.w1.weight: not this layout")
    dtype = commonest_dtype(tensors)
    config = config_of(where, params, head.spec.n_rows, gate.spec.n_rows, dtype)
    notes = [f"read from Meta's layout: {counted(len(files), 'consolidated file')} and {PARAMS}"]
    beside = with_config_beside(candidate, str(folder), config)
    if beside is None:
        notes.append(f"{PARAMS} does not state the context: {config['max_position_embeddings']} tokens assumed")
    config = beside or config
    files_above: dict[str, Path | bytes] = {}
    above = folder.resolve().parent / "tokenizer.model"  # where Meta's download puts it
    if not (folder / above.name).is_file() and above.is_file():
        files_above[above.name] = above
    return OpenedLayout(
        NAME, to_hf(str(folder), tensors, config, SPELLING), config, files_above, own=(PARAMS,), notes=tuple(notes)
    )


def _count_expected(params: Mapping[str, Any], shard: Mapping[str, Lazy], n_files: int) -> int:
    """How many files there should be: the output projection takes `dim` columns in all."""
    lazy, dim = shard.get("layers.0.attention.wo.weight"), params.get("dim")
    if lazy is None or len(lazy.shape) != 2 or not isinstance(dim, int) or not lazy.shape[1] or dim % lazy.shape[1]:
        return n_files
    return dim // lazy.shape[1]


def _joined(folder: Path, files: Sequence[Path], shards: Sequence[Mapping[str, Lazy]], dim: object) -> dict[str, Lazy]:
    for path, shard in zip(files[1:], shards[1:], strict=True):
        if shard.keys() != shards[0].keys():
            odd = [n for n in [*shard, *shards[0]] if n not in shard or n not in shards[0]]
            raise InputError(
                f"{folder}: {path.name} and {files[0].name} do not hold the same tensors: {listing(odd)}",
                hint="download both again: they are of different models",
            )
    return {name: _join(name, [shard[name] for shard in shards], dim) for name in shards[0]}


def _join(name: str, parts: Sequence[Lazy], dim: object) -> Lazy:
    slot = _TABLE.slot(name) or ""
    leaf = re.sub(r"^layers\.\d+\.", "", slot)
    if len(parts) == 1 or not parts[0].shape:
        return parts[0]
    if leaf in _BY_COLUMNS or (leaf == "embed.weight" and parts[0].shape[-1] != dim):
        return join_columns(parts)
    if leaf in _BY_ROWS or leaf == "embed.weight":
        return gather_rows(parts, [(i, 0, p.spec.n_rows) for i, p in enumerate(parts)])
    return parts[0]


def write(tensors: Mapping[str, Lazy], config: Mapping[str, Any], model_parallel: int = 1) -> WrittenLayout:
    """A checkpoint as Meta would have released it.

    Args:
        model_parallel: number of files; 1, 2, 4 and 8 for the first LLaMA's 7B, 13B, 33B and 65B.

    Raises:
        RequirementError: a model that params.json cannot describe.
        InputError: a number of files that does not divide the model.
    """
    plain = registry.require_model(config, f"--to {NAME}")
    params = params_of(plain)
    described = config_of(PARAMS, params, plain.dims.vocab, plain.dims.ffn, DType.F32)
    model, weights = weights_for(NAME, tensors, config, described, SPELLING)
    weights.setdefault("head.weight", weights["embed.weight"])
    sizes = {"heads": model.dims.heads, "key/value heads": model.dims.kv_heads, "feed-forward size": model.dims.ffn}
    for what, size in sizes.items():
        if model_parallel < 1 or size % model_parallel:
            fitting = [n for n in range(1, 17) if all(s % n == 0 for s in sizes.values())]
            raise InputError(
                f"--model-parallel {model_parallel}: {size} {what} do not divide into {model_parallel} files",
                hint=f"--model-parallel {' or '.join(map(str, fitting))} fits",
            )
    is_by_rows = params.get("rope_theta") == _ROWS_THETA
    names = [f"consolidated.{i:02d}.pth" for i in range(model_parallel)]
    files: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    written: dict[str, Lazy] = {}
    for slot_id, lazy in weights.items():
        inner = _TABLE.name(slot_id)
        for file, piece in zip(names, _pieces(slot_id, lazy, model_parallel, is_by_rows), strict=True):
            written[f"{file}/{inner}"] = piece
            files[file].append((f"{file}/{inner}", inner))
    return WrittenLayout(
        written,
        TorchNamedFiles(files),
        {PARAMS: (json.dumps(params) + "\n").encode()},
        (f"{counted(model_parallel, 'consolidated file')}; config.json goes along for what "
         f"{PARAMS} does not state",),
    )  # fmt: skip


def _pieces(slot_id: str, lazy: Lazy, n: int, is_embedding_by_rows: bool) -> Sequence[Lazy]:
    leaf = re.sub(r"^layers\.\d+\.", "", slot_id)
    if leaf in _BY_COLUMNS or (leaf == "embed.weight" and not is_embedding_by_rows):
        return split_columns(lazy, n)
    if leaf in _BY_ROWS or leaf == "embed.weight":
        share = lazy.spec.n_rows // n
        edges = [*(i * share for i in range(n)), lazy.spec.n_rows]
        return [TakeRows(lazy, a, b).output() if n > 1 else lazy for a, b in pairwise(edges)]
    return [lazy] * n


LAYOUT = Layout(
    NAME,
    find,
    write,
    "Meta's consolidated.NN.pth and params.json",
    ("model_parallel",),
    (SPELLING,),
    has_own_format=True,
)
