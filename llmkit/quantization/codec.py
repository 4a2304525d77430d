"""What a codec is: one published layout of quantized matrices, read and written.

A codec is one module with an entry point in the group `llmkit.codecs`. It says which grids the layout can hold, which
stored tensors make a matrix, and back; a `FolderCodec` also how config.json describes them and how a folder that has
them is recognised. A layout that is read and not written is a `FolderReader`. It knows no method and no decoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from llmkit import entry_points
from llmkit.errors import InputError, RequirementError, SpecError
from llmkit.quantization.matrix import QuantizedMatrix, Restorable
from llmkit.quantization.points import Points
from llmkit.tensors.lazy import Context, Lazy
from llmkit.tensors.siblings import without_siblings
from llmkit.tensors.spec import DType, TensorSpec

GROUP = "llmkit.codecs"
CONFIG_KEYS = ("quantization_config", "compression_config")  # the second is what compressed-tensors wrote before 0.4
REMEDY = "start from the float checkpoint it was made from, or load it with the library that wrote it and save floats"
_JOINED_EXPERTS = (
    "transformers 5 joins the experts of a layer, and does not find them in this layout: transformers 4 reads them one "
    "by one, and transformers 5 those of --format compressed-tensors --symmetric"
)
Specs = Mapping[str, TensorSpec]


def config_entry(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says of the quantization, under either key; None for nothing."""
    for key in CONFIG_KEYS:
        entry = config.get(key)
        if isinstance(entry, Mapping) and entry:
            return entry
    return None


