"""Processes of several users that do what a test tells them, a hypervisor of a user of its own, and its raw protocol.

All are forked from the test's process, which is root's: so a test can change the hypervisor's code before it starts,
to see what happens without a protection.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import json
import logging
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from support.messages import receive, send
from support.processes import fork
from support.users import become
from usermm import __main__ as command_line
from usermm.commands import hypervisor  # before the user changes, who may not read all of root's Python
from usermm.grants import gntdev2007, session
from usermm.hypercalls import grants as layouts
from usermm.hypercalls import wire
from usermm.hypercalls.wire import Operation

HYPERVISOR, ALICE, BOB, CAROL = 61001, 61002, 61003, 61004
"""Users. Alice grants to Bob; Carol has nothing to do with it."""
PATIENCE_S = 30
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
DONE = "done"

assert hypervisor and gntdev2007 and codecs.lookup("ascii")  # loaded for the processes that are forked

_KIB = 1024
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def outcome(call: Callable[..., Any], *arguments: Any) -> str:
    """DONE, or the name of the errno with which it failed."""
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except (BufferError, ValueError, TypeError) as error:
        return type(error).__name__
    return DONE


class Actor:
    """A process of the user `uid` that calls functions of modules for the test. What they keep, they keep in KEPT."""

    def __init__(self, uid: int, *, limit_files: int = 0) -> None:
        self.uid = uid
        self._stream, theirs = socket.socketpair()
        self.pid = fork()
        if self.pid == 0:
            self._stream.close()
            _live(theirs, uid, limit_files)
        theirs.close()

    def __call__(self, function: Callable[..., Any], *arguments: Any, patience_s: float = PATIENCE_S) -> Any:
        """What it returns; AssertionError with its traceback, or when it takes too long."""
        self.start(function, *arguments)
        return self.result(patience_s)

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Without waiting for it."""
        send(self._stream, (function, arguments))

    def result(self, patience_s: float = PATIENCE_S) -> Any:
        """Of what was started."""
        ready = select.select([self._stream], [], [], patience_s)[0]
        assert ready, f"user {self.uid}: no answer in {patience_s} s"
        value, failure = receive(self._stream)
        assert failure is None, f"user {self.uid}: {failure}"
        return value

    def end(self, number: int = signal.SIGKILL) -> None:
        """May be called again."""
        if self.pid:
            os.kill(self.pid, number)
            os.waitpid(self.pid, 0)
            self.pid = 0
            self._stream.close()

    def __enter__(self) -> Actor:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


KEPT: dict[str, Any] = {}
"""An actor's own: what later calls need."""


def _live(stream: socket.socket, uid: int, limit_files: int) -> NoReturn:
    keep = stream.fileno()
    os.closerange(3, keep)
    os.closerange(keep + 1, 4096)
    if limit_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit_files, limit_files))
    become(uid)
    os.chdir("/")
    while True:
        try:
            function, arguments = receive(stream)
        except (EOFError, OSError):
            os._exit(0)
        try:
            answer = function(*arguments), None
        except BaseException:
            answer = None, traceback.format_exc()
        try:
            send(stream, answer)
        except OSError:
            os._exit(0)


