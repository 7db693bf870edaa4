"""Where a program is: the search of execvp(3), done ahead, so that the file can be looked at before it starts."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Final

from usermm.errors import UsermmError

NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126
"""Exit statuses, as a shell gives them."""

_DEFAULT_PATH: Final = "/bin:/usr/bin"  # what execvp(3) searches without PATH


class ProgramError(UsermmError):
    """The program cannot be started; `status` is the exit status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def find(name: str, environment: Mapping[str, str]) -> str:
    """The path that execvp(3) would start. Raises ProgramError: not found (127), or not executable (126)."""
    if not name:
        raise ProgramError(NOT_FOUND, "the program's name is empty: give a path or a name in PATH")
    if "\0" in name:
        raise ProgramError(NOT_FOUND, f"{name!r} contains a null byte: no file is called so")
    refused = ""
    for path in _candidates(name, environment):
        number = _obstacle(path)
        if number == 0:
            return path
        if number not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            raise ProgramError(NOT_EXECUTABLE, f"{path}: {os.strerror(number)}")
        refused = refused or (path if number == errno.EACCES else "")
    if refused:
        what = "is a directory" if os.path.isdir(refused) else "may not be executed: look at its mode, and its mount's"
        raise ProgramError(NOT_EXECUTABLE, f"{refused} {what}")
    where = "there is no such file" if "/" in name else "no such program in PATH: give its path"
    raise ProgramError(NOT_FOUND, f"{name}: {where}")


def _candidates(name: str, environment: Mapping[str, str]) -> Iterator[str]:
    if "/" in name:
        yield name
        return
    for folder in environment.get("PATH", _DEFAULT_PATH).split(":"):
        # An empty part is the current directory; "./" says so, and keeps execve from searching anew.
        yield os.path.join(folder or ".", name)


def _obstacle(path: str) -> int:
    """0, or the errno that execve(2) would give for the file itself."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return errno.EACCES
    except OSError as error:
        return error.errno or errno.ENOENT
    return 0 if os.access(path, os.X_OK, effective_ids=True) else errno.EACCES
