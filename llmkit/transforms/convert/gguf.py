"""A checkpoint as a GGUF file: names and row orders of llama.cpp, metadata, vocabulary, matrices in one type."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.architecture import registry
from llmkit.architecture.architecture import Architecture
from llmkit.architecture.difference import difference
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import as_bool, as_key
from llmkit.architecture.model import Model
from llmkit.architecture.storage import normalized_rows
from llmkit.architecture.tokenizers import TokenizerKind
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.statistics import StoredStatistics, gguf_spelling
from llmkit.checkpoint.text_part import float_text_part
from llmkit.errors import InputError, LlmkitError, RequirementError, listing, suggestion
from llmkit.formats.gguf_container import GgufContainer
from llmkit.formats.gguf_types import TYPE_BY_NAME
from llmkit.layouts.gguf import SOURCE_DTYPE
from llmkit.layouts.gguf_forms import fold_multipliers
from llmkit.layouts.gguf_presets import EMBEDDING, HEAD, PRESETS, Sizes, fitting_type, is_matrix, types_of
from llmkit.layouts.gguf_values import NOTED, architecture_of, config_of, metadata_of, rope_factors
from llmkit.layouts.gguf_weights import lists_to_metadata, to_gguf
from llmkit.quantization.codecs.gguf import as_blocks, quantized
from llmkit.quantization.matrix import is_dequantized
from llmkit.tensors.constant import constant_of
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.moving import Stack
from llmkit.tensors.spec import DType
from llmkit.tensors.vectors import cast_vector
from llmkit.tokenization.to_gguf import vocabulary_metadata
from llmkit.transforms.convert.casting import Overflow, cast
from llmkit.transforms.convert.gguf_recipe import as_filed, source_names, types_by_recipe
from llmkit.transforms.recipe import Recipe

TYPE_NAMES = tuple(name.lower() for name in PRESETS)
_USUAL = {2: "q2_k", 3: "q3_k_m", 4: "q4_k_m", 5: "q5_k_m", 6: "q6_k", 8: "q8_0"}
OF_BITS = {bits: {"type": name} for bits, name in _USUAL.items()}
_FLOATS = "F16"
_KEPT = {"MXFP4": 38}  # types that matrices keep and nothing is rounded to, by llama.cpp's number for such files
_KEPT_FILES = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "README.md")


def write(
    ckpt: Checkpoint,
    *,
    type: str | None = None,
    statistics: StoredStatistics | None = None,
    requantize: bool = False,
    recipe: Recipe | None = None,
    overflow: Overflow | None = None,
) -> Checkpoint:
    """The checkpoint as one GGUF file, `<label>-<TYPE>.gguf`.

    Vectors and norms are float32, as llama.cpp wants them. Matrices have the types that llama.cpp's preset of this name
    gives them, and where a block does not divide the rows, the type that takes its place there.

    Codes and scales of a quantized checkpoint stay where blocks of the type hold them.

    Args:
        type: one of `TYPE_NAMES`. None: blocks that hold a quantized matrix value for value, and f16 for the others.
        statistics: of the inputs of its matrices: errors of columns with large inputs count more.
        requantize: quantized matrices that blocks of the type do not hold may be rounded again.
        recipe: types of single matrices, by their names in the file or in the checkpoint.
        overflow: counts values that a plain type cannot hold; a block type whose scale cannot raises when written.

    Raises:
        InputError: no such type.
        RequirementError: llama.cpp does not know the family, metadata cannot say what the model is, or quantized
            matrices would be rounded again (without `requantize`).
        SpecError: the tensors do not fit the config.
    """
    preset = _type(type or _FLOATS)
    ckpt = float_text_part(ckpt, dtype=DType.F32)  # rounded once, to what is stored
    importance = _importance(statistics, ckpt) if statistics is not None else {}
    config, filed = dict(ckpt.config), as_filed(ckpt)
    has_copied_head, ckpt = filed is not ckpt, filed
    model, family, tokenizer = _known(ckpt)
    tensors, model, notes = _folded(ckpt, model, family)
    if has_copied_head:
        notes.append("the embedding is stored twice: llama.cpp wants a head of its own")
    factors = {n: constant_of(values, DType.F32, (len(values),)) for n, values in rope_factors(model).items()}
    stored, lists = lists_to_metadata(to_gguf(tensors, model, family), family)
    stored |= factors
    values, warnings = metadata_of(model, config, family)
    metadata = {
        "general.architecture": family.arch,
        "general.type": "model",
        "general.name": ckpt.label,
        **values,
        **lists,
    }
    sizes = sizes_of(model, family, has_statistics=statistics is not None)
    types, wanted = types_of(PRESETS[preset], {name: lazy.shape for name, lazy in stored.items()}, sizes)
    chosen: dict[str, str] = {}
    if recipe:
        matrices = {name: lazy.shape for name, lazy in stored.items() if is_matrix(name, lazy.shape)}
        asked = types_by_recipe(recipe, matrices, source_names(ckpt, model))
        chosen = {name: fitting_type(kind, matrices[name][-1]) for name, kind in asked.items()}
        wanted = {name: kind for name, kind in {**wanted, **asked}.items() if kind != chosen.get(name)}
    notes += _replaced({**types, **chosen}, wanted)
    kind, types, same = _with_kept(stored, preset, types, chosen, keeps_blocks=type is None)
    metadata |= _noted(model, config, family, metadata, stored, types)
    others = [name for name, lazy in stored.items() if name not in same and is_dequantized(lazy)]
    notes += _what_became(ckpt.label, kind, types, list(same), others, requantize=requantize)
    if statistics is not None:
        notes += _unweighted(statistics, gguf_spelling(ckpt, model), types, same, importance)
    vocabulary, more = vocabulary_metadata(
        ckpt.label, ckpt.files, config, model.dims.vocab, kind=tokenizer, pre=family.tokenizer_pre
    )
    metadata |= {"general.file_type": _file_type(kind), **_source_dtype(ckpt)}
    metadata |= {"general.quantization_version": 2, **vocabulary}
    name = f"{ckpt.label}-{kind}.gguf"
    overflow = overflow if overflow is not None else Overflow()
    return ckpt.derive(
        tensors={
            name: same[name]
            if name in same
            else _stored(name, lazy, types[name], overflow, importance.get(name) or [None])
            for name, lazy in stored.items()
        },
        config={},
        files={n: content for n, content in ckpt.files.items() if n in _KEPT_FILES},
        container=GgufContainer(name, metadata, types),
        notes=[*notes, f"{name}: {len(stored)} tensors, {_counts(types)}"],
        warnings=[*model.unread.warnings, *warnings, *more],
    )


def _known(ckpt: Checkpoint) -> tuple[Model, GgufFamily, TokenizerKind | None]:
    """The model, what llama.cpp knows of its family, and its published tokenizer.

    Raises:
        RequirementError: llama.cpp does not know the family, or cannot run this model of it.
        SpecError: the tensors do not fit the config.
    """
    architecture = registry.require(dict(ckpt.config), ckpt.label)
    family = architecture.gguf
    if family is None:
        raise RequirementError(
            f"{ckpt.label} is of the {architecture.name} architecture, which llama.cpp does not know",
            hint="--to hf or --to bin holds any",
        )
    model = ckpt.require_model()
    model.unread.raise_if_refused(ckpt.label)
    model.check(ckpt.specs).raise_if_bad(ckpt.label)
    why = family.refuses(model) if family.refuses is not None else None
    if why is not None:
        raise RequirementError(f"llama.cpp cannot run this {architecture.name} model: {why}", hint="--to hf holds any")
    return model, family, architecture.tokenizer


def _folded(ckpt: Checkpoint, model: Model, family: GgufFamily) -> tuple[dict[str, Lazy], Model, list[str]]:
    """The tensors with what llama.cpp does not compute multiplied into them, the model that they are, and notes."""
    notes = []
    tensors, folded = fold_multipliers(ckpt.tensors, model, family)
    if folded is not model:
        notes.append("the multipliers of config.json are multiplied into the weights, as llama.cpp has them")
    if as_bool(folded.head.normalized):
        head = folded.name_of("head.weight")
        tensors[head] = normalized_rows(tensors[head])
        notes.append("the rows of the head are divided by their norms, as the original does at run time")
    return tensors, folded, notes


def _with_kept(
    stored: Mapping[str, Lazy], kind: str, types: Mapping[str, str], chosen: Mapping[str, str], *, keeps_blocks: bool
) -> tuple[str, dict[str, str], dict[str, Lazy]]:
    """The type that names the file, the type of each tensor, and the quantized matrices whose blocks stay as they are.

    Args:
        kind, types: of the preset.
        chosen: of single tensors, by a recipe.
        keeps_blocks: blocks that hold a quantized matrix value for value go before the preset.
    """
    blocks = {name: block_type for name, lazy in stored.items() if (block_type := as_blocks(lazy)) is not None}
    held = {name: block_type for name, (block_type, _) in blocks.items()}
    types = {**types, **(held if keeps_blocks else {}), **chosen}
    if keeps_blocks and (named := chosen or held):
        kind = Counter(named.values()).most_common(1)[0][0]
    return kind, types, {name: lazy for name, (block_type, lazy) in blocks.items() if block_type == types[name]}


def _type(text: str) -> str:
    if text.lower() in TYPE_NAMES:
        return text.upper()
    raise InputError(
        f"--type {text!r} is no type that llmkit writes; expected {', '.join(TYPE_NAMES)}",
        hint=suggestion(text.lower(), TYPE_NAMES, "--type q4_k_m", "--type "),
    )


def _noted(
    model: Model,
    config: Mapping[str, Any],
    family: GgufFamily,
    metadata: Mapping[str, Any],
    stored: Mapping[str, Lazy],
    types: Mapping[str, str],
) -> dict[str, str]:
    """Keys of config.json that the metadata cannot express and readers need for the same model; mostly none.

    A head that the file has as a copy of the embedding is noted as tied, where both have one type.

    Raises:
        RequirementError: the metadata cannot say what the model is; the first difference is named.
    """
    reader = architecture_of(metadata, stored)
    if reader is None or reader.gguf is None:
        raise RequirementError(f"no plugin reads GGUF's {family.arch!r}")
    constants = rope_factors(model)
    restored = config_of(metadata, reader, reader.gguf, stored, model.dims.vocab, constants.get)
    noted = {key: config[key] for key in family.noted if key in config and config[key] != restored.get(key)}
    if stored.get(HEAD) is stored[EMBEDDING] and types[HEAD] == types[EMBEDDING]:
        noted |= dict.fromkeys(as_key(reader.head.tied).spellings[:1], True)
    plain = replace(model, head=replace(model.head, normalized=False))
    differs = _difference(plain, reader, restored | noted)
    if differs is not None:
        raise RequirementError(
            f"--to gguf cannot hold this {model.family} model: {differs}", hint="--to hf or --to bin holds any"
        )
    return {NOTED: json.dumps(noted)} if noted else {}


def _difference(model: Model, reader: Architecture, config: Mapping[str, Any]) -> str | None:
    try:
        back = reader.bind(config)
    except LlmkitError as error:
        return error.message
    return difference(model, replace(back, head=replace(back.head, normalized=False)))


def sizes_of(model: Model, family: GgufFamily, *, has_statistics: bool) -> Sizes:
    """What the presets' rules ask of a model."""
    dims = model.dims
    return Sizes(dims.layers, dims.heads // dims.kv_heads, family.is_robust, has_statistics)


def _replaced(types: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Which types gave way because blocks do not divide the rows."""
    counts = Counter((kind, types[name]) for name, kind in wanted.items())
    return [
        f"{_matrices(n)} whose rows are no multiple of {TYPE_BY_NAME[kind].block} stored as {other} instead of {kind}"
        for (kind, other), n in counts.items()
    ]


def _what_became(
    label: str, kind: str, types: Mapping[str, str], same: Sequence[str], others: Sequence[str], *, requantize: bool
) -> list[str]:
    """What became of quantized matrices: `same` keep their codes and scales, `others` do not.

    Raises:
        RequirementError: some would be rounded again, and that was not asked for.
    """
    rounded = [name for name in others if TYPE_BY_NAME[types[name]].dtype is None]
    if rounded and not requantize:
        raise RequirementError(
            f"{label}: --type {kind.lower()} would round {len(rounded)} of {len(same) + len(others)} quantized "
            f"matrices again ({listing(rounded, 2)})",
            hint="--requantize rounds them; without --type, what no block holds becomes f16",
        )
    counts = Counter(types[name] for name in others if name not in rounded)
    notes = [f"every code and scale stays in {_matrices(len(same))}"] if same else []
    notes += [f"{_matrices(n)} became {float_kind}" for float_kind, n in counts.items()]
    return notes + ([f"rounded again: {_matrices(len(rounded))}"] if rounded else [])


def _matrices(n: int) -> str:
    return f"{n} {'matrices' if n > 1 else 'matrix'}"


def _file_type(kind: str) -> int:
    """llama.cpp's number for files whose matrices are mostly of this type."""
    if kind in _KEPT:
        return _KEPT[kind]
    return next(
        (mix.file_type for name, mix in PRESETS.items() if kind in (name, mix.type)), PRESETS[_FLOATS].file_type
    )


def _counts(types: Mapping[str, str]) -> str:
    return ", ".join(f"{n} as {kind}" for kind, n in Counter(types.values()).most_common())


def _importance(statistics: StoredStatistics, ckpt: Checkpoint) -> dict[str, list[Lazy | None]]:
    """What was measured of the inputs of each tensor, by its name in GGUF files; of each matrix that it stacks."""
    slots = gguf_spelling(ckpt, ckpt.require_model()).slots.values()
    matrices = {s.name: [s.of_stack(e) for e in range(s.stack)] if s.stack else [s] for s in slots}
    return {name: [statistics.squares(matrix) for matrix in each] for name, each in matrices.items()}


def _unweighted(
    statistics: StoredStatistics,
    model: Model,
    types: Mapping[str, str],
    same: Mapping[str, Lazy],
    importance: Mapping[str, Sequence[Lazy | None]],
) -> list[str]:
    """That matrices of the blocks are rounded with no statistics, or not with those of all experts; mostly nothing."""
    layers = {slot.name for slot in model.slots.values() if slot.layer is not None}  # by the names in the file
    rounded = [n for n, kind in types.items() if n in layers and n not in same and TYPE_BY_NAME[kind].dtype is None]
    gap = statistics.gap([name for name in rounded if None in importance.get(name, [None])])
    return [f"{statistics.label} {gap}"] if gap else []


def _stored(name: str, lazy: Lazy, kind: str, overflow: Overflow, importance: Sequence[Lazy | None] = (None,)) -> Lazy:
    dtype = TYPE_BY_NAME[kind].dtype
    if dtype is DType.F32 and lazy.dtype is not DType.F64:
        return cast_vector(lazy, dtype)
    if dtype is not None:
        return cast({name: lazy}, dtype, overflow)[name]
    if isinstance(lazy.node, Stack):
        matrices = lazy.node.inputs
        each = importance if len(importance) == len(matrices) else [None] * len(matrices)  # stacked in files alone
        pairs = zip(matrices, each, strict=True)
        return Stack([quantized(matrix, kind, name, squares) for matrix, squares in pairs]).output()
    return quantized(lazy, kind, name, importance[0])


def _source_dtype(ckpt: Checkpoint) -> dict[str, str]:
    dtypes = {lazy.dtype for lazy in ckpt.tensors.values()}
    only = next(iter(dtypes))
    return {SOURCE_DTYPE: only.torch_name} if len(dtypes) == 1 and only in (DType.F16, DType.BF16) else {}
