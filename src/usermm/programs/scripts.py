"""What a script is run by: the `#!` line as the kernel reads it (execve(2), "Interpreter scripts")."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Final

from usermm.programs import search

HASH_BANG: Final = b"#!"
LINE_BYTES: Final = 256
"""As much of the file as the kernel reads (BINPRM_BUF_SIZE)."""


def interpreter(head: bytes, environment: Mapping[str, str]) -> str:
    """The program that runs a script that begins with `head`; "" when it cannot be told.

    Behind env(1), the usual detour through PATH, stands the program that matters.
    """
    line = head[len(HASH_BANG) : LINE_BYTES].split(b"\n")[0].strip(b" \t").decode(errors="surrogateescape")
    path, _, argument = line.replace("\t", " ").partition(" ")
    if os.path.basename(path) != "env":
        return path
    try:
        return search.find(_behind_env(argument.strip()), environment)
    except search.ProgramError:
        return path


def _behind_env(argument: str) -> str:
    """The program in the one argument that env(1) gets; with -S it holds several words."""
    try:
        words = shlex.split(argument) if argument.startswith(("-S", "--split-string")) else [argument]
    except ValueError:  # an open quote
        return ""
    words = [word.removeprefix("--split-string=").removeprefix("-S") for word in words]
    return next((word for word in words if word and "=" not in word and not word.startswith("-")), "")
