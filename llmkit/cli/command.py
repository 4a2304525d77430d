"""How a plain function becomes a command: shared options, the output object, examples, interrupts.

A command is written as `def name(out: Output, model: ModelArgument, writing: Writing, …)`. A parameter whose type is a
dataclass of options is replaced by its fields, so that shared options are declared once (`llmkit.cli.options`) and
reach the command as one object. `out` is made from `--json`, `-q` and `-v`, which every command has.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from llmkit.cli import completion
from llmkit.cli.environment_errors import require_folder
from llmkit.cli.interrupts import Interrupted, said_by, terminable
from llmkit.cli.libraries import libraries
from llmkit.cli.options import MAY_NAME_A_FILE, CommonOptions, FolderOptions
from llmkit.cli.output import AnswerLost, Mode, Output
from llmkit.errors import InputError
from llmkit.formats.paths import expanded

_TOO_LARGE = 2**63  # for integers of 64 bits, which seeds and sizes become


class PipeClosed(Exception):
    """The reader of stdout has gone (`| head`). Typer would make it the exit code 1, which means another thing here."""


class _Sectioned(TyperCommand):
    """A command whose help text shows options under the titles of their groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            title = getattr(param, "rich_help_panel", None) or f"{param.param_type_name.capitalize()}s"
            if "--help" in param.opts:
                title = CommonOptions.title
            shown = param.get_help_record(ctx)
            if shown is not None:
                sections.setdefault(title, []).append(shown)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


@dataclass(frozen=True)
class Command:
    """A function that the command line calls, and what its help text shows besides its docstring."""

    function: Callable[..., None]
    name: str
    examples: tuple[str, ...]

    def add_to(self, app: typer.Typer) -> None:
        """Register it with a program or a group of commands."""
        examples = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in self.examples)
        text = inspect.getdoc(self.function) or ""
        register = app.command(
            self.name, cls=_Sectioned, help=text, short_help=text.partition("\n")[0], epilog=examples
        )
        register(_flatten(self.function))


def command(*examples: str, name: str | None = None) -> Callable[[Callable[..., None]], Command]:
    """Make a function a command.

    Args:
        examples: command lines for the help text.
        name: where it is not the function's.
    """
    return lambda function: Command(function, name or function.__name__, examples)


