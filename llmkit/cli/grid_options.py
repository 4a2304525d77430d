"""The options of commands that quantize: grids, grids of single matrices, and calibration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from llmkit.cli import completion
from llmkit.cli.options import MAY_NAME_A_FILE, DeviceOption, SeedOption
from llmkit.cli.output import Output
from llmkit.errors import InputError
from llmkit.tensors.device import CPU, device_named
from llmkit.tensors.spec import parse_bytes

if TYPE_CHECKING:
    from llmkit.calibration.bit_allocation import Target
    from llmkit.calibration.quantizer import CalibratedQuantizer
    from llmkit.calibration.samples import Samples
    from llmkit.calibration.stored import StoredQuantizer
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.checkpoint.statistics import StoredStatistics
    from llmkit.transforms.recipe import Scheme


def _globs(option: str, help: str) -> Any:
    """Globs of modules."""
    return typer.Option(option, metavar="GLOB", autocompletion=completion.modules, help=help)


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """The options of every command that puts weights on a grid, besides `--bits`."""

    title: ClassVar = "Grids and rounding"
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.quantization_methods,
            help="How weights are rounded: rtn to nearest, mse on the grid with the least squared error, hqq with zero "
            "points of the least sparse error, awq after inputs are scaled, gptq with later columns taking up earlier "
            "errors, gptq-fast without what else gptq does, signround as is learnt for each block, gptq-signround from "
            "what gptq makes, best as gptq with feedback of rows and twice the windows (default: mse; gptq where "
            "quantize reads a text).",
        ),
    ] = None
    group_size: Annotated[
        str,
        typer.Option(
            metavar="N|channel|auto",
            autocompletion=completion.among("auto", "channel", "16", "32", "64", "128", "256"),
            help="Input columns that share a scale: 16, 32, 64, 128, 256, or channel for one scale a row. auto: the "
            "largest of 64 and 32 that divides every row; for 8 bits 128, too.",
        ),
    ] = "auto"
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Centre the grid on zero, or give each group a zero point (default: a zero point, where the format "
            "has them; with 4 bits it costs 2 % of the bytes).",
        ),
    ] = None
    keep: Annotated[list[str] | None, _globs("--keep", "Leave modules in floats (may be repeated).")] = None
    only: Annotated[list[str] | None, _globs("--only", "Quantize these modules (may be repeated).")] = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The same as arguments of a transform.

        Raises:
            InputError: a group size that is none.
        """
        return {
            "group_size": _group_size(self.group_size), "symmetric": self.symmetric, "keep": self.keep or (),
            "only": self.only or (), "method": self.method,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MixedPrecisionOptions:
    """The options of a command that gives matrices grids of their own."""

    title: ClassVar = "Bits by matrix"
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Grids of single matrices, as YAML: globs of modules, each with bits, {bits, group_size, symmetric}, "
            "float, or a type of GGUF; the first that matches counts. Without --bits what none names stays in floats.",
        ),
    ] = None
    head_bits: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Quantize the head, too, unless it is the embedding; 16 leaves it in floats.",
        ),
    ] = None
    embedding_bits: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Quantize the embedding, which --format gguf alone can hold.",
        ),
    ] = None
    target_bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            min=0.1,
            help="Instead of --bits: choose bits of each matrix by measured sensitivity, so that all tensors, what "
            "stays in floats included, take so many bits for each parameter. Measures first, also with --dry-run.",
        ),
    ] = None
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The same, so that the files with the weights have this size: 4GB, 700MiB.",
        ),
    ] = None

    def rules(self, ckpt: Checkpoint) -> dict[str, Scheme]:
        """The options for single matrices as one recipe.

        Raises:
            InputError: the file is no recipe.
            SpecError: a head that is the embedding.
        """
        from llmkit.transforms.recipe import read_recipe
        from llmkit.transforms.schemes import head_and_embedding_recipe

        of_options = head_and_embedding_recipe(ckpt, head_bits=self.head_bits, embedding_bits=self.embedding_bits)
        return {**of_options, **(read_recipe(self.recipe) if self.recipe is not None else {})}

    @property
    def is_given(self) -> bool:
        """Whether a size or a recipe says how many bits are taken."""
        return any(given is not None for given in (self.recipe, self.target_bits, self.target_size))

    def target(self, bits: int | None) -> Target | None:
        """The size that is aimed at; None where bits are given, or a recipe alone says what to do.

        Raises:
            InputError: more than one of them, or none.
        """
        from llmkit.calibration.bit_allocation import Target

        numbers = {"--bits": bits, "--target-bits": self.target_bits, "--target-size": self.target_size}
        given = [option for option, value in numbers.items() if value is not None]
        if len(given) > 1 or (not given and self.recipe is None):
            found = f"{' and '.join(given)} are" if given else "none is"
            raise InputError(f"{found} given; expected one of {', '.join(numbers)}", hint="--bits 4")
        if self.target_bits is None and self.target_size is None:
            return None
        return Target(self.target_bits, parse_bytes(self.target_size) if self.target_size is not None else None)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The options of every command that measures the inputs of layers while the model reads a text."""

    title: ClassVar = "Calibration"
    calibration: Annotated[
        str | None,
        MAY_NAME_A_FILE,
        typer.Option(
            metavar="FILE|DIR|built-in|self|none",
            help="What the model reads, to weigh errors by the inputs of its layers: a text, JSON lines (also chats), "
            "a folder of them, the text that llmkit brings, or what the model writes itself (default: built-in; none "
            "for quantize --bits 8).",
        ),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Windows of the calibration text (default: 128; with best 256)."),
    ] = None
    length: Annotated[int, typer.Option(metavar="N", min=8, help="Tokens of each window of the calibration text.")] = (
        512
    )
    seed: SeedOption = 0
    device: DeviceOption = CPU

    @property
    def where(self) -> str:
        """The device to compute on: one block, or one matrix, at a time; all else stays in memory.

        Raises:
            LlmkitError: there is none of that name.
        """
        return device_named(self.device)

    def windows(self, source: str = "built-in", n: int | None = None) -> Samples:
        """Those of the text that `--calibration` names, or `source` where it names none.

        Args:
            n: how many, where `--samples` is not given; None for the usual number.

        Raises:
            InputError: no such text, or one too short.
        """
        from llmkit.calibration.samples import Samples
        from llmkit.calibration.texts import own_text, read_text
        from llmkit.quantization.method import N_WINDOWS

        source = self.calibration or source
        named = {"self": lambda: None, "built-in": own_text}
        text = named[source]() if source in named else read_text(Path(source))
        return Samples(text, self.samples or n or N_WINDOWS, self.length, self.seed)


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(TextOptions):
    """The options of every command that calibrates: on a text, or on statistics in a file."""

    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Instead of a text: what quantize observe kept, or an importance matrix of llama.cpp."
        ),
    ] = None

    def known(self, out: Output, ckpt: Checkpoint, method: str | None, bits: int) -> Samples | StoredStatistics | None:
        """The text or the statistics to calibrate on; None for neither, with a note if that is not the user's choice.

        Args:
            method: as `--method` names it.

        Raises:
            InputError: no such text, one too short, or options for one that is not read.
        """
        if self.statistics is not None:
            from llmkit.checkpoint.statistics import open_statistics

            out.refuse_options({"calibration", "samples", "length", "seed"}, "a run with --statistics")
            return open_statistics(self.statistics, ckpt)
        source = self.calibration or _default_calibration(out, ckpt, method, bits)
        if source == "none":
            out.refuse_options({"samples", "length", "seed"}, "a run without a text", "add --calibration built-in")
            return None
        from llmkit.quantization.method import method_named

        return self.windows(source, method_named(method, is_calibrated=None).n_windows if method is not None else None)

    def quantizer(
        self, ckpt: Checkpoint, known: Samples | StoredStatistics | None, method: str | None
    ) -> CalibratedQuantizer | StoredQuantizer | None:
        """What quantizes with the inputs known; None for without.

        Args:
            known: as of `known`.
        """
        if known is None:
            return None
        from llmkit.calibration.quantizer import CalibratedQuantizer
        from llmkit.calibration.ranks import joined
        from llmkit.calibration.samples import Samples
        from llmkit.calibration.stored import StoredQuantizer
        from llmkit.quantization.method import method_named

        outside = method_named("mse") if method is None else None
        if not isinstance(known, Samples):
            return StoredQuantizer(ckpt, known, outside=outside)
        return CalibratedQuantizer(ckpt, known, outside=outside, ranks=joined())


def _default_calibration(out: Output, ckpt: Checkpoint, method: str | None, bits: int) -> str:
    """Whether to calibrate where nobody says: for few bits, where the method and the model can.

    Raises:
        InputError: no such method.
    """
    from llmkit.checkpoint.tokenizer import has_tokenizer
    from llmkit.quantization.method import method_named

    way = method_named(method, is_calibrated=None) if method is not None else None
    if (way is not None and not way.looks_at_inputs) or (bits >= 8 and not (way is not None and way.needs)):
        return "none"
    lacks = "a plugin that describes it" if ckpt.model is None else "" if has_tokenizer(ckpt) else "a tokenizer"
    if not lacks or (way is not None and way.needs):
        return "built-in"
    out.note(f"not calibrated: {ckpt.label} lacks {lacks}")
    return "none"


def _group_size(text: str) -> int | str:
    if text in ("auto", "channel"):
        return text
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    raise InputError(f"--group-size {text!r}: expected a number, channel or auto", hint="--group-size 64")
