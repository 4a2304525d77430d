"""Every option that more than one command takes, declared once: one name, one meaning.

A group of options may have a `title`, under which help texts show those that are not required.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from llmkit.cli import completion
from llmkit.cli.output import Output
from llmkit.errors import InputError

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.decoder.language_model import LanguageModel

MAY_NAME_A_FILE = object()
"""Marks an option whose text is a file to read, or one of a few words; `Path` says so of the others."""

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
        "or auto (onnx or llmkit); for eval also vllm, and openai (a server: --url).",
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
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of all random choices.")]
OutputOption = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="OUT", help="What to write: a folder, or one file. It appears only when it is whole."
    ),
]
JsonPath = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="RUN.json", help="Write the whole record to this file.")
]


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """The options of every command that writes a folder."""

    title: ClassVar = "Writing"
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
        int | None, typer.Option(metavar="N", min=1, help="Steps at a time (default: one a core, at most 8).")
    ] = None
    inputs: tuple[Path, ...] = field(default=(), init=False)  # what the other arguments of the command name


@dataclass(frozen=True, kw_only=True)
class WriteOptions(FolderOptions):
    """The options of every command that writes a model."""

    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Begin a new file beyond this size: 5GB, 700MiB.")
    ] = "5GB"


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """The options of every command that computes a model."""

    title: ClassVar = "Computing"
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
        from llmkit.checkpoint.classification import require_model
        from llmkit.checkpoint.quantized import refuse_unread
        from llmkit.decoder.preflight import model_warnings

        ckpt = require_model(open_checkpoint(model), use)
        refuse_unread(ckpt)
        for doubt in model_warnings(ckpt, self.backend):
            out.warning(doubt)
        return ckpt

    def load(self, out: Output, ckpt: Checkpoint) -> LanguageModel:
        """What computes the checkpoint.

        Raises:
            LlmkitError: the backend cannot compute it, or does not have one of the options.
        """
        from llmkit.onnx.backend import BACKENDS, load_backend

        if self.backend not in BACKENDS:
            from llmkit.evaluation.engine import engine_names

            if self.backend in engine_names():
                known = f"--backend {', '.join(BACKENDS)}"
                raise InputError(f"--backend {self.backend} is for llmkit eval alone", hint=known)
        out.doing(f"loading {ckpt.label}")
        model = load_backend(ckpt, backend=self.backend, dtype=self.dtype, device=self.device, provider=self.provider)
        for doubt in model.doubts:
            out.warning(doubt)
        return model


@dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """The options of a command whose work is cut up, or done elsewhere."""

    title: ClassVar = "Batches, parts, servers"
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens in one forward pass at most (default: 1024, of a wide model on a CPU fewer).",
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Make batches so small that the process takes at most this: 8GiB, 900MiB (default: no limit).",
        ),
    ] = None
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="With --backend openai: the server, as http://host:8000/v1 (#NAME for one of its models).",
        ),
    ] = None
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only part I of N, cut by subject; auto takes I and N from torchrun, MPI, srun or a Slurm array. "
            "llmkit report puts the records together.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The options of every command that puts prompts in a chat format."""

    title: ClassVar = "Chat format"
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts in the model's chat format (its template, or its family's).")
    ] = False
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.formats,
            help="In another chat format: alpaca, vicuna, chatglm2, …; chat-template is the model's own, raw is none.",
        ),
    ] = None
    format: Annotated[str | None, typer.Option(metavar="NAME", autocompletion=completion.formats, hidden=True)] = (
        None  # as it was called once
    )

    @property
    def name(self) -> str | None:
        """The format that was named."""
        return self.chat_template or self.format


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """The options of every command whose scores may decide a CI job."""

    title: ClassVar = "Thresholds"
    fail_under: Annotated[
        str | None,
        typer.Option(
            metavar="X|NAME[:AVERAGE]=X,…",
            help="Exit code 1 when an accuracy is below X (0 to 1): of all benchmarks, or of those named; AVERAGE is "
            "micro (default), macro or categories.",
        ),
    ] = None
    max_drop: Annotated[
        str | None,
        typer.Option(
            metavar="X|NAME[:AVERAGE]=X,…",
            help="Exit code 1 when an accuracy is more than X (0.01: one point) below the baseline's, and that is "
            "significant.",
        ),
    ] = None
    strict: Annotated[bool, typer.Option("--strict", help="With --max-drop: also when it may be chance.")] = False
    common: Annotated[
        bool,
        typer.Option(
            "--common",
            help="Compare the questions that both runs have, where one has others, or another protocol or shots.",
        ),
    ] = False
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE.xml", help="Write subjects and thresholds as JUnit XML.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The options of every command."""

    title: ClassVar = "For every command"
    json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON document.")] = False
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the bare answer, and errors.")] = False
    verbose: Annotated[
        int, typer.Option("-v", "--verbose", count=True, show_default=False, help="Say more; -vv for debugging.")
    ] = 0
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.py",
            help="A plugin file that describes an architecture (may be repeated; LLMKIT_PLUGINS names some for good).",
        ),
    ] = None
