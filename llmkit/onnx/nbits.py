"""Matrices of 4 or 8 bits as ONNX Runtime's MatMulNBits and GatherBlockQuantized take them.

    codes    uint8 [N, blocks, block * bits / 8]   0 … 2^bits - 1 along K, of two in a byte the first in the low bits
    scales   [N, blocks]                           of the compute dtype (or cast to it when a session starts)
    zeros    uint8 [N, ceil(blocks * bits / 8)]    packed like the codes; absent: 2^(bits-1)
    weight   (code - zero) * scale; the last block of a row is filled up with codes of zero

A grid with an offset that is no multiple of its scale is that, and a matrix of offsets beside it: the product with the
sums of blocks of x is added (zero points in floats would do it, too, but the CPU restores the matrix in each call
then: 16 times the time of float32 at one token). Blocks have 16, 32, 64, 128 or 256 columns.

Source: ContribOperators.md of onnxruntime, and what its CPU kernels accept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmkit.errors import InputError
from llmkit.quantization.packing import pack
from llmkit.quantization.rtn import dequantize, quantize_rows
from llmkit.quantization.schemes import Scheme
from llmkit.tensors.codes import Codes
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import transpose, viewed
from llmkit.tensors.spec import DType, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["BLOCKS", "Columns", "NBits", "columns_of", "rounded", "taken", "unit_rows"]

BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class NBits:
    """One matrix.

    Attributes:
        shape: N and K of the float matrix.
        described: the grid in a few words.
        is_table: its codes are [N, bytes], without blocks, as GatherBlockQuantized takes them.
        offsets: floats [N, blocks] that are added to the columns of each block; None for most. No zero points then.
        base: the code that stands for the offset alone.
    """

    bits: int
    block: int
    shape: tuple[int, int]
    codes: Lazy
    scales: Lazy
    zeros: Lazy | None
    described: str
    is_table: bool = False
    offsets: Lazy | None = None
    base: int = 0

    @property
    def n_blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.shape[1] // self.block)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.codes, self.scales, self.zeros, self.offsets)
        return sum(part.spec.nbytes for part in parts if part is not None)

    def from_middle(self) -> Lazy | None:
        """Offsets for codes that count from 2^(bits-1), float32 [N, blocks]; None where there are none."""
        if self.offsets is None:
            return None
        steps = (1 << (self.bits - 1)) - self.base

        def fn(offsets: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            return offsets.float() + steps * scales.float()

        spec = TensorSpec(DType.F32, self.offsets.shape)
        return Apply("offset", [self.offsets, self.scales], spec, fn, {"steps": steps}).output()

    def restored(self) -> Lazy:
        """The float32 matrix [N, K] that the codes stand for."""
        bits, n_blocks, base = self.bits, self.n_blocks, self.base
        parts = [part for part in (self.zeros, self.offsets) if part is not None]  # one of them at most

        def fn(codes: torch.Tensor, scales: torch.Tensor, *part: torch.Tensor) -> torch.Tensor:
            q = _unpacked(codes.flatten(1), bits).view(len(codes), n_blocks, -1)
            if self.offsets is not None:
                values = q.float().add_((1 << (bits - 1)) - base).mul_(scales.float().unsqueeze(-1))
                values = values.add_(part[0].float().unsqueeze(-1))
            else:
                zero = _unpacked(part[0], bits)[:, :n_blocks] if part else None
                values = dequantize(q, scales.float(), zero)
            return values.flatten(1)[:, : self.shape[1]].contiguous()

        inputs = [self.codes, self.scales, *parts]
        return Apply("restore", inputs, TensorSpec(DType.F32, self.shape), fn, {"bits": bits}, scratch=4.0).output()


@dataclass(frozen=True, eq=False)
class Columns:
    """A matrix as DequantizeLinear takes it before a MatMul: [K, N], blocks along K.

    Attributes:
        codes: bytes of [K, N] integers, of two in a byte the first in the low bits.
        scales: [K / block, N].
        zeros: bytes of [K / block, N] integers; None: the codes are signed, and zero is zero.
    """

    codes: Lazy
    scales: Lazy
    zeros: Lazy | None

    def kind(self, bits: int) -> str:
        """The element type of codes and zero points, in ONNX's words."""
        return f"{'INT' if self.zeros is None else 'UINT'}{bits}"