class Codec(ABC):
    """A layout of quantized matrices.

    Attributes:
        name: as `--format`, and `quant_method` in config.json, spell it.
        bits: of integers.
        group_sizes: columns that share a scale, the sizes that are offered; besides, one scale a row ("channel").
        points: what codes may stand for besides integers.
        holds_zeros: groups may have zero points.
        holds_offsets, holds_order: it has a place for these parts of a `QuantizedMatrix`.
        fills_rows: the last group of a row may be for fewer columns.
        scale_dtypes: of scales; the first takes the place of others where a matrix is made for the layout.
        lowest_zero: the lowest zero point that it can hold.
        takes_conv1d: its loaders make linear layers of transformers' Conv1D ones, whose weights are stored [in, out].
        prefers_symmetric: kernels for the layout expect a symmetric grid, so it is the default.
        written_by: the command that writes it, where that is neither `quantize` nor `convert`.
        holds_head: its loaders take a head, too.
        holds_outer: its loaders take linear layers before and behind the blocks, besides the head.
        mixes_zeros: its loaders take zero points where matrices are on different grids, and those of experts.
    """

    name: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]
    group_sizes: ClassVar[tuple[int, ...]]
    points: ClassVar[tuple[Points, ...]] = ()
    holds_zeros: ClassVar[bool] = True
    holds_offsets: ClassVar[bool] = False
    holds_order: ClassVar[bool] = False
    fills_rows: ClassVar[bool] = False
    scale_dtypes: ClassVar[tuple[DType, ...]] = (DType.F32, DType.F16, DType.BF16)
    lowest_zero: ClassVar[int] = 0
    takes_conv1d: ClassVar[bool] = False
    prefers_symmetric: ClassVar[bool] = False
    holds_head: ClassVar[bool] = True
    holds_outer: ClassVar[bool] = True
    mixes_zeros: ClassVar[bool] = True
    written_by: ClassVar[str] = ""

    @property
    def all_bits(self) -> tuple[int, ...]:
        """Of codes, integers or not."""
        return tuple(sorted({*self.bits, *(points.bits for points in self.points)}))

    def sizes_for(self, points: Points | None) -> tuple[int | Literal["channel"], ...]:
        """The group sizes that are offered for codes of these points, or integers."""
        return (*self.group_sizes, "channel") if points is None else ("channel",)

    def refuses(self, matrix: QuantizedMatrix) -> str | None:
        """Why the layout cannot hold a matrix code for code; None where it can."""
        points = matrix.grid.points
        lacking = {
            f"codes of {matrix.bits} bits": points is None and matrix.bits not in self.bits,
            f"codes of {points.name if points else None}": points is not None and points not in self.points,
            "zero points": matrix.zeros is not None and not self.holds_zeros,
            "zero points between two codes": matrix.zeros is not None and matrix.zeros.dtype is not DType.U8,
            "offsets": matrix.offsets is not None and not self.holds_offsets,
            "columns in another order": matrix.order is not None and not self.holds_order,
            f"scales in {matrix.scales.dtype.torch_name}": matrix.scales.dtype not in self.scale_dtypes,
        }
        missing = [what for what, lacks in lacking.items() if lacks]
        if missing:
            return f"{self.name} has no {' and no '.join(missing)}"
        if not self.fills_rows and not matrix.grid.divides(matrix.shape[1]):
            return f"rows of {matrix.shape[1]} weights do not fall into groups of {matrix.group}"
        return None

    def prepared(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        """A matrix that was just made, with everything rounded that the layout rounds besides weights."""
        return matrix

    @abstractmethod
    def write(self, matrix: QuantizedMatrix) -> dict[str, Lazy]:
        """The stored tensors of a matrix that it does not refuse, by the end of their names.

        The end follows the name of the module and a dot (`weight_packed`).
        """

    def settings(self, matrix: QuantizedMatrix) -> dict[str, Any]:
        """What `read` has to know besides the tensors that `write` gives; nothing for most."""
        return {}

    @abstractmethod
    def read(
        self, parts: Mapping[str, Lazy], settings: Mapping[str, Any], shape: tuple[int, int] | None
    ) -> QuantizedMatrix:
        """The matrix of stored tensors.

        Args:
            parts: by the end of their names.
            settings: what the file says of them elsewhere (a config group, a type of blocks, attributes of a node).
            shape: [out, in] of the float matrix, where it is known.

        Raises:
            SpecError: tensors are missing, or do not fit together.
        """


@dataclass(frozen=True)
class StoredFolder:
    """The tensors of a folder, and what its config says of them.

    Attributes:
        label: the folder, for messages.
        tensors: by name.
        config: the contents of config.json, with the quantization entry of the reader's `config_file` if it has none.
        shapes: of the float model's tensors, where a plugin describes it: of matrices [out, in].
        transposed: the matrices that the float model stores as [in, out].
    """

    label: str
    tensors: Mapping[str, Lazy]
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()

    @property
    def entry(self) -> Mapping[str, Any]:
        """The quantization entry of config.json; empty for none."""
        return config_entry(self.config) or {}

    def parts(self, module: str, suffixes: Sequence[str]) -> dict[str, Lazy]:
        """The tensors of a module, by what follows its name."""
        return {suffix: t for suffix in suffixes if (t := self.tensors.get(f"{module}.{suffix}")) is not None}


def joined_experts(matrices: Collection[str], experts: Collection[str]) -> list[str]:
    """What is told of a layout in which transformers 5 does not find the experts, where some are among its matrices."""
    return [_JOINED_EXPERTS] if any(name in matrices for name in experts) else []


def meant_for(inputs: str) -> str:
    """The warning of a model whose inputs are rounded, too, where it was made for it."""
    return f"the model was meant to run with {inputs}; here only its weights are: expect slightly other scores"


@contextmanager
def error_context(module: str) -> Iterator[None]:
    """Errors raised inside are prefixed with the module's or weight's name, if there is one."""
    try:
        yield
    except (InputError, RequirementError, SpecError) as error:
        raise type(error)(f"{module}: {error.message}" if module else error.message, hint=error.hint) from error


def required(parts: Mapping[str, Lazy], name: str, *expected: TensorSpec) -> Lazy:
    """A required part of a matrix.

    Raises:
        SpecError: it is missing, or has none of the specs that are expected.
    """
    if name not in parts:
        raise SpecError(f"{name} is missing; found {', '.join(parts)}", hint=REMEDY)
    if expected and parts[name].spec not in expected:
        specs = " or ".join(map(str, dict.fromkeys(expected)))
        raise SpecError(f"{name} is {parts[name].spec}; expected {specs}", hint=REMEDY)
    return parts[name]


def small(lazy: Lazy, *, max_nbytes: int = 4096) -> bytes:
    """The bytes of a stored part that says how others are to be read: it is small, and read without torch.

    Raises:
        SpecError: it is larger than such a part can be.
    """
    if lazy.spec.nbytes > max_nbytes:
        raise SpecError(f"{lazy.spec} has {lazy.spec.nbytes} bytes, which is more than {max_nbytes}", hint=REMEDY)
    lazy = without_siblings(lazy)
    return bytes(Context().row_bytes(lazy, (0, lazy.node.n_rows)))


class FolderReader(ABC):
    """A layout of the tensors in a folder with a config.json, which is read.

    Attributes:
        name: as `quant_method` in config.json spells it.
        also: other names that it has there.
        config_keys: of config.json, what says how the tensors are quantized: the float model's has them not.
        config_file: a file in which its programs keep the quantization entry, too; releases may have only that.
    """

    name: ClassVar[str]
    also: ClassVar[tuple[str, ...]] = ()
    config_keys: ClassVar[tuple[str, ...]] = CONFIG_KEYS
    config_file: ClassVar[str] = ""

    @abstractmethod
    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        """Whether tensors are stored so, told by names, dtypes and shapes.

        Returns:
            Bits and groups in a few words, where the specs tell them, and the names that tell; None for other layouts.
        """

    @abstractmethod
    def matrices(self, stored: StoredFolder) -> tuple[Mapping[str, Restorable], set[str]]:
        """The quantized matrices by the names of the weights they stand for, and the names of all they are made of.

        Raises:
            RequirementError: a form that is not read.
            InputError, SpecError: tensors are missing, or do not fit together.
        """

    def warnings(self, stored: StoredFolder) -> list[str]:
        """Requirements of the layout that llmkit's own computation does not meet."""
        return []


class FolderCodec(FolderReader, Codec):
    """A layout of the tensors in a folder with a config.json, which is read and written."""

    @abstractmethod
    def describe(
        self,
        matrices: Mapping[str, QuantizedMatrix],
        ignore: Sequence[str],
        *,
        are_all: bool,
        experts: Collection[str] = (),
    ) -> dict[str, Any]:
        """The quantization_config of config.json.

        Args:
            matrices: by the names of the modules.
            ignore: modules that stay in floats and that a loader may make linear layers of.
            are_all: these are the names by which loaders know them; else class names are no targets.
            experts: which of the modules belong to an expert.
        """

    def with_activations(self, kind: str) -> FolderCodec:
        """The layout for layers whose inputs are to be rounded, too, while the model runs.

        Args:
            kind: what inputs are rounded to (`int8`).

        Raises:
            InputError: it cannot say so.
        """
        raise InputError(
            f"--activations {kind}: {self.name} says nothing of the inputs of layers",
            hint="--format compressed-tensors",
        )

    def as_described(self, entry: Mapping[str, Any]) -> FolderCodec:
        """The codec that writes a folder with the config `entry` again, quantized activations included."""
        return self

    def files(self, entry: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """JSON files besides config.json that loaders look for, by their names; `entry` is what `describe` gave."""
        return {}

    def notes(self, matrices: Mapping[str, QuantizedMatrix], experts: Collection[str] = ()) -> list[str]:
        """What the user of a folder with these matrices should know.

        Args:
            matrices: by the names of the modules.
            experts: which of the modules belong to an expert.
        """
        return []


def folder_codec(name: str) -> FolderCodec:
    """The codec that `--format NAME` means.

    Raises:
        InputError: there is none of that name, or it is no layout of folders that is written.
    """
    codec: object = entry_points.by_name(GROUP, name, "--format", object)
    if isinstance(codec, FolderCodec):
        return codec
    known = ", ".join(codec.name for codec in folder_readers() if isinstance(codec, FolderCodec))
    raise InputError(
        f"--format {name} is no layout of folders that is written; expected {known}",
        hint=command_for(name) or "--format compressed-tensors",
    )


def command_for(name: str) -> str:
    """The command that writes a layout which neither `quantize` nor `convert` does; empty for others."""
    for entry in entry_points.entries(GROUP):
        if entry.name == name:
            codec = entry_points.load(entry)
            return codec.written_by if isinstance(codec, Codec) else ""
    return ""


def folder_readers() -> tuple[FolderReader, ...]:
    """All layouts of folders that can be read."""
    return tuple(entry_points.loaded(GROUP, FolderReader).values())  # type: ignore[type-abstract]


def readers_by_method() -> dict[str, FolderReader]:
    """The same by what config.json calls a layout: its name, and the others that it has there."""
    return {name: reader for reader in folder_readers() for name in (reader.name, *reader.also)}


def alternatives(numbers: Sequence[int]) -> str:
    """`2, 4 or 8`."""
    return " or ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])]) if len(numbers) > 1 else str(numbers[0])
