"""usermm's own hypervisor in this process, its domains here too or in processes of their own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar, Protocol

from conformance import grants_agent
from conformance.grants_agent import Agent
from conformance.grants_world import Device, DomainDriver, FileDriver, Personality, World, listed
from support.messages import receive, send
from support.processes import SOURCE, TESTS
from support.users import NOBODY, public_python

from usermm.hypervisor.embedded import Hypervisor

_USERS = (NOBODY, NOBODY - 1)
_PATIENCE_S = 20.0


class AgentDriver(Protocol):
    """An agent, wherever it is."""

    domid: int

    def call(self, name: str, *arguments: object) -> Any: ...

    def crash(self) -> None: ...


def result(answered: tuple[int, Any]) -> Any:
    """What an agent's answer says; its OSError."""
    number, answer = answered
    if number < 0:
        raise AssertionError(answer)
    if number:
        raise OSError(number, answer)
    return answer


class Here:
    """The agent is an object of this process."""

    def __init__(self, path: str, domid: int | None, backend: str) -> None:
        self._agent = Agent(path, domid, backend)
        self.domid = self._agent.domid

    def call(self, name: str, *arguments: object) -> Any:
        return getattr(self._agent, name)(*arguments)

    def crash(self) -> None:
        self._agent.end()


class _There:
    """The agent is a program, run as `uid` if that is not None."""

    def __init__(self, path: str, domid: int | None, uid: int | None) -> None:
        self._lock = threading.Lock()
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(_PATIENCE_S)
        environment = {**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{TESTS}"}
        python = sys.executable if uid is None else public_python()
        command = [python, str(Path(grants_agent.__file__)), str(theirs.fileno())]
        identity: dict[str, Any] = {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, cwd="/", **identity
            )
        try:
            self.domid = int(self.call("start", path, domid, "local"))
        except BaseException:
            self.crash()
            raise

    def call(self, name: str, *arguments: object) -> Any:
        with self._lock:
            send(self._channel, (name, *arguments))
            return result(receive(self._channel))

    def crash(self) -> None:
        self._process.kill()
        self._process.wait()
        self._channel.close()


class _File(FileDriver):
    def __init__(self, agent: AgentDriver, number: int) -> None:
        self._agent = agent
        self.number = number

    def ioctl(self, request: int, argument: bytearray) -> int:
        result, argument[:] = self._agent.call("ioctl", self.number, request, bytes(argument))
        return int(result)

    def mmap(self, length: int, prot: int, flags: int, offset: int) -> int:
        return int(self._agent.call("mmap", self.number, length, prot, flags, offset))

    def munmap(self, address: int) -> None:
        self._agent.call("munmap", address)

    def close(self) -> None:
        self._agent.call("close_file", self.number)

    def read(self, size: int) -> bytes:
        return bytes(self._agent.call("read", self.number, size))

    def write(self, data: bytes) -> int:
        return int(self._agent.call("write", self.number, data))

    def readable(self, timeout_s: float = 0) -> bool:
        return bool(self._agent.call("readable", self.number, timeout_s))


class Domain(DomainDriver):
    def __init__(self, agent: AgentDriver) -> None:
        self._agent = agent
        self.domid = agent.domid

    def open(self, device: Device, personality: Personality = "mainline") -> _File:
        return _File(self._agent, int(self._agent.call("open", device, personality)))

    def place(self, data: bytes, *, at_end: bool = False) -> int:
        return int(self._agent.call("place", data, at_end))

    def peek(self, address: int, length: int = 1) -> bytes:
        return bytes(self._agent.call("peek", address, length))

    def poke(self, address: int, data: bytes) -> None:
        self._agent.call("poke", address, data)

    def peek_in_child(self, address: int, length: int = 1) -> bytes:
        return bytes(self._agent.call("peek_in_child", address, length))

    def ioctl_in_child(self, file: FileDriver, request: int, argument: bytearray) -> bytes:
        assert isinstance(file, _File)
        return bytes(self._agent.call("ioctl_in_child", file.number, request, bytes(argument)))

    def revoke(self, file: FileDriver, reference: int) -> None:
        assert isinstance(file, _File)
        self._agent.call("revoke", file.number, reference)

    def settle(self) -> None:
        self._agent.call("settle")

    def has_ended(self, domid: int) -> bool:
        return bool(self._agent.call("has_ended", domid))

    def crash(self) -> None:
        self._agent.crash()


class _LocalWorld(World):
    """An embedded hypervisor."""

    unused_domid = 0x7FEF

    def __init__(self) -> None:
        self._ends = contextlib.ExitStack()
        self._hypervisor = self._ends.enter_context(Hypervisor())

    def make_domain(self, *, control: bool = False) -> DomainDriver:
        agent = self._agent(self._hypervisor.socket, 0 if control else None)
        self._ends.callback(agent.crash)
        return Domain(agent)

    def _agent(self, path: str, domid: int | None) -> AgentDriver:
        raise NotImplementedError

    def close(self) -> None:
        self._ends.close()


@listed
class LocalInProcess(_LocalWorld):
    name: ClassVar = "local-in-process"

    def _agent(self, path: str, domid: int | None) -> Here:
        return Here(path, domid, "local")


@listed
class LocalProcesses(_LocalWorld):
    """Each domain in a process of its own, of another user than the one before it where we may become others."""

    name: ClassVar = "local-processes"

    def __init__(self) -> None:
        super().__init__()
        self._made = 0

    def _agent(self, path: str, domid: int | None) -> _There:
        uid = None
        if os.geteuid() == 0 and domid != 0:  # domain 0 is the hypervisor's own user's
            uid = _USERS[self._made % len(_USERS)]
            self._made += 1
        return _There(path, domid, uid)