class World:
    """`usermm hypervisor` as the user `uid`. `without` is called in its process first: it takes a protection away."""

    def __init__(
        self,
        uid: int = HYPERVISOR,
        *,
        policy: str = "",
        limit_files: int = 0,
        without: Callable[[], None] | None = None,
    ) -> None:
        self.uid, self._limit_files, self._without = uid, limit_files, without
        self.folder = Path(tempfile.mkdtemp(prefix="usermm-", dir="/tmp"))
        self.folder.chmod(0o755)
        os.chown(self.folder, uid, uid)
        self.socket = str(self.folder / "s")
        self._words = ["hypervisor", "--socket", self.socket, "--audit", str(self.folder / "audit")]
        if policy:
            (self.folder / "policy").write_text(policy)
            self._words += ["--policy", str(self.folder / "policy")]
        self.pid = 0
        try:
            self.start()
        except BaseException:
            self.end(signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def start(self) -> None:
        """Also after `end`: on the same socket."""
        self.pid = fork()
        if self.pid == 0:
            self._serve()
        until = time.monotonic() + PATIENCE_S
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            while outcome(probe.connect, self.socket) != DONE:
                assert time.monotonic() < until, f"the hypervisor does not listen: {self.said()}"
                time.sleep(0.005)

    def _serve(self) -> NoReturn:
        os.closerange(3, 4096)
        sys.stderr = open(self.folder / "stderr", "a", buffering=1)  # noqa: SIM115 - as long as the process
        logging.root.handlers = [logging.StreamHandler(sys.stderr)]  # not pytest's
        status = 1
        try:
            if self._limit_files:
                resource.setrlimit(resource.RLIMIT_NOFILE, (self._limit_files, self._limit_files))
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # however the test ends
            if self._without is not None:
                self._without()
            status = command_line.main(self._words)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        os._exit(status)

    def said(self) -> str:
        """On its standard error."""
        path = self.folder / "stderr"
        return path.read_text() if path.exists() else ""

    def status(self) -> dict[str, Any]:
        """Root may read it."""
        return session.status(self.socket)

    def audit(self) -> list[dict[str, Any]]:
        """What it wrote, also into the file before this one."""
        found: list[dict[str, Any]] = []
        for name in ("audit.1", "audit"):
            if (self.folder / name).exists():
                found += [json.loads(line) for line in (self.folder / name).read_text().splitlines()]
        return found

    def memory_kib(self) -> int:
        """Its resident memory."""
        with open(f"/proc/{self.pid}/statm", encoding="ascii") as words:
            return int(words.read().split()[1]) * PAGE_BYTES // _KIB

    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def end(self, number: int = signal.SIGTERM) -> None:
        """Stops it; the folder stays. May be called again."""
        if self.pid:
            os.kill(self.pid, number)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def close(self) -> None:
        """It must have made no mistake."""
        try:
            self.end()
            faults = [record for record in self.audit() if record["event"] == "fault"]
            assert not faults, faults
            assert "Traceback" not in self.said(), self.said()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.end(signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)


class Client:
    """The wire without usermm's library, so that it can be told anything."""

    def __init__(self, path: str) -> None:
        self.stream = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.stream.settimeout(PATIENCE_S)
        self.stream.connect(path)
        self.serial = 0
        self.domid = -1

    def hello(self, domid: int = wire.DOMID_ANY, name: bytes = b"") -> int:
        """Becomes a domain; its number."""
        payload = self.ask(Operation.HELLO, wire.HELLO.pack(wire.VERSION, domid, 0) + name)[0]
        self.domid = wire.WELCOME.unpack_from(payload)[0]
        return self.domid

    def send(self, operation: int, payload: bytes = b"", flags: int = 0) -> int:
        """The request's serial."""
        self.serial += 1
        self.stream.send(wire.REQUEST.pack(operation, flags, self.serial) + payload)
        return self.serial

    def receive(self) -> tuple[int, bytes, list[int]]:
        """Status, payload, descriptors. EOFError: the hypervisor ended the connection."""
        data, descriptors, _, _ = socket.recv_fds(self.stream, wire.LONGEST_REPLY_BYTES, wire.MOST_DESCRIPTORS)
        if not data:
            raise EOFError
        return wire.REPLY.unpack_from(data)[0], data[wire.REPLY.size :], descriptors

    def ask(self, operation: int, payload: bytes = b"") -> tuple[bytes, list[int]]:
        """The answer; OSError for what is refused."""
        self.send(operation, payload)
        status, answer, descriptors = self.receive()
        if status:
            raise OSError(-status, answer[wire.REFUSAL.size :].decode())
        return answer, descriptors

    def answer_to(self, operation: int, payload: bytes = b"") -> str:
        """DONE or the errno's name; descriptors that come are closed."""
        try:
            _, descriptors = self.ask(operation, payload)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
        close_all(descriptors)
        return DONE

    def allocate(self, grantee: int, count: int = 1, *, writable: bool = False) -> tuple[int, int]:
        """The first reference, and a descriptor to the pages."""
        flags = layouts.ALLOCATE_WANT_DESCRIPTOR | (layouts.ALLOCATE_WRITABLE if writable else 0)
        answer, descriptors = self.ask(Operation.ALLOCATE, layouts.ALLOCATE.pack(grantee, flags, count))
        return layouts.ALLOCATED.unpack(answer)[0], descriptors[0]

    def map(self, domid: int, reference: int, count: int = 1, *, writable: bool = False) -> tuple[int, int]:
        """The handle, and a descriptor to the pages."""
        answer, descriptors = self.ask(Operation.MAP, map_payload([(domid, reference, count)], writable=writable))
        return layouts.SEGMENT.unpack_from(answer, layouts.MAPPED.size)[0], descriptors[0]

    def close(self) -> None:
        """The domain ends."""
        self.stream.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def map_payload(runs: Sequence[tuple[int, int, int]], *, writable: bool = False) -> bytes:
    """Of MAP."""
    flags = layouts.MAP_WRITABLE if writable else 0
    return layouts.MAP.pack(flags, 0, len(runs)) + b"".join(layouts.RUN.pack(*run) for run in runs)


def close_all(descriptors: Sequence[int]) -> None:
    """All of them."""
    for descriptor in descriptors:
        os.close(descriptor)


def hand_over(name: str, descriptor: int) -> None:
    """To whoever waits for it in `handed_over`, of whatever user."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stream:
        stream.connect(f"\0usermm-{name}")
        socket.send_fds(stream, [b"."], [descriptor])


@contextlib.contextmanager
def handed_over(name: str) -> Iterator[Callable[[], int]]:
    """A call that waits for the descriptor and returns it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stream:
        stream.bind(f"\0usermm-{name}")
        stream.settimeout(PATIENCE_S)
        yield lambda: socket.recv_fds(stream, 1, 1)[1][0]
