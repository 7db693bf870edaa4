"""Watches: for each a pair of sockets, whose one end the domain reads and whose other end events are pushed into.

Nothing here waits, and nothing grows because somebody does not read: what the socket does not take is kept as a set of
paths, and when that is full the watch ends.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from collections.abc import Callable

from usermm.hypercalls import store as layout
from usermm.hypervisor.calls import Refused
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.store import paths

_SEND_BUFFER_BYTES = 16 * 1024

MayHear = Callable[[DomainRecord], bool]


class Watch:
    """`shown_from` is how much of an event's path is not shown: a watch on a relative path hears relative paths."""

    __slots__ = ("domain", "path", "shown_from", "stream", "token", "waiting")

    def __init__(self, domain: DomainRecord, path: str, token: bytes, shown_from: int, stream: socket.socket) -> None:
        self.domain = domain
        self.path = path
        self.token = token
        self.shown_from = shown_from
        self.stream = stream
        self.waiting: dict[str, None] = {}

    def send(self, path: str) -> bool:
        """False: there is no room. Raises OSError when nobody has the other end any more."""
        packet = path[self.shown_from :].encode() + b"\0" + self.token + b"\0"
        try:
            self.stream.send(packet, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        return True


class Watches:
    """All of them. `when_writable` calls back until `forget` is called with the same descriptor."""

    def __init__(
        self, when_writable: Callable[[int, Callable[[], None]], object], forget: Callable[[int], object]
    ) -> None:
        self._when_writable = when_writable
        self._forget = forget
        self._by_path: dict[str, dict[Watch, None]] = {}
        self._by_domain: dict[int, dict[tuple[str, bytes], Watch]] = {}

    def add(self, domain: DomainRecord, path: str, token: bytes, shown_from: int) -> int:
        """The domain's end, with one event in it already. Refused: EEXIST, EDQUOT, and errors of socketpair(2)."""
        own = self._by_domain.get(domain.domid, {})
        most = domain.quotas.quota_maxwatch
        if (path, token) in own or len(own) >= most:
            self._drop_abandoned(domain.domid)
        if (path, token) in own:
            raise Refused(errno.EEXIST, f"watch({paths.shown(path.encode())}): it is watched with this token already")
        if len(own) >= most:
            raise Refused(errno.EDQUOT, f"watch: domain {domain.domid} has {most} watches: close one")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        theirs.shutdown(socket.SHUT_WR)  # what a domain sent would lie in our memory
        watch = Watch(domain, path, token, shown_from, ours)
        self._by_path.setdefault(path, {})[watch] = None
        self._by_domain.setdefault(domain.domid, {})[path, token] = watch
        self._push(watch, path)
        return theirs.detach()

    def remove(self, domid: int, path: str, token: bytes) -> None:
        """Refused: ENOENT."""
        watch = self._by_domain.get(domid, {}).get((path, token))
        if watch is None:
            raise Refused(errno.ENOENT, f"unwatch({paths.shown(path.encode())}): it is not watched with this token")
        self._end(watch)

    def fire(self, path: str, may_hear: MayHear, *, exact: bool) -> None:
        """Tells those who watch `path`, and unless `exact` also those who watch a directory above."""
        watched, answers = path, dict[int, bool]()  # a domain may have many watches
        while True:
            for watch in tuple(self._by_path.get(watched, ())):
                domid = watch.domain.domid
                if domid not in answers:
                    answers[domid] = may_hear(watch.domain)
                if answers[domid]:
                    self._push(watch, path)
            if exact or watched == paths.ROOT:
                return
            watched = paths.parent(watched)

    def domain_gone(self, domid: int) -> None:
        """Its watches end."""
        for watch in tuple(self._by_domain.get(domid, {}).values()):
            self._end(watch)

    def count(self, domid: int) -> int:
        """How many a domain has."""
        return len(self._by_domain.get(domid, ()))

    def close(self) -> None:
        """All end."""
        for domid in tuple(self._by_domain):
            self.domain_gone(domid)

    def forget(self) -> None:
        """In a forked child: closes its descriptors."""
        for own in self._by_domain.values():
            for watch in own.values():
                watch.stream.close()

    def _push(self, watch: Watch, path: str) -> None:
        if not watch.waiting:
            try:
                if watch.send(path):
                    return
            except OSError:
                self._end(watch)
                return
            self._when_writable(watch.stream.fileno(), lambda: self._drain(watch))
        watch.waiting[path] = None
        if len(watch.waiting) > layout.MOST_WAITING_PATHS:
            self._end(watch)

    def _drain(self, watch: Watch) -> None:
        try:
            while watch.waiting:
                path = next(iter(watch.waiting))
                if not watch.send(path):
                    return
                del watch.waiting[path]
        except OSError:
            self._end(watch)
            return
        self._forget(watch.stream.fileno())

    def _end(self, watch: Watch) -> None:
        if watch.waiting:
            self._forget(watch.stream.fileno())
        with contextlib.suppress(OSError):
            watch.stream.shutdown(socket.SHUT_RDWR)  # a child that the embedding process forked may have a copy
        watch.stream.close()
        at_path = self._by_path[watch.path]
        del at_path[watch]
        if not at_path:
            del self._by_path[watch.path]
        own = self._by_domain[watch.domain.domid]
        del own[watch.path, watch.token]
        if not own:
            del self._by_domain[watch.domain.domid]

    def _drop_abandoned(self, domid: int) -> None:
        """Ends the domain's watches whose other end is closed: nothing tells of that but a look."""
        own = {watch.stream.fileno(): watch for watch in self._by_domain.get(domid, {}).values()}
        poll = select.poll()
        for descriptor in own:
            poll.register(descriptor, 0)
        for descriptor, _ in poll.poll(0):
            self._end(own[descriptor])
