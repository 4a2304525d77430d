"""The program: its commands, and the one place where an error becomes an exit code.

0    done
1    ran, and the answer is no (`diff`, `verify`, `eval --fail-under`, `plugins check`)
2    could not run: usage, input, plan, disk
3    a bug in llmkit or a plugin; a crash file says where
130  interrupted, with the command that resumes
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shlex
import sys
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from llmkit.cli import (
    convert,
    decode,
    delta,
    demo,
    diff,
    doctor,
    draft,
    eval,
    explain,
    export,
    generate,
    inspect,
    lora,
    observe,
    perplexity,
    plugins,
    quantize,
    report,
    verify,
    vocab,
)
from llmkit.cli.command import PipeClosed
from llmkit.cli.environment_errors import WAY_OUT, as_refusal, check_arguments, hint_of
from llmkit.cli.interrupts import Interrupted, heard, is_ending, is_heard, terminable
from llmkit.cli.output import AnswerLost, Mode, Output, drop_stdout
from llmkit.cli.terminal import open_streams
from llmkit.errors import LlmkitError, nearest
from llmkit.version import __version__

EXIT_USAGE = 2
EXIT_BUG = 3
EXIT_INTERRUPTED = 130


class _Root(TyperGroup):
    """The program: a command may have a name of two words, the first of which is a command, too."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = " ".join(args[:2])
        if name in self.commands and len(args) > 1:
            return name, self.commands[name], args[2:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="llmkit",
    cls=_Root,
    help="A workbench for open LLM checkpoints: deltas, quantization, evaluation, and a look inside.",
    epilog="A model is a folder, a weight file or a hub id. `llmkit COMMAND --help` shows options and examples.",
    no_args_is_help=True,
    # Plain help: rich would triple the time that `--help` takes.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"llmkit {__version__}\n")
        raise typer.Exit(0)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


_COMMANDS = (
    convert.convert, quantize.quantize, observe.observe, export.export, eval.evaluate, perplexity.perplexity,
    report.report, generate.generate, inspect.inspect, diff.diff, verify.verify, explain.explain, doctor.doctor,
    demo.demo,
)  # fmt: skip
_GROUPS = {
    "delta": ("Apply and make weight deltas; decode XOR and encrypted releases.",
              (delta.apply, delta.make, decode.xor, decode.decrypt)),
    "lora": ("Merge, combine and extract adapters (LoRA and its kin).", (lora.merge, lora.combine, lora.extract)),
    "vocab": ("Extend, trim and describe vocabularies.", (vocab.extend, vocab.trim, vocab.info)),
    "plugins": ("List, show, check and draft the architecture plugins.",
                (plugins.list_plugins, plugins.show, plugins.check, draft.new)),
}  # fmt: skip


def _assemble() -> None:
    for command in _COMMANDS:
        command.add_to(app)
    for name, (text, members) in _GROUPS.items():
        group = typer.Typer(help=text, no_args_is_help=True)
        for command in members:
            command.add_to(group)
        app.add_typer(group, name=name, short_help=text)  # the whole sentence in the list


_assemble()


@cache
def _commands() -> Any:
    """The tree of commands, which Typer makes of all signatures: once in a process that calls `main` often."""
    return typer.main.get_command(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    out = Output(Mode.JSON if "--json" in args else Mode.HUMAN)
    try:
        return _guarded(args, out)
    except (BrokenPipeError, PipeClosed):
        drop_stdout()
        return 0
    except OSError as error:  # stdout or stderr cannot be written, so there is nowhere else to say it
        drop_stdout()
        with contextlib.suppress(OSError, ValueError):
            Output().error("output", f"cannot write the answer: {error.strerror or error}", WAY_OUT)
        return EXIT_USAGE


def _guarded(args: Sequence[str], out: Output) -> int:
    try:
        check_arguments(args)
        code = _commands().main(args=args, prog_name="llmkit", standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # what Typer makes of Ctrl-C before the command begins
            raise KeyboardInterrupt
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has enough; the code stands
            drop_stdout()
        return code if isinstance(code, int) else 0
    except LlmkitError as error:
        if is_heard():
            return _interrupted(out, args, Interrupted(is_resumable=False))
        _show_stack_if_debugging()
        out.error(error.kind, error.message, hint_of(error, error.hint))
        return error.exit_code
    except Interrupted as stop:
        return _interrupted(out, args, stop)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(out, args, Interrupted(is_resumable=False))
    except (BrokenPipeError, PipeClosed, AnswerLost):
        raise
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except GeneratorExit:
        raise
    except BaseException as error:  # noqa: BLE001 - the boundary: whatever else escapes is a bug, a panic of Rust too
        if is_heard():
            return _interrupted(out, args, Interrupted(is_resumable=False))
        if hasattr(error, "format_message"):
            return _usage(out, error)
        refusal = as_refusal(error)
        if refusal is None:
            return _bug(out, args, error)
        _show_stack_if_debugging()
        out.error(refusal.kind, refusal.message, hint_of(error, refusal.hint))
        return refusal.exit_code


def run() -> NoReturn:
    """The console script: `main`, then out at once, because tearing torch down would take another half second."""
    open_streams()
    gc.set_threshold(50_000, 20, 100)  # plans hold a million objects that live to the end
    if "--dry-run" in sys.argv:  # and it is near
        gc.disable()
    with terminable(), heard(report_interrupt):  # a command is terminable by itself, but it has to be found first
        code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def report_interrupt(stop: Interrupted) -> int:
    """Say in this process's own command line how it ended; the exit code."""
    args = sys.argv[1:]
    code = _interrupted(Output(Mode.JSON if "--json" in args else Mode.HUMAN), args, stop)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    return code


def _interrupted(out: Output, args: Sequence[str], stop: Interrupted) -> int:
    is_ending()
    command = shlex.join(["llmkit", *args])
    hint = f"it goes on where it stopped: {command}" if stop.is_resumable else stop.hint
    if out.mode == Mode.HUMAN and sys.stderr.isatty():  # the terminal has written ^C
        sys.stderr.write("\n")
    out.error("interrupted", stop.message, hint)
    return EXIT_INTERRUPTED


def _usage(out: Output, error: Any) -> int:
    """Report Typer's own usage errors, recognised by their methods: their classes are not public."""
    message = str(error.format_message()).strip()
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "llmkit"
    if message.startswith("Usage:"):  # no arguments at all: the help text is the message
        if out.mode == Mode.JSON:
            message = "no command given"
        else:
            sys.stderr.write(message + "\n")
            return EXIT_USAGE
    message = re.sub(r"[\s(']*(Possible options|Did you mean).*", "", message, flags=re.S).rstrip(".")
    guess = _intended(error, message, context)
    out.error("usage", message[0].lower() + message[1:], f"did you mean {guess}?" if guess else f"{path} --help")
    return EXIT_USAGE


def _intended(error: Any, message: str, context: Any) -> str | None:
    """The option or command that was meant, if one is near."""
    option = getattr(error, "option_name", None)
    if option is not None:
        names = [name for p in context.command.params for name in p.opts] if context is not None else []
        return nearest(str(option), names)
    wrong = re.match(r"No such command '(.*)'", message)
    if wrong and context is not None:
        guess = nearest(wrong[1], context.command.list_commands(context))
        return f"{context.command_path} {guess}" if guess else None
    return None


def _bug(out: Output, args: Sequence[str], error: BaseException) -> int:
    from llmkit.cli.crash import write_crash_file

    _show_stack_if_debugging()
    path = write_crash_file(args, error)
    out.error(
        "bug",
        f"sorry, this is a bug in llmkit or a plugin: {type(error).__name__}: {error}",
        f"please report it with the file {path}" if path else "LLMKIT_DEBUG=1 shows where",
    )
    return EXIT_BUG


def _show_stack_if_debugging() -> None:
    if os.environ.get("LLMKIT_DEBUG") == "1":
        import traceback

        traceback.print_exc()
