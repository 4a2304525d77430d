"""GPTQ, as AutoGPTQ, GPTQModel and, since 2023, GPTQ-for-LLaMa store it.

    qweight  int32 [in * bits / 32, out]: the bits of a column's codes one after the other, the first lowest
    qzeros   int32 [groups, out * bits / 32], packed along the outputs: zero points, in the first version minus 1
    scales   floats [groups, out]
    g_idx    int32 [in], the group of each column (act-order); its older files have none

GPTQ-for-LLaMa's files of March 2023 have `zeros`, floats [out, 1], which are zero points times scales, and scales
[out, 1]. No file says how many bits there are; shapes do.

The first version takes 1 from whole words, so that a zero point of 0 borrows from its neighbour; adding whole words
undoes that, as GPTQModel does. Kernels that add 1 to each field read another number there: it is not written.
Source: gptqmodel/nn_modules/qlinear and gptqmodel/utils/model.py of ModelCloud/GPTQModel.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llmkit.errors import InputError, SpecError, listing
from llmkit.lazy_imports import torch
from llmkit.quantization.codec import FolderCodec, Specs, StoredFolder, required
from llmkit.quantization.codecs.qweight import QweightCodec, group_size
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.packing import n_words, pack_words, unpack_words
from llmkit.quantization.words import codes_of, group_order, words_of, zero_points
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import sliceable, transpose
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.version import __version__

_TELLING = ("qweight", "scales", "qzeros")


class Gptq(QweightCodec):
    """The first version, which AutoGPTQ began with and most engines read."""

    name = "gptq"
    bits = (2, 3, 4, 8)
    group_sizes = (16, 32, 64, 128, 256, 512, 1024)
    holds_order = True
    lowest_zero = 1
    takes_conv1d = True
    prefers_symmetric = True
    config_file = "quantize_config.json"
    form_key, forms = "checkpoint_format", ("gptq", "gptq_v2")

    def refuses(self, matrix: QuantizedMatrix) -> str | None:
        odd = [f"{n} {what}" for n, what in zip(matrix.shape, ("outputs", "inputs"), strict=True) if n % 32]
        return super().refuses(matrix) or (f"{' and '.join(odd)} do not fill words of 32 bits" if odd else None)

    def write(self, matrix: QuantizedMatrix) -> dict[str, Lazy]:
        (n_out, n_in), bits, lowest = matrix.shape, matrix.bits, self.lowest_zero

        def pack(zeros: torch.Tensor) -> torch.Tensor:
            if bool((zeros < lowest).any()):
                raise InputError(
                    "a group has the zero point 0 (its weights are all positive), which the first version of GPTQ, "
                    "storing it minus 1, cannot hold",
                    hint="--format gptq_v2 (convert: --to gptq_v2) holds it; --symmetric has no such zero points",
                )
            return pack_words((zeros - lowest).t(), bits)

        spec = TensorSpec(DType.I32, (matrix.n_groups, n_words(n_out, bits)))
        return {
            "qweight": transpose(words_of(matrix)),
            "qzeros": Apply("pack", [zero_points(matrix)], spec, pack, {"minus": lowest}, row_step=None).output(),
            "scales": transpose(matrix.scales),
            "g_idx": matrix.order or _neighbours(n_in, matrix.group),
        }

    def as_described(self, entry: Mapping[str, Any]) -> FolderCodec:
        return CODEC if _is_first(entry) else CODEC_V2

    def settings(self, matrix: QuantizedMatrix) -> dict[str, Any]:
        return self.describe({"": matrix}, [], are_all=True)

    def read(
        self, parts: Mapping[str, Lazy], settings: Mapping[str, Any], shape: tuple[int, int] | None
    ) -> QuantizedMatrix:
        """The matrix of its tensors.

        Args:
            settings: the entry of config.json: `sym` and `checkpoint_format` say what the tensors do not.
            shape: tells the bits of files of March 2023.
        """
        words, scales = required(parts, "qweight"), required(parts, "scales")
        if len(words.shape) != 2 or words.dtype is not DType.I32 or not all(words.shape):
            raise SpecError(f"qweight is {words.spec}; expected int32 words [in * bits / 32, out]")
        if not scales.dtype.is_float or len(scales.shape) != 2 or not all(scales.shape):
            raise SpecError(f"scales are {scales.spec}; expected floats [groups, out]")
        n_out = words.shape[1]
        if "qzeros" not in parts:
            return self._of_march_2023(words, scales, required(parts, "zeros"), settings, shape)
        stored = parts["qzeros"]
        n_groups = scales.spec.n_rows
        bits = next((b for b in self.bits if stored.spec == TensorSpec(DType.I32, (n_groups, n_words(n_out, b)))), None)
        if bits is None or scales.shape != (n_groups, n_out):
            raise SpecError(f"qzeros are {stored.spec}, scales {scales.spec}: no grid for {n_out} outputs")
        n_in = _n_columns(words, bits, parts.get("g_idx"), shape)
        grid = Grid(bits, group_size(n_in, n_groups, settings), bool(settings.get("sym")))
        order = parts.get("g_idx")
        order = group_order(order, n_in, n_groups, grid.group_size or n_in) if order is not None else None
        is_v1 = _is_first(settings)
        zeros = sliceable(_zeros(stored, bits, n_out, is_v1=is_v1))
        across = sliceable(transpose(scales))
        return QuantizedMatrix(
            grid,
            (n_out, n_in),
            codes_of(sliceable(transpose(words)), bits, n_in),
            _checked(across, zeros, grid.middle, is_v1=is_v1) if grid.is_symmetric else across,
            None if grid.is_symmetric else zeros,
            order=order,
        )

    def _of_march_2023(
        self, words: Lazy, scales: Lazy, zeros: Lazy, settings: Mapping[str, Any], shape: tuple[int, int] | None
    ) -> QuantizedMatrix:
        n_out = words.shape[1]
        stated = settings.get("bits")
        bits = next((b for b in self.bits if shape and n_words(shape[1], b) == words.shape[0]), stated)
        if bits not in self.bits:
            raise SpecError(
                "its bits are not stored (a file of March 2023), and no plugin describes the model",
                hint='put a config.json with "quantization_config": {"quant_method": "gptq", "bits": 4} beside it',
            )
        n_in = _n_columns(words, bits, None, shape)
        if scales.shape != (n_out, 1) or zeros.shape != (n_out, 1) or not zeros.dtype.is_float:
            raise SpecError(f"zeros are {zeros.spec}, scales {scales.spec}; expected floats [{n_out}, 1]")
        offsets = Apply("negative", [zeros], zeros.spec, lambda x: -x).output()
        codes = codes_of(sliceable(transpose(words)), bits, n_in)
        return QuantizedMatrix(Grid(bits, None, False), (n_out, n_in), codes, scales, offsets=offsets)

    def describe(
        self,
        matrices: Mapping[str, QuantizedMatrix],
        ignore: Sequence[str],
        *,
        are_all: bool,
        experts: Collection[str] = (),
    ) -> dict[str, Any]:
        # The most frequent kind speaks for all, the others, and what is no kind at all, stand in `dynamic`.
        kinds = {module: _kind(matrix) for module, matrix in matrices.items()}
        usual = Counter(map(str, kinds.values())).most_common(1)[0][0]
        others = {f"+:^{re.escape(module)}$": kind for module, kind in kinds.items() if str(kind) != usual}
        others |= {f"-:^{re.escape(module)}$": {} for module in ignore}
        return {
            "quant_method": "gptq",
            **next(kind for kind in kinds.values() if str(kind) == usual),
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "true_sequential": True,
            "lm_head": "lm_head" in matrices,
            **({"dynamic": others} if others else {}),
            **_of_blocks(list(matrices), ignore),
            "meta": {"quantizer": [f"llmkit:{__version__}"]},
        }

    def files(self, entry: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        return {self.config_file: entry}

    def notes(self, matrices: Mapping[str, QuantizedMatrix], experts: Collection[str] = ()) -> list[str]:
        notes = super().notes(matrices, experts)
        if self.lowest_zero and any(matrix.zeros is not None for matrix in matrices.values()):
            notes.append(
                "GPTQModel reads zero points of the first version in its own files only; those of gptq_v2 in all"
            )
        return notes

    def _words(self, qweight: TensorSpec, scales: TensorSpec | None, qzeros: TensorSpec | None) -> str | None:
        if len(qweight.shape) != 2 or qweight.dtype is not DType.I32:
            return None
        if scales is None or len(scales.shape) != 2:
            return ""
        if qzeros is None:
            return "" if qweight.shape[1] in scales.shape else None
        bits, n_in = _bits_and_columns(qweight, scales, qzeros)
        return f"int{bits} group {n_in // scales.shape[0]}" if bits else None

    def warnings(self, stored: StoredFolder) -> list[str]:
        """What config.json says of bits and groups, where shapes contradict it: other programs go by it."""
        entry, dynamic = stored.entry, stored.entry.get("dynamic")
        own = dynamic.values() if isinstance(dynamic, Mapping) else ()
        stated = [entry, *({**entry, **scheme} for scheme in own if isinstance(scheme, Mapping))]
        odd: dict[tuple[int, int], list[str]] = {}
        for name in (n for n in stored.tensors if n.endswith(".qweight")):
            stem = name.removesuffix("qweight")
            parts = [stored.tensors[stem + end].spec for end in _TELLING if stem + end in stored.tensors]
            if len(parts) < len(_TELLING):
                continue
            bits, n_in = _bits_and_columns(*parts)
            n_groups = parts[1].n_rows
            if bits and not any(_says(scheme, bits, n_in, n_groups) for scheme in stated):
                odd.setdefault((bits, -(-n_in // n_groups)), []).append(stem.removesuffix("."))
        said = ", ".join(f"{key} {entry[key]}" for key in ("bits", "group_size") if key in entry)
        return [
            f"quantization_config says {said}, and the shapes of {listing(modules, 2)} say {bits} bits in groups of "
            f"{group}: read so; other programs go by what it says, so correct it there"
            for (bits, group), modules in odd.items()
        ]


def _bits_and_columns(qweight: TensorSpec, scales: TensorSpec, qzeros: TensorSpec) -> tuple[int, int]:
    """Bits and columns by the shapes of a matrix; zeros where they do not fit together."""
    if {len(part.shape) for part in (qweight, scales, qzeros)} != {2}:
        return 0, 0
    n_out, n_groups = qweight.shape[1], scales.shape[0]
    if scales.shape[1] != n_out or qzeros.shape[0] != n_groups or not n_out * n_groups:
        return 0, 0
    bits = 32 * qzeros.shape[1] // n_out
    return bits, qweight.shape[0] * 32 // bits if bits else 0


def _says(scheme: Mapping[str, Any], bits: int, n_in: int, n_groups: int) -> bool:
    """Whether an entry of config.json may mean a matrix; what it does not say it does not contradict."""
    stated, size = scheme.get("bits"), scheme.get("group_size")
    stated_groups = -(-n_in // size) if type(size) is int and size > 0 else 1 if size == -1 else n_groups
    return (type(stated) is not int or stated == bits) and stated_groups == n_groups


def _is_first(entry: Mapping[str, Any]) -> bool:
    """Whether zero points are stored minus 1, by the entry of config.json, which alone tells it."""
    return str(entry.get("checkpoint_format")).lower() != GptqV2.name


def _n_columns(words: Lazy, bits: int, order: Lazy | None, shape: tuple[int, int] | None) -> int:
    """Columns of the float matrix. The last word may be for fewer than it has codes, so words alone do not tell."""
    known = [order.spec.numel] if order is not None else [shape[1]] if shape else []
    n_in = next((n for n in known if n_words(n, bits) == words.shape[0]), words.shape[0] * 32 // bits)
    if n_words(n_in, bits) != words.shape[0]:
        raise SpecError(f"qweight is {words.spec}, no whole number of codes of {bits} bits")
    return n_in


def _zeros(stored: Lazy, bits: int, n_out: int, *, is_v1: bool) -> Lazy:
    """Zero points, uint8 [out, groups]; computed whole."""
    one = sum(1 << i for i in range(0, 32, bits))

    def fn(words: torch.Tensor) -> torch.Tensor:
        if is_v1 and 32 % bits == 0:
            return unpack_words(words + one, bits, n_out).t().contiguous()
        return ((unpack_words(words, bits, n_out) + int(is_v1)) & ((1 << bits) - 1)).t().contiguous()

    attrs, spec = {"bits": bits, "minus": int(is_v1)}, TensorSpec(DType.U8, (n_out, stored.spec.n_rows))
    return Apply("zero points", [stored], spec, fn, attrs, row_step=None).output()


def _checked(scales: Lazy, zeros: Lazy, middle: int, *, is_v1: bool) -> Lazy:
    """The scales, where all zero points are in the middle, as config.json says."""
    other = '"gptq_v2", if they are not' if is_v1 else '"gptq", if they are'

    def fn(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        if not bool((zeros == middle).all()):
            raise InputError(
                f"quantization_config says that the grid is symmetric (sym), but not all zero points are {middle}",
                hint=f'write "sym": false there; or "checkpoint_format": {other} stored minus 1',
            )
        return scales

    return Apply("symmetric", [scales, zeros], scales.spec, fn, {"middle": middle}).output()


def _neighbours(n_in: int, group: int) -> Lazy:
    """`g_idx` of groups of neighbouring columns."""

    def fn() -> torch.Tensor:
        return (torch.arange(n_in) // group).int()

    attrs = {"columns": n_in, "group": group}
    return Apply("constant", [], TensorSpec(DType.I32, (n_in,)), fn, attrs, row_step=None, output_rows=[0]).output()


def _of_blocks(modules: Sequence[str], ignore: Sequence[str]) -> dict[str, Any]:
    """What tells Optimum, which does not read `dynamic`, where blocks are and which of their layers are quantized.

    It takes linear layers whose names end in one of those listed, vLLM those that have one of them anywhere: the
    shortest ends of names that are in none of `ignore`.
    """
    found = {match[1] for name in modules if (match := re.match(r"(.*?)\.\d+\.", name))}
    if len(found) != 1:
        return {}
    blocks = found.pop()
    entry: dict[str, Any] = {"block_name_to_quantize": blocks}
    left = [name for name in ignore if name.startswith(f"{blocks}.")]
    if not left:
        return entry
    for beginning in (r"^.*\.", r"^.*?\.\d+\.", "^"):
        ends = list(dict.fromkeys(re.sub(beginning, "", module) for module in modules))
        if not any(end in name for name in left for end in ends):
            break
    return entry | {"modules_in_block_to_quantize": [ends]}


def _kind(matrix: QuantizedMatrix) -> dict[str, Any]:
    grid, has_order = matrix.grid, matrix.order is not None
    return {"bits": grid.bits, "group_size": grid.group_size or -1, "sym": grid.is_symmetric, "desc_act": has_order}


class GptqV2(Gptq):
    """The second version, which stores zero points as they are."""

    name = "gptq_v2"
    lowest_zero = 0

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        return None  # `checkpoint_format` tells it from the first, which reads both


CODEC, CODEC_V2 = Gptq(), GptqV2()