def _flatten(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the options of its groups as parameters of their own, as Typer takes them."""
    groups, parameters = _parameters(function)
    paths = [p.name for p in parameters if _has_path((get_args(p.annotation) or [None])[0])]

    def run(**values: Any) -> None:
        require_folder()
        called = values.pop("called")
        values |= {name: _at_home(values[name]) for name in paths}
        stated = _given(called)
        _require_numbers(called.command_path, stated, values)
        inputs = _inputs(parameters, values)
        from llmkit.architecture.plugin_file import given_files

        options = {name: _take(group, values) for name, group in groups.items()}
        common = options.pop("")
        for each in options.values():
            if isinstance(each, FolderOptions):
                object.__setattr__(each, "inputs", (*inputs, *given_files()))
        with _output(common, called.command_path, stated) as out:
            function(out, **values, **options)

    run.__name__ = function.__name__
    run.__doc__ = function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameters(function: Callable[..., None]) -> tuple[dict[str, type], list[inspect.Parameter]]:
    """The groups of options by the parameter that takes them (the common ones: ""), and what Typer shall parse."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type] = {}
    parameters = [inspect.Parameter("called", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for p in inspect.signature(function).parameters.values():
        hint = hints[p.name]
        if hint is Output:
            continue
        if isinstance(hint, type) and is_dataclass(hint):
            groups[p.name] = hint
        else:
            parameters.append(p.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
    groups[""] = CommonOptions
    for group in groups.values():
        parameters += _options(group)
    for parameter in parameters:
        _offer_values(parameter)
    return groups, parameters


@contextmanager
def _output(common: CommonOptions, command_path: str, stated: Mapping[str, str]) -> Iterator[Output]:
    """What a command answers on, while it runs: signals, messages of libraries and lost readers are seen to."""
    from llmkit.architecture.registry import using  # the command line's own start needs no registry

    mode = Mode.JSON if common.json else Mode.QUIET if common.quiet else Mode.HUMAN
    try:
        out = Output(mode, common.verbose, stated).at_work(command_path)
        with terminable(), out.status_line, said_by(out.urgent), libraries(common.verbose), using(common.plugin or ()):
            yield out
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise AnswerLost(error.errno, error.strerror) from error
    except KeyboardInterrupt:
        raise Interrupted(is_resumable=False) from None
    except BrokenPipeError:
        raise PipeClosed from None


def _given(context: typer.Context) -> dict[str, str]:
    """The parameters that stand on the command line, and how each is spelt."""
    stated = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name) if parameter.name else None
        if source is not None and source.name == "COMMANDLINE" and parameter.name:
            is_off = context.params.get(parameter.name) is False and parameter.secondary_opts
            stated[parameter.name] = max(parameter.secondary_opts if is_off else parameter.opts, key=len)
    return stated


def _require_numbers(command: str, stated: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Refuse numbers that are none, or larger than any that libraries take.

    Raises:
        InputError: naming the option.
    """
    for name, option in stated.items():
        value = values.get(name)
        if isinstance(value, int | float) and not abs(value) < _TOO_LARGE:
            raise InputError(f"{option} {value}: expected a number below 2^63", hint=f"{command} --help")


def _inputs(parameters: Sequence[inspect.Parameter], values: Mapping[str, Any]) -> tuple[Path, ...]:
    """What there is in the file system of what the command reads."""
    paths: list[Path] = []
    for parameter in filter(is_read, parameters):
        value = values.get(parameter.name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str | Path):
                with suppress(OSError, ValueError):  # a hub id, or a text that can be no path
                    paths += [Path(each)] if Path(each).exists() else []
    return tuple(paths)


def is_read(parameter: inspect.Parameter) -> bool:
    """Whether it may name a file or folder that the command reads: an argument, a path that is not what is written."""
    kind, *about = get_args(parameter.annotation) or [None]
    if MAY_NAME_A_FILE in about or any(type(a).__name__ == "ArgumentInfo" for a in about):
        return True
    return parameter.name != "output" and _has_path(kind)


def _at_home(value: Any) -> Any:
    """Paths with the home folder for `~`, which shells leave as it stands in `--option=~/x`."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return expanded(value) if isinstance(value, Path) else value


def _has_path(kind: Any) -> bool:
    return kind is Path or any(map(_has_path, get_args(kind)))


def _options(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    title = getattr(group, "title", None)
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=hints[f.name] if f.default is MISSING else _under(title, hints[f.name]),
        )
        for f in fields(group)
        if f.init
    ]


def _under(title: str | None, hint: Any) -> Any:
    """The annotation of an option that help texts show under a title."""
    kind, *about = get_args(hint)
    titled = [copy(a) if isinstance(a, OptionInfo) else a for a in about]  # groups share options
    for option in titled:
        if isinstance(option, OptionInfo):
            option.rich_help_panel = title
    return Annotated[(kind, *titled)]


def _offer_values(parameter: inspect.Parameter) -> None:
    """Complete the values that the placeholder of an option lists (`link|copy`), where it says nothing else."""
    for about in get_args(parameter.annotation)[1:]:
        if re.fullmatch(r"[a-z0-9|]+", getattr(about, "metavar", None) or "") and about.autocompletion is None:
            about.autocompletion = completion.among(*about.metavar.split("|"))


def _take(group: type, values: dict[str, Any]) -> Any:
    fields_of_group: Mapping[str, Any] = {f.name: values.pop(f.name) for f in fields(group) if f.init}
    return group(**fields_of_group)
