"""A hypervisor in a process of its own, to be killed, and what such a process has at a moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.commands import TIMEOUT_S, environment
from usermm.grants import session

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

# It ends with the test's process, however that ends.
_PROGRAM = """
import sys
from usermm.hypervisor.embedded import Hypervisor
with Hypervisor(sys.argv[1], policy=sys.argv[2] or None):
    print("listening", flush=True)
    sys.stdin.read()
"""


class HypervisorProcess:
    """`program` is a text that does as the one above and may obey what comes on its standard input."""

    def __init__(self, socket: Path | str, *, policy: Path | str = "", program: str = _PROGRAM) -> None:
        self.socket = str(socket)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, self.socket, str(policy)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        if self.hear() != "listening":
            self.kill()
            raise AssertionError("the hypervisor does not listen")

    @property
    def pid(self) -> int:
        return self.process.pid

    def hear(self) -> str:
        """One line of its output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> str:
        """Says a line, hears one."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.hear()

    def status(self) -> dict[str, Any]:
        return session.status(self.socket)

    def kill(self) -> None:
        """SIGKILL, and what the test's process has of it is closed. May be called again."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(TIMEOUT_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def belongings(self) -> Belongings:
        """What it has now."""
        return Belongings.of(self.pid)

    def __enter__(self) -> HypervisorProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def settled(state: Callable[[], Any]) -> Any:
    """What `state` gives three times in a row: who asked for the status is seen off a little later."""
    seen: list[Any] = []
    while len(seen) < 3 or any(each != seen[-1] for each in seen[-3:]):
        time.sleep(0.003)
        seen.append(state())
    return seen[-1]


@dataclass(frozen=True)
class Belongings:
    """Of a process. `shared_pages` are those that its memfds really have; `locks` are on their inodes, whoever's."""

    descriptors: int
    memfds: int
    shared_pages: int
    locks: int

    @classmethod
    def of(cls, pid: int) -> Belongings:
        folder = f"/proc/{pid}/fd"
        names = os.listdir(folder)
        inodes, pages = set(), 0
        for name in names:
            try:
                where, status = os.readlink(f"{folder}/{name}"), os.stat(f"{folder}/{name}")
            except FileNotFoundError:
                continue
            if where.startswith("/memfd:") and status.st_ino not in inodes:
                inodes.add(status.st_ino)
                pages += status.st_blocks * 512 // PAGE_BYTES
        return cls(len(names), len(inodes), pages, _locks(inodes))


def _locks(inodes: set[int]) -> int:
    with open("/proc/locks", encoding="ascii") as lines:
        found = [line.split() for line in lines]
    return sum(1 for words in found if "OFDLCK" in words and int(words[-3].rpartition(":")[2]) in inodes)


@contextmanager
def socket_folder() -> Iterator[Path]:
    """Short, for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="usermm-", dir="/tmp") as name:
        yield Path(name)


def wait_until(holds: Callable[[], bool], limit_s: float, what: Callable[[], object] = str) -> float:
    """How many seconds passed until it holds; AssertionError with `what` after `limit_s`."""
    start = time.monotonic()
    pause_s = 0.0002
    while not holds():
        assert time.monotonic() - start < limit_s, f"not within {limit_s} s: {what()}"
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.3, 0.01)
    return time.monotonic() - start
