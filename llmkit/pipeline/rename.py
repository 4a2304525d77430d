"""Renames that replace nothing, and two names that are exchanged: what Linux and macOS offer beyond POSIX.

Where the system or the file system has neither, a caller gets the nearest that POSIX has; nothing here is needed to
import this module on any system.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
# Linux: renameat2(2); macOS: renamex_np(2).
_NO_REPLACE = {"linux": 1, "darwin": 4}
_EXCHANGE = {"linux": 2, "darwin": 2}
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or folder; the new name must be free.

    Raises:
        FileExistsError: something has it, a dangling link included; it stays as it is.
        OSError: the disk refuses.
    """
    if _system_rename(source, target, _NO_REPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if source.is_dir():
        os.rename(source, target)  # of what may have come meanwhile, POSIX lets a folder replace an empty one alone
        return
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links there
        os.rename(source, target)
    else:
        os.unlink(source)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically; False, with nothing done, if the system cannot.

    Raises:
        OSError: the disk refuses.
    """
    return _system_rename(first, second, _EXCHANGE)


def _system_rename(source: Path, target: Path, flags: dict[str, int]) -> bool:
    flag = flags.get(sys.platform)
    if flag is None:
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    old, new = os.fsencode(source), os.fsencode(target)
    if sys.platform == "darwin":
        function = getattr(libc, "renamex_np", None)
        arguments = (old, new, ctypes.c_uint(flag))
    else:
        function = getattr(libc, "renameat2", None)
        arguments = (_AT_FDCWD, old, _AT_FDCWD, new, ctypes.c_uint(flag))
    if function is None:
        return False
    if function(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
