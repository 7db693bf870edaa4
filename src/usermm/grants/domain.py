"""`Domain`: who one is to the others, and the devices."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self, TypeVar

from usermm.errors import ArgumentError, ClosedError, UnavailableError
from usermm.grants import xen
from usermm.grants.allocated import Limit
from usermm.grants.alone import Alone, Rank
from usermm.grants.arguments import domain_number, unsigned
from usermm.grants.evtchn import Evtchn
from usermm.grants.foreign import Foreign
from usermm.grants.gntalloc import Gntalloc
from usermm.grants.gntdev import Gntdev, Personality
from usermm.grants.local_evtchn import LocalEvtchn
from usermm.grants.local_gntalloc import LocalGntalloc
from usermm.grants.local_gntdev import LocalGntdev
from usermm.grants.session import Session, connect
from usermm.grants.store import Store
from usermm.grants.watching import Watching
from usermm.hypercalls import wire
from usermm.hypercalls.addresses import ENVIRONMENT
from usermm.hypercalls.wire import DOMID_ANY, Operation
from usermm.uapi.xen_gntalloc import LIMIT_PAGES

Device = TypeVar("Device", Gntalloc, Gntdev, Evtchn, Store)


class Domain:
    """A connection to the hypervisor. It ends with close(), or with this process, however that ends.

    `domid` and `name`: what others grant to, and find it by; `uid`: its user, as the hypervisor saw it; `incarnation`:
    which start of the hypervisor it is of.

    Any thread may use it. A forked child keeps the pages that its parent allocated, as with the devices of Xen, but
    not the domain: it opens one of its own.
    """

    domid: int
    """What others grant to, and name this domain by."""
    name: str
    uid: int = -1
    """Whose this domain is, as the hypervisor saw it; -1 on a real Xen, which knows guests, not users."""
    incarnation: int = 0
    """Which start of the hypervisor this is: references of another mean nothing. 0 on a real Xen."""

    def __init__(
        self,
        socket: str | os.PathLike[str] | None = None,
        *,
        domid: int | None = None,
        name: str | None = None,
        backend: Literal["auto", "local", "xen"] = "auto",
        limit: int = LIMIT_PAGES,
    ) -> None:
        """Joins the hypervisor at the path `socket`; by default $USERMM_HYPERVISOR, else the first that listens of
        /run/usermm/hypervisor.sock, the system's, and $XDG_RUNTIME_DIR/usermm/hypervisor.sock, this user's own.

        `domid` and `name` are asked for; the policy decides. `backend` "xen" takes the devices of a real Xen, "auto"
        does so where it may open them and no socket is named; there `domid` is what this guest knows of itself
        (`xenstore-read domid`), and `Domain.domid` -1 without it, except in dom0. `limit`: pages of all gntalloc files
        (the driver's parameter), channels not counted.

        Raises HypervisorGoneError (ECONNREFUSED, ENOENT) when none listens; PermissionDeniedError (EACCES) and
        QuotaError (ENOSPC) when the policy says no; GrantError (EBUSY) when somebody has that domid or name;
        UnavailableError for backend "xen" on a machine without.
        """
        if backend not in ("auto", "local", "xen"):
            raise ArgumentError(f"Domain: backend must be 'auto', 'local' or 'xen', not {backend!r}")
        domid = None if domid is None else domain_number(domid, "Domain: domid")
        if name is not None and not (isinstance(name, str) and name.isprintable()):
            raise ArgumentError(f"Domain: name must be printable text, not {name!r:.60}")
        limit = unsigned(limit, 32, "Domain: limit")
        named = socket is not None or ENVIRONMENT in os.environ
        self.backend: Literal["local", "xen"] = (
            "xen" if backend == "xen" or (backend == "auto" and not named and xen.is_usable()) else "local"
        )
        self._limit = Limit(limit)
        self._opened: dict[str, Gntalloc | Gntdev | Evtchn | Store] = {}
        self._session: Session | None = None
        self._alone = Alone(Rank.DOMAIN)
        self._is_closed = False
        if self.backend == "xen":
            xen.require()
            self.domid, self.name = _xen_domid() if domid is None else domid, name or ""
            return
        self._session = connect(socket)
        try:
            self._join(domid, name or "")
        except BaseException:
            self._session.close()
            raise
        self._watching = Watching()
        self._foreign = Foreign(self._session, self._watching, self.domid)

    def _join(self, domid: int | None, name: str) -> None:
        hello = wire.HELLO.pack(wire.VERSION, DOMID_ANY if domid is None else domid, 0) + name.encode()
        answer, _ = self._hypervisor("join").call(Operation.HELLO, hello)
        self.domid, _, self._hypervisor_uid, self.uid, _, self.incarnation = wire.WELCOME.unpack_from(answer)
        self.name = answer[wire.WELCOME.size :].decode()

    @property
    def gntalloc(self) -> Gntalloc:
        """This domain's own gntalloc file, opened when it is first used."""
        return self._own("gntalloc", self.open_gntalloc)

    @property
    def gntdev(self) -> Gntdev:
        """This domain's own gntdev file of the mainline personality."""
        return self._own("gntdev", self.open_gntdev)

    @property
    def evtchn(self) -> Evtchn:
        """This domain's own evtchn file."""
        return self._own("evtchn", self.open_evtchn)

    @property
    def store(self) -> Store:
        """The tree in which domains find each other."""
        return self._own("store", lambda: Store(self._hypervisor("store")))

    def open_gntalloc(self, *, limit: int | None = None) -> Gntalloc:
        """Another gntalloc file. Its pages count on the domain's limit, or on a `limit` of its own; on a real Xen the
        driver's parameter holds. Whatever the limit, the quotas of the hypervisor are the domain's."""
        self._check_open("open_gntalloc")
        if self._session is None:
            return Gntalloc(xen.XenGntalloc("gntalloc"))
        pages = self._limit if limit is None else Limit(unsigned(limit, 32, "open_gntalloc: limit"))
        return Gntalloc(LocalGntalloc(self._session, self._watching, pages))

    def open_gntdev(self, personality: Personality = "mainline") -> Gntdev:
        """Another gntdev file. `personality` "seed2007" has the slots, states and errors of the first driver."""
        if personality not in ("mainline", "seed2007"):
            raise ArgumentError(f"open_gntdev: personality must be 'mainline' or 'seed2007', not {personality!r}")
        self._check_open("open_gntdev")
        is_xen = self._session is None
        if personality == "mainline":
            return Gntdev(xen.XenGntdev("gntdev") if is_xen else LocalGntdev(self._foreign))
        if is_xen:
            text = "the kernel's driver is of today: personality 'seed2007' is there with backend='local' only"
            raise UnavailableError(errno.EOPNOTSUPP, f"open_gntdev: {text}")
        from usermm.grants.gntdev2007 import LocalGntdev2007

        return Gntdev(LocalGntdev2007(self._foreign), personality)

    def open_evtchn(self) -> Evtchn:
        """Another evtchn file; a port belongs to the file that bound it."""
        self._check_open("open_evtchn")
        return Evtchn(xen.XenFile("evtchn") if self._session is None else LocalEvtchn(self._session))

    def is_isolated_from(self, domid: int) -> bool:
        """Whether neither this domain nor that one can reach the other's memory but by grants.

        They are not when they run as the same user, as root, or as the hypervisor's user: such processes can read and
        write each other through /proc and ptrace(2). Raises BadReferenceError (ENOENT): there is no such domain.
        """
        number = unsigned(domid, 16, "is_isolated_from: domid")
        answer, _ = self._hypervisor("is_isolated_from").call(Operation.PEER, wire.PEER.pack(number))
        return bool(wire.PEER_IS.unpack_from(answer)[1])

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._is_closed

    def close(self) -> None:
        """Ends the domain: its grants can no longer be mapped, its ports and its part of the store go.

        What is mapped, here or there, stays until it is unmapped. May be called again, and by a signal handler.
        """
        self._is_closed = True
        if self._session is not None and self._session.is_inherited:  # locks may be held by threads that are not here
            self._close_devices()
            self._session.close()
        else:
            self._alone.finish(self._close, wait=True)

    def _close(self) -> None:
        self._close_devices()
        if self._session is not None and not self._session.closed:
            self._watching.settle()
            self._foreign.close()
            self._session.close()
            self._watching.close()

    def _close_devices(self) -> None:
        for device in list(self._opened.values()):
            if not isinstance(device, Store):
                device.close()
        self._opened.clear()

    def _own(self, name: str, opens: Callable[[], Device]) -> Device:
        device = self._opened.get(name)
        if device is None:
            device = self._alone.run(name, lambda: self._open(name, opens))
        return device  # type: ignore[return-value] # the name decides the class

    def _open(self, name: str, opens: Callable[[], Device]) -> Gntalloc | Gntdev | Evtchn | Store:
        if name not in self._opened:  # another thread may have opened it while this one waited
            self._opened[name] = opens()
        return self._opened[name]

    def _check_open(self, call: str) -> None:
        if self.closed:
            raise ClosedError(errno.EBADF, f"{call}: the domain is closed: open a new one")

    def _hypervisor(self, call: str) -> Session:
        self._check_open(call)
        if self._session is None:
            raise UnavailableError(errno.EOPNOTSUPP, f"{call}: only usermm's own hypervisor has this: backend='local'")
        return self._session

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Domain {self.domid} {self.name!r} ({self.backend}){', closed' if self.closed else ''}>"


def _xen_domid() -> int:
    """This guest's number: xenstore has it, which the guest's tools read; the kernel shows only whether it is 0."""
    try:
        with open("/proc/xen/capabilities", encoding="ascii") as text:
            return 0 if "control_d" in text.read() else -1
    except OSError:
        return -1
