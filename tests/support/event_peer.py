"""A domain in a process of its own, which does what it is told, line by line, until it is killed."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from typing import Any

from support.commands import TIMEOUT_S, environment

_PROGRAM = """
import os, signal, socket, sys, time
import usermm
domain = usermm.Domain(sys.argv[1], domid=int(sys.argv[2]) if sys.argv[2] else None)
events = domain.evtchn
print(domain.domid, flush=True)
for line in sys.stdin:
    try:
        answer = eval(line)
    except OSError as error:
        answer = type(error).__name__, error.errno
    print(repr(answer), flush=True)
"""


class Peer:
    """`domid` is its own. A line is a Python expression in which `domain` and `events` (its Evtchn) are known."""

    def __init__(self, socket: str, domid: int | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, socket, "" if domid is None else str(domid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        self.domid: int = self._answer()

    def __call__(self, line: str) -> Any:
        """The expression's value, which is a literal; (class, errno) of an OSError."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return ast.literal_eval(self._process.stdout.readline())

    def kill(self) -> None:
        """SIGKILL. May be called again."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(TIMEOUT_S)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