def columns_of(matrix: NBits) -> Columns | None:
    """The same matrix with K first; None where its rows end within a block, or two integers would share a byte of two
    columns. Turned whole, a matrix at a time.
    """
    (n, k), bits, n_blocks = matrix.shape, matrix.bits, matrix.n_blocks
    if k % matrix.block or n * bits % 8 or matrix.is_table or matrix.offsets is not None:
        return None
    is_signed = matrix.zeros is None

    def turned(x: torch.Tensor) -> torch.Tensor:
        q = _unpacked(x.flatten(1), bits)[:, : k if x.dim() == 3 else n_blocks].t().contiguous()
        stored = _packed(q, bits)
        # Two's complement has the highest bit of each integer the other way round than an offset of half the range.
        return stored ^ (0x80 if bits == 8 else 0x88) if is_signed else stored

    def made(lazy: Lazy, rows: int) -> Lazy:
        spec = TensorSpec(DType.U8, (rows, n * bits // 8))
        return Apply("turn", [lazy], spec, turned, {"bits": bits, "signed": is_signed}, row_step=None).output()

    scales = transpose(matrix.scales)
    return Columns(made(matrix.codes, k), scales, made(matrix.zeros, n_blocks) if matrix.zeros is not None else None)


def rounded(name: str, weight: Lazy, scheme: Scheme, scale_dtype: DType, *, is_table: bool = False) -> NBits:
    """A float matrix [N, K] on the grid of `scheme`, rounded to nearest while it is written.

    Args:
        name: for messages.
        scheme: its group size is the block; None is one scale a row.
    """
    n, k = weight.shape
    block = scheme.group_size or _block_of_row(k)
    n_blocks, padding = -(-k // block), -k % block
    grid = Scheme(scheme.bits, None if scheme.group_size is None else block, scheme.is_symmetric)
    specs = [
        TensorSpec(DType.U8, _code_shape(n, k, block, scheme.bits, is_table=is_table)),
        TensorSpec(scale_dtype, (n, n_blocks)),
    ]
    if not scheme.is_symmetric:
        specs.append(TensorSpec(DType.U8, (n, -(-n_blocks * scheme.bits // 8))))

    def fn(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        import torch

        # Zero lies on every grid: what fills up the last block does not change its scale.
        filled = torch.nn.functional.pad(rows, (0, padding)) if padding else rows
        try:
            packed, scales, zeros = quantize_rows(filled, grid, scale_dtype.torch)
        except InputError as error:
            raise InputError(f"{name}: {error.message}", hint=error.hint) from error
        codes = packed.view(torch.uint8).view(len(rows), *specs[0].shape[1:])
        scales = scales.expand(-1, n_blocks).contiguous()
        if zeros is None:
            return codes, scales
        return codes, scales, _packed(zeros.expand(-1, n_blocks), scheme.bits)

    node = Apply("quantize", [weight], specs, fn, scheme.attrs() | {"block": block}, scratch=1.0)
    codes, scales, *zeros = node.outputs()
    return NBits(scheme.bits, block, (n, k), codes, scales, zeros[0] if zeros else None, str(scheme), is_table)


def taken(codes: Codes, *, is_table: bool = False) -> NBits | None:
    """A matrix that is quantized already, bit for bit: larger groups become several blocks with the same scale.

    None where the groups do not divide into blocks.
    """
    is_by_row = codes.group == codes.columns
    if not is_by_row and codes.group % BLOCKS[0]:
        return None
    block = _block_of_row(codes.group)
    bits, n, k = codes.bits, codes.n_rows, codes.columns
    n_blocks = -(-k // block)
    shape = _code_shape(n, k, block, bits, is_table=is_table)
    made = NBits(
        bits, block, (n, k), _blocked(codes, block, shape), codes.scales, None, codes.source, is_table, codes.offsets,
        codes.base,
    )  # fmt: skip
    per_group = n_blocks // codes.scales.shape[1]
    if per_group == 1 and codes.zeros is None:
        return made

    def repeat(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(per_group, 1)

    attrs = {"times": per_group}
    zeros = None
    if codes.zeros is not None:
        spec = TensorSpec(DType.U8, (n, -(-n_blocks * bits // 8)))
        offset = 1 << (bits - 1)

        def pack_zeros(x: torch.Tensor) -> torch.Tensor:
            import torch

            return _packed(repeat((x.short() - offset).to(torch.int8)), bits)

        zeros = Apply("pack zero points", [codes.zeros], spec, pack_zeros, attrs).output()

    def repeated(lazy: Lazy) -> Lazy:
        if per_group == 1:
            return lazy
        return Apply("repeat", [lazy], TensorSpec(lazy.dtype, (n, n_blocks)), repeat, attrs).output()

    offsets = repeated(codes.offsets) if codes.offsets is not None else None
    return replace(made, scales=repeated(codes.scales), zeros=zeros, offsets=offsets)


def unit_rows(matrix: NBits) -> NBits:
    """The same codes with scales that make every row one of length 1, for heads that divide rows by their norms.

    The grid is that of the rows as they were: rounding to nearest does not depend on their length.
    """
    restored = matrix.restored()

    def length(rows: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        import torch

        lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
        return part.double().div_(lengths.clamp_(min=1e-12)).float()

    def divided(part: Lazy) -> Lazy:
        wide = part.cast(DType.F32)
        return Apply("row / norm", [restored, wide], wide.spec, length, scratch=4.0).output()

    offsets = divided(matrix.offsets) if matrix.offsets is not None else None
    return replace(matrix, scales=divided(matrix.scales), offsets=offsets)


def _block_of_row(columns: int) -> int:
    """The block for columns that share a scale: the largest that divides them, else a small one to be filled up."""
    return max([b for b in BLOCKS if columns % b == 0], default=32)


def _code_shape(n: int, k: int, block: int, bits: int, *, is_table: bool) -> tuple[int, ...]:
    n_blocks, width = -(-k // block), block * bits // 8
    return (n, n_blocks * width) if is_table else (n, n_blocks, width)


def _blocked(codes: Codes, block: int, shape: tuple[int, ...]) -> Lazy:
    """The codes in blocks: those of the file, where rows end with a whole one."""
    if codes.columns % block == 0:
        return viewed(codes.values, DType.U8, shape)
    bits, columns = codes.bits, codes.columns

    def fn(x: torch.Tensor) -> torch.Tensor:
        import torch

        q = _unpacked(x, bits)[:, :columns]
        filled = torch.nn.functional.pad(q, (0, -columns % block))
        return _packed(filled, bits).view(len(x), *shape[1:])

    return Apply("fill blocks", [codes.values], TensorSpec(DType.U8, shape), fn, {"block": block}, scratch=2.0).output()


def _unpacked(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (uint8 bytes [rows, bytes]) as signed numbers, int8."""
    import torch

    if bits == 8:
        return (stored ^ 0x80).view(torch.int8)
    both = torch.stack([stored & 0x0F, stored >> 4], -1).flatten(1)
    return both.view(torch.int8) - 8


def _packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed numbers (int8 [rows, n]) as codes, uint8 [rows, ceil(n * bits / 8)]."""
    import torch

    n_bytes = -(-values.shape[1] * bits // 8)
    return pack(values, bits).view(torch.uint8)[:, :n_bytes].contiguous()
