"""`Listener`: accepts channels under one name."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from usermm.channels import rendezvous
from usermm.channels.rings import Geometry
from usermm.errors import ClosedError, DeviceError, grant_refused
from usermm.hypercalls.wire import DOMID_FIRST_RESERVED
from usermm.ummunotify.arguments import deadline_s

if TYPE_CHECKING:
    from usermm.channels.channel import Channel
    from usermm.grants.domain import Domain

_LOOK_S = 1.0  # how long at most until requests of domains that are gone are taken away


class Listener:
    """Waits for others to connect; made by `Channel.listen`. Its directory in the store goes with close()."""

    def __init__(self, domain: Domain, name: str, peer: int | None, geometry: Geometry, kind: Any) -> None:
        self._domain, self.name, self._peer, self._geometry, self._kind = domain, name, peer, geometry, kind
        self._answered: set[str] = set()
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
                channel = self._look()
                if channel is not None:
                    return channel
                left_s = min(_LOOK_S, deadline - time.monotonic())
                if left_s > 0:
                    self._watch.read(left_s)
                    continue
            raise TimeoutError(errno.ETIMEDOUT, f"accept({self.name}): nobody came within {timeout} s")

    async def accept_async(self) -> Channel:
        """As `accept`, under asyncio."""
        loop = asyncio.get_running_loop()
        while True:
            with self._closing_told():
                channel = self._look()
                if channel is not None:
                    return channel
                descriptor = self._watch.fileno()
                ready = asyncio.Event()
                loop.add_reader(descriptor, ready.set)
                try:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(ready.wait(), _LOOK_S)
                finally:
                    loop.remove_reader(descriptor)
                self._watch.read(0)

    def close(self) -> None:
        """Nobody can connect any more; channels stay. May be called again."""
        if not self._watch.closed:
            with contextlib.suppress(DeviceError):
                self._let_answers_be_read()
            self._watch.close()
            with contextlib.suppress(DeviceError):
                self._domain.store.remove(self._path)

    def _let_answers_be_read(self) -> None:
        """A connector removes its node once it has read the answer, which goes with the directory otherwise."""
        until = time.monotonic() + _LOOK_S
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

    def _look(self) -> Channel | None:
        if self._watch.closed:
            raise self._closed()
        store = self._domain.store
        nodes = store.list(self._path)
        self._answered &= set(nodes)
        for node in nodes:
            path = f"{self._path}/{node}"
            made = rendezvous.accept_request(self._domain, path, self._geometry, self._peer)
            if made is not None:
                self._answered.add(node)
                return self._kind(self._domain, made, self.name)  # type: ignore[no-any-return]
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
