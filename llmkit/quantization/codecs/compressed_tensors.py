"""compressed-tensors: what transformers and vLLM load without a further package.

    pack-quantized   weight_packed      int32 [out, ceil(in * bits / 32)]: the bits of all codes, the first lowest
                     weight_scale       floats [out, groups]
                     weight_zero_point  int32 [ceil(out * bits / 32), groups], packed along the output rows
                     weight_shape       int64 [2]
                     weight_g_idx       int32 [in], the group of each column (act-order)
    int-quantized    weight             int8 [out, in], codes minus 2^(bits-1)
                     weight_zero_point  int8 [out, groups], likewise
    float-quantized  weight             float8 [out, in], times weight_scale of the tensor, row, group or block
    nvfp4-, mxfp4-pack-quantized    see compressed_float4

All are read, and codes that do not divide a word also in the form before 0.18, with gaps: 32 // bits in a word.
`pack-quantized` is written, of 8 bits too: it is what the library infers for weight-only integers, and what servers
read as W8A16; and `float-quantized` with a scale for each row, whose activations are to be rounded to float8 token by
token, which is FP8_DYNAMIC of llm-compressor; `int-quantized` where inputs are int8, too (W8A8).

Source: compressed_tensors/compressors/pack_quantized of vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from llmkit.errors import InputError, RequirementError, SpecError
from llmkit.lazy_imports import torch
from llmkit.quantization.codec import (
    REMEDY,
    FolderCodec,
    Specs,
    StoredFolder,
    config_entry,
    error_context,
    meant_for,
    required,
)
from llmkit.quantization.codecs.compressed_float4 import FLOAT4_FORMATS, read_float4
from llmkit.quantization.codecs.compressed_groups import (
    FLOAT,
    INTEGER,
    PACKED,
    dynamic_inputs,
    grid_of,
    group_entry,
    group_of,
    groups_of,
)
from llmkit.quantization.float8 import FLOAT8, block_of, scaled_floats
from llmkit.quantization.matrix import Grid, QuantizedMatrix, Restorable
from llmkit.quantization.packing import n_words, pack_words, unpack_words
from llmkit.quantization.points import FP8, Points
from llmkit.quantization.words import codes_of, from_signed, group_order, to_signed, words_of
from llmkit.tensors.constant import constant_of
from llmkit.tensors.lazy import Apply, Lazy, Read
from llmkit.tensors.rearrange import view_as
from llmkit.tensors.spec import DType, TensorSpec

_PLAIN = (INTEGER, FLOAT, "naive-quantized")
_SUFFIXES = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
    "input_zero_point", "output_scale", "output_zero_point", "weight_global_scale", "input_global_scale",
)  # fmt: skip
_OF_CACHE = tuple(f".{part}_{what}" for part in "qkv" for what in ("scale", "zero_point"))


class CompressedTensors(FolderCodec):
    """Packed integers, and float8; activations that were meant to be quantized stay floats here."""

    name = "compressed-tensors"
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7, 8)
    group_sizes: ClassVar[tuple[int, ...]] = (16, 32, 64, 128, 256)
    points: ClassVar[tuple[Points, ...]] = (FP8,)
    holds_order = True
    mixes_zeros = False  # transformers 5 with compressed-tensors 0.20
    _rounds_inputs = False

    def __init__(self, inputs: Mapping[Grid, Any] | None = None) -> None:
        self._inputs = inputs or {}  # as a config says it, where it is not what goes with a grid

    def with_activations(self, kind: str) -> FolderCodec:
        if kind != "int8":
            raise InputError(f"--activations {kind}: expected int8", hint="--activations int8")
        return _Int8Inputs()

    def as_described(self, entry: Mapping[str, Any]) -> FolderCodec:
        inputs = [group.get("input_activations") for group in groups_of(entry)]
        are_int8 = all(isinstance(x, Mapping) and (x.get("type"), x.get("num_bits")) == ("int", 8) for x in inputs)
        return _Int8Inputs() if inputs and are_int8 else CompressedTensors(dynamic_inputs(entry))

    def write(self, matrix: QuantizedMatrix) -> dict[str, Lazy]:
        n_out, bits = matrix.shape[0], matrix.bits
        if matrix.grid.points is FP8:
            return {"weight": view_as(matrix.codes, DType.F8_E4M3, matrix.shape), "weight_scale": matrix.scales}
        parts = {
            "weight_packed": words_of(matrix),
            "weight_scale": matrix.scales,
            "weight_shape": _shape(matrix.shape),
        }
        if matrix.zeros is not None:
            per = _rows_in_word(bits)

            def fn(zeros: torch.Tensor) -> torch.Tensor:
                return pack_words(zeros.t(), bits).t().contiguous()

            spec = TensorSpec(DType.I32, (n_words(n_out, bits), matrix.n_groups))
            node = Apply("pack rows", [matrix.zeros], spec, fn, {"bits": bits}, row_step=per, output_rows=[per or 0])
            parts["weight_zero_point"] = node.output()
        if matrix.order is not None:
            parts["weight_g_idx"] = matrix.order
        return parts

    def settings(self, matrix: QuantizedMatrix) -> dict[str, Any]:
        return group_entry(matrix.grid, has_order=matrix.order is not None, rounds_inputs=self._rounds_inputs)

    def read(
        self, parts: Mapping[str, Lazy], settings: Mapping[str, Any], shape: tuple[int, int] | None
    ) -> QuantizedMatrix:
        if _is_float8(settings):
            matrix = _float8(parts, settings)
            if isinstance(matrix, QuantizedMatrix):
                return matrix
            raise RequirementError("float8 in blocks of rows, or with one scale, is no matrix on a grid", hint=REMEDY)
        grid = grid_of(settings.get("weights") or {})
        is_packed = settings.get("format") == PACKED
        scales = required(parts, "weight_scale")
        zeros = None if grid.is_symmetric else required(parts, "weight_zero_point")
        stored = required(parts, "weight_packed" if is_packed else "weight")
        n_out = stored.spec.n_rows
        if is_packed:
            n_in = _n_columns(parts, grid, shape)
            expected = TensorSpec(DType.I32, (n_out, _n_words_as_stored(stored.shape[-1], n_in, grid.bits)))
        else:
            n_in = stored.spec.row_nbytes
            expected = TensorSpec(DType.I8, (n_out, n_in))
        if stored.spec != expected:
            name = "weight_packed" if is_packed else "weight"
            raise SpecError(f"{name} is {stored.spec}; expected {expected} for {n_in} columns, {grid}")
        n_groups = grid.n_groups(n_in)
        if scales.shape not in ((n_out, n_groups), (n_out,)) or not scales.dtype.is_float:
            raise SpecError(f"weight_scale is {scales.spec}; expected floats [{n_out}, {n_groups}]")
        scales, order = view_as(scales, scales.dtype, (n_out, n_groups)), parts.get("weight_g_idx")
        return QuantizedMatrix(
            grid,
            (n_out, n_in),
            codes_of(stored, grid.bits, n_in) if is_packed else from_signed(stored, grid.bits),
            scales,
            _zeros(zeros, grid, scales, is_packed=is_packed) if zeros is not None else None,
            order=group_order(order, n_in, n_groups, grid.group_size or n_in) if order is not None else None,
        )

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        packed = [n for n in specs if n.endswith(".weight_packed")]
        if packed:
            return "", packed
        to_signed = [n for n, spec in specs.items() if n.endswith(".weight") and spec.dtype is DType.I8]
        scales = [specs.get(f"{n}_scale") for n in to_signed]
        # ChatGLM's have one number a row, and no second dimension.
        are_ours = [s is not None and s.dtype.is_float and len(s.shape) == 2 for s in scales]
        names = [name for name, is_ours in zip(to_signed, are_ours, strict=True) if is_ours]
        if names:
            return "int8", names
        if "config_groups" not in (config_entry(config) or {}):
            return None  # float8 without them, shapes tell its scales, is what `fp8` reads
        floats = [n for n, spec in specs.items() if spec.dtype in FLOAT8 and f"{n}_scale" in specs]
        return ("float8", floats) if floats else None

    def matrices(self, stored: StoredFolder) -> tuple[Mapping[str, Restorable], set[str]]:
        self._refuse_unread(stored)
        entry, tensors = stored.entry, stored.tensors
        groups = groups_of(entry)
        modules = [k.removesuffix(".weight_scale") for k in tensors if k.endswith(".weight_scale")]
        used = {f"{module}.{end}" for module in modules for end in _SUFFIXES}
        matrices: dict[str, Restorable] = {}
        for module in modules:
            name = f"{module}.weight"
            shape = stored.shapes.get(name, ())
            with error_context(module):
                settings = group_of(module, groups)
                parts = stored.parts(module, _SUFFIXES)
                if settings["format"] in FLOAT4_FORMATS:
                    matrices[name] = read_float4(parts, settings)
                    continue
                known = (shape[0], shape[1]) if len(shape) == 2 else None
                is_float8 = _is_float8(settings)
                matrices[name] = _float8(parts, settings) if is_float8 else self.read(parts, settings, known)
        unused = [k for k in tensors if k.endswith((".weight_packed", ".weight_shape")) and k not in used]
        if unused:
            raise SpecError(f"{stored.label}: {unused[0]} has no weight_scale beside it")
        if isinstance(entry.get("kv_cache_scheme"), Mapping):
            used |= {name for name in tensors if name.endswith(_OF_CACHE)}
        return matrices, used

    def _refuse_unread(self, stored: StoredFolder) -> None:
        label, entry = stored.label, stored.entry
        if not entry:
            raise RequirementError(
                f"{label} is quantized ({self.name}), and no config.json says by which scheme",
                hint="put the config.json of this model, with its quantization_config, beside the weights",
            )
        formats = [str(g.get("format")) for g in groups_of(entry)]
        for layout in formats:
            if layout not in (PACKED, *_PLAIN, *FLOAT4_FORMATS):
                raise RequirementError(
                    f"{label}: the {self.name} format {layout!r} is not read; expected {PACKED} or "
                    f"{' or '.join(_PLAIN[:2])}",
                    hint=REMEDY,
                )
        if entry.get("transform_config"):
            raise RequirementError(
                f"{label}: its weights were rotated (transform_config), which is not undone", hint=REMEDY
            )
        if not formats and not entry.get("kv_cache_scheme"):
            raise SpecError(f"{label}: quantization_config has no config_groups")

    def describe(
        self,
        matrices: Mapping[str, QuantizedMatrix],
        ignore: Sequence[str],
        *,
        are_all: bool,
        experts: Collection[str] = (),
    ) -> dict[str, Any]:
        # The first kind has the class where it can, the others the names of their modules, which go before it. It is
        # the most frequent, or that of experts: transformers reads all of them by the first group that names a class.
        named: dict[tuple[Grid, bool], list[str]] = {}
        for module, matrix in matrices.items():
            named.setdefault((matrix.grid, matrix.order is not None), []).append(module)
        ranked = sorted(named, key=lambda kind: (not any(m in experts for m in named[kind]), -len(named[kind])))
        targets = [["Linear"] if are_all and i == 0 else named[kind] for i, kind in enumerate(ranked)]
        # transformers 5 decompresses while it loads. Left packed, modules have no `weight`, which the classes of some
        # families read (Falcon's forward, RWKV's initialization), and compressed-tensors 0.18 to 0.20 expects zero
        # points of another shape than it writes. 4.57 loads zero points with compressed-tensors 0.14 to 0.17. What
        # decompresses while loading reads all matrices by the first group, so several grids stay packed.
        groups = [group_entry(g, has_order=has_order, rounds_inputs=self._rounds_inputs) for g, has_order in ranked]
        for group, (grid, _) in zip(groups, ranked, strict=True):
            group["input_activations"] = self._inputs.get(grid, group["input_activations"])
        is_mixed = len({group["format"] for group in groups}) > 1
        return {
            "quant_method": self.name,
            "format": "mixed-precision" if is_mixed else groups[0]["format"],
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": {"targets": those, **{key: group[key] for key in group if is_mixed or key != "format"}}
                for i, (group, those) in enumerate(zip(groups, targets, strict=True))
            },
            "ignore": list(ignore) if are_all else [],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            **({"run_compressed": False} if len({grid for grid, _ in ranked}) == 1 else {}),
        }  # fmt: skip

    def warnings(self, stored: StoredFolder) -> list[str]:
        keys = ("input_activations", "output_activations")
        activations = [key for group in groups_of(stored.entry) for key in keys if group.get(key)]
        activations += ["kv_cache_scheme"] if stored.entry.get("kv_cache_scheme") else []
        if not activations:
            return []
        return [meant_for(f"quantized {', '.join(dict.fromkeys(activations))}")]

    def notes(self, matrices: Mapping[str, QuantizedMatrix], experts: Collection[str] = ()) -> list[str]:
        notes, grids = [], {matrix.grid for matrix in matrices.values()}
        of_experts = {matrices[name].grid for name in experts if name in matrices}
        if len(of_experts) > 1:
            words = " and ".join(sorted(map(str, of_experts)))
            notes.append(f"transformers 5 reads all experts by one grid, and these have {words}: llmkit reads them")
        if len(grids) > 1 and any(grid.points is FP8 for grid in grids):
            notes.append(
                "transformers 5 rounds the inputs of fp8 layers to float8, too, where others have another grid; "
                "llmkit does not"
            )
        if len(grids) > 1 and any(not grid.is_symmetric for grid in grids):
            notes.append("transformers 5 loads several grids without zero points only (--symmetric); llmkit loads both")
        elif any(not matrices[name].grid.is_symmetric for name in experts if name in matrices):
            notes.append("transformers 5 loads experts without zero points only (--symmetric); llmkit loads both")
        elif any(not grid.is_symmetric for grid in grids):
            notes.append(
                "zero points load in transformers 5; transformers 4.57 needs compressed-tensors 0.14 to 0.17 for them"
            )
        if any(matrix.order is not None for matrix in matrices.values()):
            notes.append("newer versions of compressed-tensors refuse groups by act-order; --format gptq has them, too")
        if any(32 % grid.bits for grid in grids):
            notes.append("codes of 3, 5, 6 and 7 bits load with compressed-tensors 0.18 and later")
        if any(grid.group_size not in (None, 32, 64, 128) or grid.bits not in (4, 8) for grid in grids):
            notes.append("vLLM's kernels read 4 and 8 bits in groups of 32, 64, 128 or a row; transformers reads all")
        return notes


class _Int8Inputs(CompressedTensors):
    """Codes as signed bytes, one scale a row; inputs rounded to int8 as they come, each token on its own range."""

    bits = (8,)
    group_sizes = ()
    points = ()
    holds_zeros = False
    holds_order = False
    prefers_symmetric = True
    _rounds_inputs = True

    def refuses(self, matrix: QuantizedMatrix) -> str | None:
        is_held = matrix.grid == Grid(8) and matrix.order is None and super().refuses(matrix) is None
        return None if is_held else "where inputs are int8, weights have 8 bits, one scale a row and no zero point"

    def write(self, matrix: QuantizedMatrix) -> dict[str, Lazy]:
        return {"weight": to_signed(matrix.codes), "weight_scale": matrix.scales}

    def notes(self, matrices: Mapping[str, QuantizedMatrix], experts: Collection[str] = ()) -> list[str]:
        notes = ["transformers and llmkit restore weights; inputs are rounded by engines with kernels for it (vLLM)"]
        if any(name in matrices for name in experts):
            notes.append("transformers 5 does not read int8 of experts that is not packed; llmkit and vLLM read it")
        return notes


@lru_cache  # there may be thousands of experts, all of one shape
def _shape(shape: tuple[int, int]) -> Lazy:
    return constant_of(shape, DType.I64, (2,))


def _is_float8(group: Mapping[str, Any]) -> bool:
    weights = group.get("weights")
    return isinstance(weights, Mapping) and (weights.get("type"), weights.get("num_bits")) == ("float", 8)


def _float8(parts: Mapping[str, Lazy], group: Mapping[str, Any]) -> Restorable:
    values = required(parts, "weight")
    if values.dtype not in FLOAT8:
        raise SpecError(f"weight is {values.spec}; expected float8", hint=REMEDY)
    return scaled_floats(values, required(parts, "weight_scale"), block_of(group["weights"], values.shape))


def _n_columns(parts: Mapping[str, Lazy], grid: Grid, shape: tuple[int, int] | None) -> int:
    """Columns of the float weight. Words may be padded, so a row of words alone does not tell."""
    n = parts["weight_packed"].shape[-1]
    if grid.group_size is not None:
        return parts["weight_scale"].shape[-1] * grid.group_size
    if shape is not None and _n_words_as_stored(n, shape[1], grid.bits) == n:
        return shape[1]
    stored = parts.get("weight_shape")
    if stored is not None and isinstance(stored.node, Read):  # two numbers, no data to speak of
        return int(stored.load()[-1])
    return n * 32 // grid.bits


def _n_words_as_stored(n_stored: int, n: int, bits: int) -> int:
    """Words that `n` codes take: with gaps where as many are stored, otherwise without."""
    with_gaps = -(-n // (32 // bits))
    return with_gaps if n_stored == with_gaps else n_words(n, bits)


def _rows_in_word(bits: int) -> int | None:
    """Output rows whose zero points share a word; None where they cross words."""
    return None if 32 % bits else 32 // bits


def _zeros(stored: Lazy, grid: Grid, scales: Lazy, *, is_packed: bool) -> Lazy:
    """Zero points, uint8 [out, groups]."""
    (n_out, n_groups), per = scales.shape, _rows_in_word(grid.bits)
    expected = TensorSpec(DType.I8, scales.shape)
    if is_packed:
        expected = TensorSpec(DType.I32, (_n_words_as_stored(stored.spec.n_rows, n_out, grid.bits), n_groups))
    if stored.spec != expected:
        raise SpecError(f"weight_zero_point is {stored.spec}; expected {expected}")
    if not is_packed:
        return from_signed(stored, grid.bits, are_packed=False)

    def fn(words: torch.Tensor, of_rows: torch.Tensor) -> torch.Tensor:
        return unpack_words(words.t(), grid.bits, len(of_rows)).t().contiguous()

    # The scales tell how many rows a slice has: the last word may be for fewer than it has codes.
    spec = TensorSpec(DType.U8, scales.shape)
    step = None if per is None else 1
    attrs, input_rows = grid.attrs(), [per or 0, 1]
    return Apply("zero points", [stored, scales], spec, fn, attrs, row_step=step, input_rows=input_rows).output()


CODEC = CompressedTensors()
