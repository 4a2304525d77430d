"""Every option that more than one command takes, declared once: one name, one meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli import completion
from llmkit.errors import InputError

if TYPE_CHECKING:
    from llmkit.calibration.quantizer import CalibratedQuantizer
    from llmkit.calibration.samples import Samples
    from llmkit.calibration.stored import StoredQuantizer
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.checkpoint.statistics import StoredStatistics
    from llmkit.cli.output import Output
    from llmkit.decoder.language_model import LanguageModel

__all__ = [
    "Chat",
    "Computing",
    "DtypeOption",
    "Folder",
    "Grids",
    "JsonPath",
    "ModelArgument",
    "OutDtypeOption",
    "SeedOption",
    "Writing",
]

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a weight file or a hub id.")]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="DTYPE", autocompletion=completion.dtypes, help="Compute in float32, bfloat16 or float16."
    ),
]
OutDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        autocompletion=completion.dtypes,
        help="Store floats as float32, bfloat16 or float16 (default: as now).",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        autocompletion=completion.among("cpu", "cuda", "auto"),
        help="Where to compute: cpu, cuda, cuda:1, or auto.",
    ),
]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        autocompletion=completion.backends,
        help="What computes the model: llmkit, transformers (where no plugin describes it), onnx (an exported folder), "
        "or auto (onnx or llmkit).",
    ),
]
ProviderOption = Annotated[
    str | None,
    typer.Option(
        "--provider",
        metavar="NAME",
        autocompletion=completion.providers,
        help="For an exported folder: ONNX Runtime's cpu (default) or cuda.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything random.")]
OutputOption = Annotated[
    Path, typer.Option("-o", "--output", metavar="OUT", help="The folder to write. It appears only when it is whole.")
]
JsonPath = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="RUN.json", help="Write the whole record to this file.")
]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The options of every command that writes a folder."""

    output: OutputOption
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no tensor, write nothing.")] = False
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace OUT, once the new one is whole: a folder of llmkit's, or with a model alone."
        ),
    ] = False
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Go on where llmkit would refuse: a doubtful input, said in the manifest; with --overwrite an OUT "
            "that holds other files, which are deleted.",
        ),
    ] = False
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start anew rather than go on after an interruption.")
    ] = False
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=1, help="Steps at a time (default: one a core, at most 8)."),
    ] = None
    inputs: tuple[Path, ...] = field(default=(), init=False)  # what the other arguments of the command name


@dataclass(frozen=True, kw_only=True)
class Writing(Folder):
    """The options of every command that writes a model."""

    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Begin a new file beyond this size: 5GB, 700MiB.")
    ] = "5GB"


