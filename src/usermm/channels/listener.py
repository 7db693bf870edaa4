"""`Listener`: accepts channels under one name."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from usermm.channels import rendezvous
from usermm.channels.rings import Geometry
from usermm.errors import ClosedError, DeviceError, LimitError, grant_refused
from usermm.hypercalls.wire import DOMID_FIRST_RESERVED
from usermm.ummunotify.arguments import deadline_s
from usermm.ummunotify.readiness import readable

if TYPE_CHECKING:
    from usermm.channels.channel import Channel
    from usermm.grants.domain import Domain

_LAST_WORDS_S = 1.0
_LEAST_S = 0.02
"""How long accept() looks at requests in any case, and accept_async() before it lets others go on."""


class Listener:
    """Waits for others to connect; made by `Channel.listen`. Its directory in the store goes with close()."""

    def __init__(self, domain: Domain, name: str, peer: int | None, geometry: Geometry, kind: Any) -> None:
        self._domain, self.name, self._peer, self._geometry, self._kind = domain, name, peer, geometry, kind
        self._answered: set[str] = set()
        self._declined = ""
        """Why the last request was refused, until accept() has said so."""
        self._unsorted: dict[str, None] = {}
        """Nodes that are new, or have changed."""
        self._requests: dict[int, dict[str, None]] = {}
        """Those that are still to be looked at, by their owners, who have their turns one after the other."""
        self._path = rendezvous.directory_of(domain.domid, name)
        if domain.store.exists(self._path):
            raise grant_refused(errno.EEXIST, f"listen({name}): this domain listens for it already: close that one")
        others = ((domain.domid, "b"),) if peer is None else ((domain.domid, "n"), (peer, "b"))
        with domain.store.transaction() as together:
            together.mkdir(self._path)
            together.set_permissions(self._path, *others)
        self._watch = domain.store.watch(self._path)

    def accept(self, timeout: float | None = None) -> Channel:
        """The next channel. Requests that cannot be met are refused, and waiting goes on. Raises TimeoutError."""
        deadline = deadline_s(timeout)
        while True:
            with self._closing_told():
                channel = self._look(max(deadline, time.monotonic() + _LEAST_S))
                if channel is not None:
                    return channel
                left_s = deadline - time.monotonic()
                if left_s > 0:
                    self._hear(left_s)
                    continue
            why = f"; a request was refused: {self._declined}" if self._declined else ""
            self._declined = ""
            raise TimeoutError(errno.ETIMEDOUT, f"accept({self.name}): nobody came within {timeout} s{why}")

    async def accept_async(self) -> Channel:
        """As `accept`, under asyncio."""
        while True:
            with self._closing_told():
                channel = self._look(time.monotonic() + _LEAST_S)
                if channel is not None:
                    return channel
                if self._requests or self._unsorted:
                    await asyncio.sleep(0)
                    continue
                descriptor = os.dup(self._watch.fileno())  # of one's own: other tasks may wait, and close() may come
                try:
                    await readable(descriptor)
                finally:
                    os.close(descriptor)

    def close(self) -> None:
        """Nobody can connect any more; channels stay. May be called again."""
        if not self._watch.closed:
            with contextlib.suppress(DeviceError):
                self._let_answers_be_read()
            self._watch.close()
            with contextlib.suppress(DeviceError):  # the domain is closed, and its directory went with it
                self._domain.store.let_go(self._path)

    def _let_answers_be_read(self) -> None:
        """A connector removes its node once it has read the answer, which goes with the directory otherwise."""
        until = time.monotonic() + _LAST_WORDS_S
        while self._answered & set(self._domain.store.list(self._path)):
            left_s = until - time.monotonic()
            if left_s <= 0:
                return
            self._watch.read(left_s)

    @contextlib.contextmanager
    def _closing_told(self) -> Iterator[None]:
        """What fails because another thread, or task, closes the listener meanwhile."""
        try:
            yield
        except DeviceError:
            if not self._watch.closed:
                raise
            raise self._closed() from None

    def _closed(self) -> ClosedError:
        return ClosedError(errno.EBADF, f"accept({self.name}): the listener is closed: listen again")

    def _hear(self, timeout: float) -> None:
        """Which nodes changed since; waits for some."""
        try:
            changed = self._watch.read(timeout)
        except LimitError:  # more than a watch remembers
            changed = [self._path]
            ended, self._watch = self._watch, self._domain.store.watch(self._path)
            if ended.closed:  # by close(), in another thread
                self._watch.close()
        if self._path in changed:
            changed = [f"{self._path}/{node}" for node in self._domain.store.list(self._path)]
        for path in changed:
            node = path.removeprefix(f"{self._path}/")
            if "/" not in node:  # what is below a request is no part of it
                self._unsorted[node] = None

    def _look(self, until: float) -> Channel | None:
        """At requests, one of each owner in turn: somebody who makes many that cannot be met holds up himself."""
        if self._watch.closed:
            raise self._closed()
        self._hear(0)
        while self._unsorted or self._requests:
            if self._unsorted:
                self._sort()
            made = self._answer_next()
            if made is not None:
                return self._kind(self._domain, made, self.name)  # type: ignore[no-any-return]
            if time.monotonic() > until:
                break
        return None

    def _sort(self) -> None:
        node = next(iter(self._unsorted))
        del self._unsorted[node]
        asker = rendezvous.asker_of(self._domain, f"{self._path}/{node}")
        if asker is None:
            self._answered.discard(node)
        elif node not in self._answered:
            self._requests.setdefault(asker, {})[node] = None

    def _answer_next(self) -> rendezvous.Met | None:
        if not self._requests:
            return None
        asker, nodes = next(iter(self._requests.items()))
        del self._requests[asker]
        node = next(iter(nodes))
        del nodes[node]
        if nodes:
            self._requests[asker] = nodes
        return self._answer(node)

    def _answer(self, node: str) -> rendezvous.Met | None:
        store, path = self._domain.store, f"{self._path}/{node}"
        try:
            made = rendezvous.accept_request(self._domain, path, self._geometry, self._peer)
        except rendezvous.Declined as declined:
            self._declined = str(declined)
            return None
        if made is not None:
            self._answered.add(node)
            return made
        domid, _, _ = node.partition("-")
        is_number = domid.isdecimal() and len(domid) <= 5 and int(domid) < DOMID_FIRST_RESERVED
        if not is_number or not store.is_introduced(int(domid)):
            with contextlib.suppress(DeviceError):
                store.remove(path)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
