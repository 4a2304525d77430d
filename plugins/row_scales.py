"""Integers with one scale for each row, as ChatGLM's releases store them and Baichuan's code makes them.

    ChatGLM    weight        int8 [out, in]; of 4 bits two in a byte, [out, in / 2], the first in the high bits
               weight_scale  floats [out]
    Baichuan   weight        int8 [in, out]; of 4 bits int32 [out, in / 8], the first in the lowest bits
               scale         floats [out]

All are in two's complement, a weight is its integer times the scale of its row, and biases stay as they are.

Sources: quantization.py of THUDM/chatglm-6b (`QuantizedLinear`, `compress_int4_weight`), quantizer.py of
baichuan-inc/Baichuan-13B-Chat (`QLinear`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.errors import SpecError
from llmkit.lazy_imports import torch
from llmkit.quantization.codec import CONFIG_KEYS, REMEDY, FolderReader, Specs, StoredFolder, error_context
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.words import from_signed
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import sliceable, transpose, view_as
from llmkit.tensors.spec import DType, TensorSpec


class _RowScales(FolderReader):
    """What both have in common.

    Attributes:
        scale: the end of the name of the scales.
        dtypes: of the integers.
    """

    config_keys = (*CONFIG_KEYS, "quantization_bit", "quantization_embeddings")
    scale: str
    dtypes: tuple[DType, ...]

    def _modules(self, specs: Specs) -> list[str]:
        modules = []
        for name, scales in specs.items():
            module = name.removesuffix(f".{self.scale}")
            weight = specs.get(f"{module}.weight") if module != name else None
            if weight is None or weight.dtype not in self.dtypes or len(weight.shape) != 2:
                continue
            if scales.dtype.is_float and len(scales.shape) == 1:
                modules.append(module)
        return modules

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        modules = self._modules(specs)
        if not modules:
            return None
        bits = self._bits(specs[f"{modules[0]}.weight"], None, config)
        words = f"int{bits} per channel symmetric" if bits is not None else ""
        return words, [f"{module}.weight" for module in modules]

    def matrices(self, stored: StoredFolder) -> tuple[dict[str, QuantizedMatrix], set[str]]:
        matrices: dict[str, QuantizedMatrix] = {}
        used: set[str] = set()
        for module in self._modules({name: lazy.spec for name, lazy in stored.tensors.items()}):
            name, scale = f"{module}.weight", f"{module}.{self.scale}"
            weight, scales = stored.tensors[name], stored.tensors[scale]
            shape = stored.shapes.get(name)
            with error_context(name):
                bits = self._bits(weight.spec, shape, stored.config)
                if bits is None:
                    raise SpecError(
                        f"nothing tells whether {weight.spec} are codes of 4 or of 8 bits",
                        hint="put the model's config.json beside the weights: its quantization_bit says so",
                    )
                codes, n_in = self._codes(weight, bits)
                n_out = codes.spec.n_rows
                if scales.shape != (n_out,) or (shape is not None and shape != (n_out, n_in)):
                    wanted = f", and the model has {list(shape)} there" if shape is not None else ""
                    raise SpecError(
                        f"int{bits} {weight.spec} and {self.scale} {scales.spec} do not make a weight{wanted}",
                        hint=REMEDY,
                    )
            scales = view_as(scales, scales.dtype, (n_out, 1))
            matrices[name] = QuantizedMatrix(Grid(bits), (n_out, n_in), codes, scales)
            used |= {name, scale}
        return matrices, used

    @abstractmethod
    def _bits(self, weight: TensorSpec, shape: Sequence[int] | None, config: Mapping[str, Any]) -> int | None:
        """Bits of a weight with this spec, None where nothing tells.

        Args:
            shape: [out, in] of the float weight, where a plugin describes the model.
        """

    @abstractmethod
    def _codes(self, weight: Lazy, bits: int) -> tuple[Lazy, int]:
        """Codes as a `QuantizedMatrix` has them, and the columns of the float weight."""


class ChatGLM(_RowScales):
    """`quantization_bit` in config.json says 4 or 8; the shape does, too."""

    name = "chatglm"
    scale = "weight_scale"
    dtypes = (DType.I8, DType.U8)

    def _bits(self, weight: TensorSpec, shape: Sequence[int] | None, config: Mapping[str, Any]) -> int | None:
        if shape is not None and len(shape) == 2:
            return 4 if shape[1] == 2 * weight.shape[1] else 8
        bits = config.get("quantization_bit")
        return bits if bits in (4, 8) else None

    def _codes(self, weight: Lazy, bits: int) -> tuple[Lazy, int]:
        if bits == 8:
            return from_signed(weight, bits), weight.shape[1]

        def fn(stored: torch.Tensor) -> torch.Tensor:
            pairs = stored.view(torch.uint8)
            return ((pairs << 4) | (pairs >> 4)) ^ 0x88

        codes = Apply("codes", [weight], weight.spec.with_dtype(DType.U8), fn, {"bits": bits}).output()
        return codes, 2 * weight.shape[1]


class Baichuan(_RowScales):
    """The dtype tells the bits."""

    name = "baichuan"
    scale = "scale"
    dtypes = (DType.I8, DType.I32)

    def _bits(self, weight: TensorSpec, shape: Sequence[int] | None, config: Mapping[str, Any]) -> int:
        return 4 if weight.dtype is DType.I32 else 8

    def _codes(self, weight: Lazy, bits: int) -> tuple[Lazy, int]:
        if bits == 8:
            return from_signed(sliceable(transpose(weight)), bits), weight.shape[0]

        def fn(stored: torch.Tensor) -> torch.Tensor:
            return stored.view(torch.uint8) ^ 0x88

        n_out, n_words = weight.shape
        spec = TensorSpec(DType.U8, (n_out, 4 * n_words))
        return Apply("codes", [weight], spec, fn, {"bits": bits}).output(), 8 * n_words


CHATGLM, BAICHUAN = ChatGLM(), Baichuan()
