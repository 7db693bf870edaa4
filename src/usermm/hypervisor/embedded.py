"""`Hypervisor`: one inside this process, for tests and for programs that are all there is."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import shutil
import tempfile
import threading
from types import TracebackType
from typing import Self

from usermm.hypervisor import turns
from usermm.hypervisor.audit import Audit
from usermm.hypervisor.incarnation import Incarnation
from usermm.hypervisor.listener import Listener, make_directory
from usermm.hypervisor.policy import Policy
from usermm.hypervisor.server import Server
from usermm.hypervisor.turns import Turns

_TRAVERSABLE = 0o711  # other users' domains may connect too; what is in there they cannot list


class Hypervisor:
    """Serves domains of this and of other processes from a thread, until close() or the end of this process.

    `socket`, also an attribute, is the path where it listens, by default one in a directory of its own, which goes with
    it unless a signal ends the process. `policy` is a `Policy`, or the path of a policy file. Domains of other users
    are isolated from each other, but a domain of this user is not isolated from anything (Domain.is_isolated_from):
    `usermm hypervisor` runs one as a user of its own. A forked child has none of it: there, close() does nothing.

    Raises UsermmError when another one listens there, PolicyError for a policy that cannot be read.
    """

    def __init__(
        self, socket: str | None = None, *, policy: Policy | str | None = None, audit: str | None = None
    ) -> None:
        rules = policy if isinstance(policy, Policy) else Policy.load(policy) if policy else Policy.default()
        self._directory = None
        if socket is None:
            self._directory = tempfile.mkdtemp(prefix="usermm-")
            os.chmod(self._directory, _TRAVERSABLE)
            socket = os.path.join(self._directory, "hypervisor.sock")
        try:
            self._start(socket, rules, audit)
        except BaseException:
            self._remove_directory()
            raise

    def _start(self, socket: str, policy: Policy, audit: str | None) -> None:
        self.socket = os.path.abspath(socket)
        """Where domains connect: `Domain(hypervisor.socket)`."""
        make_directory(self.socket)
        with contextlib.ExitStack() as undo:
            self._claim = Incarnation(self.socket)
            undo.callback(self._claim.close)
            self._listener = Listener(self.socket, locked=self._claim.locked)
            undo.callback(self._listener.close)
            self._audit = Audit(audit)
            undo.pop_all()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: Server | None = None
        self._policy = policy
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="usermm hypervisor", daemon=True)
        self._thread.start()
        started.wait()
        turns.add(self)
        atexit.register(self.close)  # else its directory would stay

    def _run(self, started: threading.Event) -> None:
        self.turns = Turns()
        with asyncio.Runner(loop_factory=self.turns.loop) as runner:
            runner.run(self._serve(started))

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = Server(
            self._listener.socket, policy=self._policy, audit=self._audit, incarnation=self._claim.tag
        )
        started.set()
        await self._server.run()

    def close(self) -> None:
        """Ends it: domains get HypervisorGoneError, what they have mapped stays theirs. May be called again."""
        loop, server, self._server = self._loop, self._server, None
        if loop is None or server is None:
            return
        turns.remove(self)
        atexit.unregister(self.close)
        loop.call_soon_threadsafe(server.stop)
        self._thread.join()
        self._listener.close()
        self._audit.close()
        self._claim.close()
        self._remove_directory()

    def forget(self) -> None:
        """In a forked child: it is the parent's."""
        server, self._server = self._server, None
        if server is not None:
            server.forget()
            self.turns.forget()
            self._listener.socket.close()
            self._claim.forget()

    def _remove_directory(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
