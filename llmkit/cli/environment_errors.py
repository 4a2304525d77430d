"""Errors of the environment, which are no bugs wherever they come from: memory, disk, arguments, packages, panics.

Readers and writers name what they can; these are what is left: any call may meet a full memory, a name that is too
long for the file system, a folder without permission.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence

from llmkit.cli.packages import missing_package
from llmkit.errors import InputError, LlmkitError, OutputError, RequirementError, is_memory_error

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EBADF)
WAY_OUT = "send it to a file on a disk with room (> FILE), or to a program that reads it (| less)"
"""What to do where stdout takes nothing."""
_WORDS = {
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.ELOOP: "a symbolic link leads back to itself",
}


def check_arguments(args: Sequence[str]) -> None:
    """Refuse bytes that are no UTF-8, which no tokenizer, manifest or JSON answer can hold, and NUL, which no path can.

    And empty ones, which an unset variable leaves: as a path they would be the current folder. A prompt may be empty.

    Raises:
        InputError: naming the argument.
    """
    for number, arg in enumerate(args, 1):
        if "\0" in arg:
            raise InputError(f"argument {number} has a NUL character: {arg!r}", hint="leave it out")
        if args[0] != "generate" and (not arg or re.fullmatch("--[a-z-]+=", arg)):
            before = arg or args[number - 2]
            what = before.rstrip("=") if before.startswith("-") else f"argument {number}"
            raise InputError(f"{what} is empty", hint="leave it out, or give a value; is a variable unset?")
        if not arg.isascii():
            try:
                arg.encode("utf-8")
            except UnicodeEncodeError:
                raise InputError(
                    f"argument {number} is not UTF-8 text: {arg!r}",
                    hint="use a terminal in UTF-8; a file of such a name has to be renamed",
                ) from None


def require_folder() -> None:
    """Refuse to work in a folder that was deleted: no relative path leads anywhere, and torch's libraries do not load.

    Raises:
        InputError: it was.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            f"the folder that you are in is not there any more: {error.strerror}", hint="cd to another folder"
        ) from error


def as_refusal(error: BaseException) -> LlmkitError | None:
    """The `LlmkitError` for an error of the environment; None for a bug."""
    for cause in _chain(error):
        if isinstance(cause, LlmkitError):
            continue
        if is_memory_error(cause):
            first = str(cause).strip().splitlines()[:1]
            return RequirementError(
                f"too little memory: {first[0][:300] if first else 'an allocation failed'}",
                hint="raise the limit (ulimit -v, the container's), close other programs, or use fewer --workers",
            )
        # Of Rust, in which tokenizers are, which raise no class of their own; others read no files here.
        if type(cause) is Exception or type(cause).__name__ == "PanicException":
            return InputError(
                f"the tokenizers library stops at the model's tokenizer files: {cause}",
                hint="copy tokenizer.json from its source again; a step of it is wrong, or a pattern asks too much",
            )
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    return _of_file(error) if isinstance(error, OSError) else None


def hint_of(error: BaseException, hint: str | None) -> str | None:
    """The hint for an error: that of its cause where the limit of open files is it, whoever met it; else `hint`."""
    if not any(isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE) for cause in _chain(error)):
        return hint
    import resource  # a module of Unix, and so are the limits

    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now < most or most == resource.RLIM_INFINITY:
        return f"raise the limit, which is {now}: ulimit -n {65536 if most < 0 else min(most, 65536)}"
    return f"raise the limit, which is {now} (/etc/security/limits.conf, or the container's), or close other programs"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(20):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _of_file(error: OSError) -> LlmkitError:
    names = [str(n) if len(str(n)) <= 200 else f"{str(n)[:200]}…" for n in (error.filename, error.filename2) if n]
    reason = _WORDS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
    if error.errno in _UNWRITABLE:
        hint = WAY_OUT if error.errno == errno.EBADF else "make room, or choose another place"
        return OutputError(f"cannot write{' ' + names[-1] if names else ''}: {reason}", hint=hint)
    return InputError(f"cannot use {' or '.join(names)}: {reason}" if names else f"the system refuses: {reason}")