@dataclass(frozen=True, kw_only=True)
class Grids:
    """The options of every command that puts weights on a grid, besides `--bits`."""

    group_size: Annotated[
        str,
        typer.Option(
            "--group-size",
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
            show_default=False,
        ),
    ] = None
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="GLOB",
            autocompletion=completion.modules,
            help="Leave modules in floats (may be repeated).",
        ),
    ] = None
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="GLOB",
            autocompletion=completion.modules,
            help="Quantize these modules (may be repeated).",
        ),
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            autocompletion=completion.quantization_methods,
            help="How weights are put on the grid: rtn rounds to nearest, mse on the grid with the least error, hqq on "
            "zero points of the least sparse error, awq scales inputs first, gptq lets later columns take up earlier "
            "errors, signround (best) learns the rounding of each block (default: gptq where a text is read, else "
            "mse).",
            show_default=False,
        ),
    ] = None

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
class Calibrating:
    """The options of every command that looks at the inputs of layers while the model reads a text."""

    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="FILE|DIR|built-in|self|none",
            help="What the model reads, to weigh errors by the inputs of its layers: a text, JSON lines (also chats), "
            "a folder of them, the text that llmkit brings, or what the model writes itself (default: built-in, for "
            "fewer than 8 bits).",
            show_default=False,
        ),
    ] = None
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Windows of the calibration text.")] = (
        128
    )
    length: Annotated[
        int, typer.Option("--length", metavar="N", min=8, help="Tokens of each window of the calibration text.")
    ] = 512
    seed: SeedOption = 0
    statistics: Annotated[
        Path | None,
        typer.Option(
            "--statistics",
            metavar="FILE",
            help="Instead of a text: what quantize observe kept, or an importance matrix of llama.cpp.",
        ),
    ] = None

    def quantizer(
        self, out: Output, ckpt: Checkpoint, method: str | None, bits: int
    ) -> CalibratedQuantizer | StoredQuantizer | None:
        """What quantizes with the inputs known; None for without. Says why where nobody asked for that.

        Args:
            method: as `--method` names it.

        Raises:
            InputError: no such text, one too short, or options for one that is not read.
        """
        from llmkit.calibration.quantizer import CalibratedQuantizer
        from llmkit.calibration.ranks import joined
        from llmkit.quantization.method import method_named

        if self.statistics is not None:
            from llmkit.calibration.stored import StoredQuantizer
            from llmkit.checkpoint.statistics import open_statistics

            out.refuse_options({"calibration", "samples", "length", "seed"}, "a run with --statistics")
            return StoredQuantizer(ckpt, open_statistics(self.statistics, ckpt))
        source = self.calibration or _default_calibration(out, ckpt, method, bits)
        if source == "none":
            out.refuse_options({"samples", "length", "seed"}, "a run without a text", "add --calibration built-in")
            return None
        outside = method_named("mse") if method is None else None
        return CalibratedQuantizer(ckpt, self.windows(source), outside=outside, ranks=joined())

    def measured(self, out: Output, ckpt: Checkpoint, bits: int) -> StoredStatistics | None:
        """What is known of the inputs of layers, or will be once the model has read the text; None for nothing.

        Raises:
            InputError: as of `quantizer`.
        """
        if self.statistics is not None:
            from llmkit.checkpoint.statistics import open_statistics

            out.refuse_options({"calibration", "samples", "length", "seed"}, "a run with --statistics")
            return open_statistics(self.statistics, ckpt)
        source = self.calibration or _default_calibration(out, ckpt, None, bits)
        if source == "none":
            out.refuse_options({"samples", "length", "seed"}, "a run without a text", "add --calibration built-in")
            return None
        from llmkit.calibration.observe import observed

        return observed(ckpt, self.windows(source), ["squares"])[0]

    def windows(self, source: str = "built-in") -> Samples:
        """Those of the text that `--calibration` names, or `source` where it names none.

        Raises:
            InputError: no such text, or one too short.
        """
        from llmkit.calibration.samples import Samples
        from llmkit.calibration.texts import own_text, read_text

        source = self.calibration or source
        named = {"self": lambda: None, "built-in": own_text}
        text = named[source]() if source in named else read_text(Path(source))
        return Samples(text, self.samples, self.length, self.seed)


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
    if text.isdigit():
        return int(text)
    raise InputError(f"--group-size {text!r}: expected a number, channel or auto", hint="--group-size 64")


@dataclass(frozen=True, kw_only=True)
class Computing:
    """The options of every command that computes a model."""

    dtype: DtypeOption = "float32"
    device: DeviceOption = "cpu"
    backend: BackendOption = "auto"
    provider: ProviderOption = None

    def open(self, out: Output, model: str, use: str) -> Checkpoint:
        """The checkpoint of a model that the command `use` can compute; warns where its results may be wrong.

        Raises:
            LlmkitError: it cannot be read, or is no model.
        """
        from llmkit.checkpoint.checkpoint import open_checkpoint
        from llmkit.checkpoint.contents import require_model
        from llmkit.checkpoint.quantized import refuse_unread
        from llmkit.decoder.doubts import doubts_of

        ckpt = require_model(open_checkpoint(model), use)
        refuse_unread(ckpt)
        for doubt in doubts_of(ckpt, self.backend):
            out.warning(doubt)
        return ckpt

    def load(self, out: Output, ckpt: Checkpoint) -> LanguageModel:
        """What computes the checkpoint.

        Raises:
            LlmkitError: the backend cannot compute it, or does not have one of the options.
        """
        from llmkit.onnx.backend import load_backend

        out.doing(f"loading {ckpt.label}")
        return load_backend(ckpt, backend=self.backend, dtype=self.dtype, device=self.device, provider=self.provider)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """The options of every command that puts prompts in a chat format."""

    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts in the model's chat format (its template, or its family's).")
    ] = False
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            metavar="NAME",
            autocompletion=completion.formats,
            help="In another chat format: alpaca, vicuna, chatglm2, …; chat-template is the model's own, raw is none.",
        ),
    ] = None
    format: Annotated[
        str | None, typer.Option("--format", metavar="NAME", autocompletion=completion.formats, hidden=True)
    ] = None  # as it was called once

    @property
    def name(self) -> str | None:
        """The format that was named."""
        return self.chat_template or self.format


@dataclass(frozen=True, kw_only=True)
class Common:
    """The options of every command."""

    json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON document.")] = False
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the bare answer, and errors.")] = False
    verbose: Annotated[
        int, typer.Option("-v", "--verbose", count=True, show_default=False, help="Say more; -vv for debugging.")
    ] = 0
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin",
            metavar="FILE.py",
            help="A plugin file that describes an architecture (may be repeated; LLMKIT_PLUGINS names some for good).",
        ),
    ] = None
