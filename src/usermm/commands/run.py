"""``usermm run``: start a program, unchanged, that finds /dev/ummunotify and /dev/ummunot.

The program takes the place of this process, so its signals, terminal and exit status are its own.
Exit status: the program's; 127 when it is not found, 126 when it cannot be executed, 2 when something of ours is
missing (one line on stderr each time).
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from usermm import installation
from usermm.errors import UsermmError
from usermm.programs import inspection, preload, search
from usermm.traces import parse

HELP = "Run a program that finds /dev/ummunotify and /dev/ummunot"

_SHELL: Final = "/bin/sh"


def prepare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of run."""
    parser.usage = "usermm run [-h] [--trace FILE] [--] PROGRAM [ARGS ...]"
    parser.add_argument("--trace", metavar="FILE", help="write every call and notification there; see `usermm trace`")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="PROGRAM", help="the program, and its arguments")


def run(args: argparse.Namespace) -> int:
    """Say what will not work, and become the program."""
    words: list[str] = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not words:
        raise UsermmError("PROGRAM is missing: usermm run [--trace FILE] [--] PROGRAM [ARGS ...]")
    try:
        environment = _own_environment()
        path = search.find(words[0], environment)
        library = str(installation.preload_library())
        image = inspection.resolve(path, environment)
        if image.missing:
            problem = f"{path} needs {image.missing}, which is not there: install that"
            raise search.ProgramError(search.NOT_FOUND, problem)
        trace = None if args.trace is None else _trace_file(args.trace)
        if not inspection.kernel_has_device():
            _warn(list(inspection.obstacles(image, library, environment)))
        if inspection.is_ended_by_preload(image.elf, environment):
            environment = preload.leave_out(environment, library)
        else:
            environment = preload.prepare(environment, library, trace)
        _become(path, words, environment, by_shell=image.elf is None)
    except search.ProgramError as error:
        print(f"usermm run: {' '.join(str(error).split())}", file=sys.stderr)
        return error.status


def _warn(obstacles: Sequence[str]) -> None:
    if obstacles:
        reasons = " ".join("; ".join(obstacles).split())
        print(f"usermm run: {reasons} (it starts now, without the devices)", file=sys.stderr, flush=True)


def _trace_file(name: str) -> str:
    """The absolute path of an empty file that can be written, or of what is no regular file, such as a pipe."""
    path = os.path.abspath(name)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            if os.path.isdir(path) or not os.access(path, os.W_OK, effective_ids=True):
                raise UsermmError(f"--trace {name}: it cannot be written: give another file")
            return path
        with open(path, "a+b") as file:
            file.seek(0)
            if not parse.may_be_replaced(file):
                raise UsermmError(f"--trace {name}: it is no trace and is kept: give another file, or remove it")
            file.truncate(0)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsermmError(f"--trace {name}: {reason}: give a file that can be written") from None
    return path


def _own_environment() -> dict[str, str]:
    """What this process was given: in the C locale the interpreter sets LC_CTYPE for itself (PEP 538)."""
    environment = dict(os.environ)
    try:
        with open("/proc/self/environ", "rb") as file:
            given = [entry for entry in file.read().split(b"\0") if entry.startswith(b"LC_CTYPE=")]
    except OSError:
        return environment
    environment.pop("LC_CTYPE", None)
    if given:
        environment["LC_CTYPE"] = os.fsdecode(given[0].partition(b"=")[2])
    return environment


def _become(path: str, words: list[str], environment: dict[str, str], *, by_shell: bool) -> NoReturn:
    """As execvp(3), which lets the shell run what the kernel does not know, such as a script without a first line."""
    # The interpreter ignores these from its start on, and what is ignored stays so in the program.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    try:
        try:
            os.execve(path, words, environment)
        except OSError as error:
            if error.errno != errno.ENOEXEC or not by_shell:
                raise
            os.execve(_SHELL, [_SHELL, path, *words[1:]], environment)
    except OSError as error:
        raise search.ProgramError(search.NOT_EXECUTABLE, f"{path} cannot be executed: {error.strerror}") from None
