"""AWQ, as AutoAWQ stores it: four bits, with zero points. Written for GEMM; GEMV and its fast form are read, too.

    gemm       qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales floats [groups, out]; the eight
               outputs of a word in the order 0 2 4 6 1 3 5 7, the first lowest
    gemv       qweight int32 [out, in / 8], qzeros int32 [out, w], scales floats [out, 8 w], in plain order; w is
               a row's words of zero points, rounded up as kernels want it
    gemv_fast  qweight int16 [out / 4, in], a word for a code of each of four rows, columns in an order of their own;
               scales and qzeros floats [8 w, out]: what the second have is - scale * zero point

Source: awq/modules/linear of casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.errors import SpecError, listing
from llmkit.lazy_imports import torch
from llmkit.quantization.codec import required
from llmkit.quantization.codecs.qweight import QweightCodec, group_size
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.packing import n_bytes, pack, unpack, unpack_words
from llmkit.quantization.words import codes_of, zero_points
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import sliceable, take_columns, transpose
from llmkit.tensors.spec import DType, TensorSpec

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq(QweightCodec):
    """Four bits with zero points."""

    name = "awq"
    bits = (4,)
    group_sizes = (16, 32, 64, 128)
    holds_head = False
    config_file = "quant_config.json"
    form_key, forms = "version", ("gemm", "gemv", "gemv_fast")

    def refuses(self, matrix: QuantizedMatrix) -> str | None:
        n_out = matrix.shape[0]
        return super().refuses(matrix) or (f"{n_out} outputs do not fill words of 8" if n_out % 8 else None)

    def write(self, matrix: QuantizedMatrix) -> dict[str, Lazy]:
        n_out, n_in = matrix.shape
        spec, points = TensorSpec(DType.I32, (n_in, n_out // 8)), TensorSpec(DType.I32, (matrix.n_groups, n_out // 8))

        def words(codes: torch.Tensor) -> torch.Tensor:
            return _packed(unpack(codes, 4, n_in))

        return {
            "qweight": Apply("words", [matrix.codes], spec, words, row_step=None, scratch=1.0).output(),
            "qzeros": Apply("pack", [zero_points(matrix)], points, _packed, row_step=None).output(),
            "scales": transpose(matrix.scales),
        }

    def read(
        self, parts: Mapping[str, Lazy], settings: Mapping[str, Any], shape: tuple[int, int] | None
    ) -> QuantizedMatrix:
        """The matrix of its tensors; their shapes and dtypes tell which form they have."""
        words, scales, zeros = (required(parts, end) for end in ("qweight", "scales", "qzeros"))
        fitting = [form for form in _FORMS if form.fits(words.spec, scales.spec, zeros.spec)]
        if not fitting:
            raise SpecError(f"qweight is {words.spec}, scales {scales.spec}, qzeros {zeros.spec}: no form of AWQ")
        return fitting[0].read(words, scales, zeros, settings)

    def describe(
        self,
        matrices: Mapping[str, QuantizedMatrix],
        ignore: Sequence[str],
        *,
        are_all: bool,
        experts: Collection[str] = (),
    ) -> dict[str, Any]:
        sizes = {matrix.grid.group_size: module for module, matrix in matrices.items()}
        if len(sizes) > 1:
            raise SpecError(
                f"{self.name} has one group size for all matrices; found {' and '.join(map(str, sizes))} "
                f"({listing(list(sizes.values()))})"
            )
        _refuse_skipped(list(matrices), ignore)
        return {
            "quant_method": self.name,
            "bits": 4,
            "group_size": next(iter(sizes), None) or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignore),
        }

    def _words(self, qweight: TensorSpec, scales: TensorSpec | None, qzeros: TensorSpec | None) -> str | None:
        known = [spec for spec in (qweight, scales, qzeros) if spec is not None]
        form = next((form for form in _FORMS if len(known) == 3 and form.fits(*known)), None)
        if form is None:
            return None
        return f"int4 group {known[0].shape[0] // known[1].shape[0]}" if form is _FORMS[0] else f"int4 ({form.name})"


def _refuse_skipped(modules: Sequence[str], ignore: Sequence[str]) -> None:
    """Loaders leave out every module whose name has one of those that stay in floats anywhere in it.

    Raises:
        SpecError: a quantized module is one of them.
    """
    together = "\n".join(modules)
    if (inside := next((name for name in ignore if name in together), None)) is not None:
        module = next(module for module in modules if inside in module)
        raise SpecError(
            f"{inside} stays in floats, and loaders of AWQ then leave out {module}, whose name contains that",
            hint=f"leave both in floats (--keep '{inside}*'), or take --format gptq or compressed-tensors",
        )


@dataclass(frozen=True)
class _Form:
    """A form of the layout.

    Attributes:
        fits: told by the specs of qweight, scales and qzeros.
        read: the matrix of these three, and the entry of config.json.
    """

    name: str
    fits: Callable[[TensorSpec, TensorSpec, TensorSpec], bool]
    read: Callable[[Lazy, Lazy, Lazy, Mapping[str, Any]], QuantizedMatrix]


def _are(words: TensorSpec, scales: TensorSpec, zeros: TensorSpec, of_words: DType, of_zeros: DType | None) -> bool:
    """Whether they are matrices of these dtypes (None: a float)."""
    are_matrices = all(len(spec.shape) == 2 and all(spec.shape) for spec in (words, scales, zeros))
    has_zeros = zeros.dtype.is_float if of_zeros is None else zeros.dtype is of_zeros
    return are_matrices and words.dtype is of_words and scales.dtype.is_float and has_zeros


def _is_gemm(words: TensorSpec, scales: TensorSpec, zeros: TensorSpec) -> bool:
    return (
        _are(words, scales, zeros, DType.I32, DType.I32)
        and scales.shape == (zeros.shape[0], 8 * words.shape[1])
        and zeros.shape[1] == words.shape[1]
        and words.shape[0] % scales.shape[0] == 0
    )


def _gemm(words: Lazy, scales: Lazy, zeros: Lazy, entry: Mapping[str, Any]) -> QuantizedMatrix:
    n_in, (n_groups, n_out) = words.shape[0], scales.shape
    spec = TensorSpec(DType.U8, (n_out, n_bytes(n_in, 4)))
    codes = Apply("codes", [words], spec, lambda w: pack(_unpacked(w), 4), row_step=None, scratch=1.0)
    points = Apply("zero points", [zeros], TensorSpec(DType.U8, (n_out, n_groups)), _unpacked, row_step=None)
    grid = Grid(4, group_size(n_in, n_groups, entry), False)
    return QuantizedMatrix(
        grid, (n_out, n_in), sliceable(codes.output()), sliceable(transpose(scales)), sliceable(points.output())
    )


def _is_gemv(words: TensorSpec, scales: TensorSpec, zeros: TensorSpec) -> bool:
    return (
        _are(words, scales, zeros, DType.I32, DType.I32)
        and words.shape[0] == zeros.shape[0]
        and scales.shape == (words.shape[0], 8 * zeros.shape[1])
    )


def _gemv(words: Lazy, scales: Lazy, zeros: Lazy, entry: Mapping[str, Any]) -> QuantizedMatrix:
    n_out, n_in = words.shape[0], 8 * words.shape[1]
    grid, n_groups = _padded_grid(n_in, zeros.shape[1], entry)
    spec = TensorSpec(DType.U8, (n_out, n_groups))
    points = Apply("zero points", [zeros], spec, lambda x: unpack_words(x, 4, n_groups)).output()
    return QuantizedMatrix(grid, (n_out, n_in), codes_of(words, 4, n_in), take_columns(scales, 0, n_groups), points)


def _is_gemv_fast(words: TensorSpec, scales: TensorSpec, zeros: TensorSpec) -> bool:
    return (
        _are(words, scales, zeros, DType.I16, None)
        and scales.shape == zeros.shape
        and scales.shape[1] == 4 * words.shape[0]
        and scales.shape[0] % 8 == words.shape[1] % 64 == 0
    )


def _gemv_fast(words: Lazy, scales: Lazy, zeros: Lazy, entry: Mapping[str, Any]) -> QuantizedMatrix:
    n_out, n_in = 4 * words.shape[0], words.shape[1]
    grid, n_groups = _padded_grid(n_in, scales.shape[0] // 8, entry)

    def fn(stored: torch.Tensor) -> torch.Tensor:
        numbers = unpack(stored.contiguous().view(torch.uint8), 4, 4 * n_in)  # 256 for 64 columns of four rows
        rows = numbers.view(len(stored), -1, 4, 64).transpose(1, 2).reshape(n_out, -1, 4, 8)[..., list(_INVERSE)]
        return pack(rows.reshape(n_out, -1, 4, 4, 2).transpose(2, 3).reshape(n_out, n_in), 4)

    spec = TensorSpec(DType.U8, (n_out, n_bytes(n_in, 4)))
    codes = sliceable(Apply("codes", [words], spec, fn, row_step=None, scratch=1.0).output())
    across, offsets = (take_columns(sliceable(transpose(part)), 0, n_groups) for part in (scales, zeros))
    return QuantizedMatrix(grid, (n_out, n_in), codes, across, offsets=offsets)


_FORMS = (_Form("gemm", _is_gemm, _gemm), _Form("gemv", _is_gemv, _gemv), _Form("gemv_fast", _is_gemv_fast, _gemv_fast))


def _padded_grid(n_in: int, n_words: int, entry: Mapping[str, Any]) -> tuple[Grid, int]:
    """The grid of GEMV's forms, whose rows of scales are filled up to a width that the group size tells; and groups."""
    stated = entry.get("group_size", entry.get("q_group_size"))
    for group in (stated if type(stated) is int and stated > 0 else n_in, 128, 64, 32, 16):
        times = max(128 // group, 1)
        if n_in % group == 0 and -(-(n_in // group) // (8 * times)) * times == n_words:
            return Grid(4, group_size(n_in, n_in // group, entry), False), n_in // group
    raise SpecError(f"{8 * n_words} scales for rows of {n_in}: no group size has that many")


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """Words [rows, n / 8] as numbers, uint8 [n, rows]."""
    numbers = unpack(words.contiguous().view(torch.uint8), 4, 8 * words.shape[1])
    return numbers.view(len(words), -1, 8)[..., list(_INVERSE)].flatten(1).t().contiguous()


def _packed(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers, uint8 [n, rows], as words [rows, n / 8]."""
    words = numbers.t().reshape(numbers.shape[1], -1, 8)[..., list(_ORDER)]
    return pack(words.flatten(1), 4).view(torch.int32)


CODEC = Awq()
