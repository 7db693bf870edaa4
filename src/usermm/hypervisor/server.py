"""The hypervisor's loop: who connects, what each request goes to, and what follows from a domain's end."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import time
from collections.abc import Callable

from usermm.hypercalls import wire
from usermm.hypercalls.wire import DOMID_ANY, Operation
from usermm.hypervisor import status as status_of
from usermm.hypervisor.audit import Audit
from usermm.hypervisor.calls import NotNow, Refused, Reply
from usermm.hypervisor.chores import Chores
from usermm.hypervisor.connections import Connection, refuse_descriptors
from usermm.hypervisor.domains import DomainRecord
from usermm.hypervisor.grants import Grants
from usermm.hypervisor.looks import Looks
from usermm.hypervisor.memfds import PAGE_BYTES
from usermm.hypervisor.policy import Policy
from usermm.hypervisor.ports import Ports
from usermm.hypervisor.reserve import Reserve
from usermm.hypervisor.shares import Shares
from usermm.hypervisor.store.service import Store
from usermm.uapi.xen_evtchn import VIRQ_DOM_EXC

_MOST_STRANGERS = 256  # connected, and not yet a domain
_STRANGER_SECONDS = 10
_ACCEPTS_A_TURN = 16
_PAUSE_SECONDS = 0.1

_NEEDS_DESCRIPTORS = frozenset(
    {
        Operation.ALLOCATE,
        Operation.POOL,
        Operation.PORT_UNBOUND,
        Operation.PORT_INTERDOMAIN,
        Operation.PORT_VIRQ,
        Operation.WATCH,
    }
)

Handler = Callable[[DomainRecord, memoryview], Reply]


class Server:
    """Serves domains on `listener`, a listening SOCK_SEQPACKET socket, until stop()."""

    def __init__(self, listener: socket.socket, *, policy: Policy, audit: Audit, incarnation: int) -> None:
        self.policy = policy
        self.incarnation = incarnation
        self.requests = 0
        self.domains: dict[int, DomainRecord] = {}
        self.audit = audit
        self.ports = Ports(self.domains.get)
        self._chores = Chores(self._soon, self._mistaken)
        self.grants = Grants(
            self.domains,
            self.ports,
            audit,
            incarnation_tag=incarnation & 0xFFF,
            may_grant=self._may_grant,
            chores=self._chores,
        )
        self.listener = listener
        self._connections: dict[int, Connection] = {}
        self._strangers: dict[Connection, asyncio.TimerHandle] = {}
        self._of_uid: dict[int, int] = {}
        self._names: set[str] = set()
        self._buffer = bytearray(wire.LONGEST_REQUEST_BYTES)
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop
        self.started = time.time()

    async def run(self) -> None:
        """Until stop(); then every connection ends, and what domains have mapped stays theirs."""
        self._loop = loop = asyncio.get_running_loop()
        self.store = Store(loop.add_writer, loop.remove_writer, Chores(loop.call_soon, self._mistaken))
        self._handlers = self._table()
        self._shares = Shares(loop)
        self._reserve = Reserve()
        self.listener.setblocking(False)
        refuse_descriptors(self.listener)  # what is accepted inherits it
        loop.add_reader(self.listener.fileno(), self._accept)
        self._looks = Looks(loop, self.grants.holding)
        try:
            await self._stopping.wait()
        finally:
            loop.remove_reader(self.listener.fileno())
            self._looks.close()
            self.ports.close_all()  # before they end, or their peers would see it
            for connection in [*self._connections.values(), *self._strangers]:
                connection.close()
            self._chores.close()  # after the domains' ends, which make some, and before what those would touch
            self.grants.holding.close()
            self.store.close()

    def adopt(self, policy: Policy) -> None:
        """It holds from here on: who has a pool for somebody whom it no longer may grant to grants nothing more."""
        self.policy = policy
        for domain in self.domains.values():
            self.grants.close_pools(domain)

    def stop(self) -> None:
        """Ends run(); from the loop's own thread."""
        self._stopping.set()

    def forget(self) -> None:
        """In a forked child: closes all descriptors, and nothing is said to anybody."""
        for connection in [*self._connections.values(), *self._strangers]:
            connection.forget()
        self.ports.forget()
        self.grants.holding.close()
        self.store.forget()

    def _table(self) -> dict[int, Handler]:
        granting, mapping, ports = self.grants.granting, self.grants.mapping, self.ports
        return {
            Operation.PEER: self._peer,
            Operation.ALLOCATE: granting.allocate,
            Operation.POOL: granting.pool,
            Operation.RELEASE: granting.release,
            Operation.OPEN_OWN: granting.open_own,
            Operation.REVOKE: granting.revoke,
            Operation.GRANTOR_NOTIFY: granting.grantor_notify,
            Operation.MAP: mapping.map,
            Operation.UNMAPPED: mapping.unmapped,
            Operation.GRANTEE_NOTIFY: mapping.grantee_notify,
            Operation.POOL_UNMAPPED: mapping.pool_unmapped,
            Operation.PORT_UNBOUND: ports.bind_unbound,
            Operation.PORT_INTERDOMAIN: ports.bind_interdomain,
            Operation.PORT_VIRQ: ports.bind_virq,
            Operation.PORT_CLOSE: ports.close,
            Operation.PORT_REARM: ports.rearm,
            Operation.STORE: self.store.request,
            Operation.WATCH: self.store.watch,
        }

    def _mistaken(self, error: Exception) -> None:
        self.audit.record("fault", operation="chore", error=repr(error)[:200])

    def _soon(self, call: Callable[[], None]) -> None:
        self._loop.call_soon(call)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                stream, _ = self.listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor, no memory: those who are connected go on
                self._loop.remove_reader(self.listener.fileno())
                self._loop.call_later(_PAUSE_SECONDS, self._accept_again)
                return
            self._welcome_stranger(stream)

    def _accept_again(self) -> None:
        if not self._stopping.is_set():
            self._loop.add_reader(self.listener.fileno(), self._accept)

    def _welcome_stranger(self, stream: socket.socket) -> None:
        if len(self._strangers) >= _MOST_STRANGERS:
            next(iter(self._strangers)).close()  # the one that has been silent for longest
        try:
            connection = Connection(
                stream, self._loop, self._answer, self._gone, self._shares, buffer=self._buffer
            )
        except OSError:
            stream.close()
            return
        self._strangers[connection] = self._loop.call_later(_STRANGER_SECONDS, connection.close)

    def _answer(self, connection: Connection, operation: int, payload: memoryview) -> Reply:
        self.requests += 1
        try:
            if operation == Operation.HELLO:
                return self._hello(connection, payload)
            if operation == Operation.STATUS:
                return self._status(connection)
            if connection.domain is None:
                raise Refused(errno.EPROTO, "the first request of a domain is HELLO")
            handler = self._handlers.get(operation)
            if handler is None:
                raise Refused(errno.ENOSYS, f"operation {operation} is unknown to this hypervisor")
            if operation in _NEEDS_DESCRIPTORS:
                uid = connection.domain.uid
                self._reserve.refuse_hog(uid, lambda: self._descriptors_of(uid))
            return handler(connection.domain, payload)
        except struct.error:
            raise Refused(errno.EINVAL, f"operation {operation}: {len(payload)} bytes are no payload of it") from None
        except OSError as error:
            number = error.errno or errno.EIO
            raise Refused(number, f"operation {operation}: the hypervisor: {os.strerror(number)}") from None
        except (Refused, NotNow):
            raise
        except Exception as error:  # a mistake of ours must not end the others' memory
            self.audit.record("fault", operation=operation, error=repr(error)[:200])
            text = f"operation {operation}: the hypervisor made a mistake: its audit log has it"
            raise Refused(errno.EIO, text) from None

    def _descriptors_of(self, uid: int) -> int:
        domids = [domain.domid for domain in self.domains.values() if domain.uid == uid]
        of_domains = sum(2 + self.ports.descriptors(domid) + self.store.descriptors(domid) for domid in domids)
        return self.grants.holding.descriptors(uid) + of_domains

    def _hello(self, connection: Connection, payload: memoryview) -> Reply:
        version, wanted, _ = wire.HELLO.unpack_from(payload)
        peer = connection.peer
        if connection.domain is not None:
            raise Refused(errno.EISCONN, f"hello: this connection is domain {connection.domain.domid} already")
        if version != wire.VERSION:
            raise Refused(errno.EPROTO, f"hello: version {version} is not {wire.VERSION}: install the same usermm")
        self.store.refuse_while_busy()
        domain = self._admit(peer.uid, peer.gid, peer.pid, wanted, bytes(payload[wire.HELLO.size :]))
        connection.domain = domain
        self._strangers.pop(connection).cancel()
        self._connections[domain.domid] = connection
        self.domains[domain.domid] = domain
        self._names.add(domain.name)
        self._of_uid[domain.uid] = self._of_uid.get(domain.uid, 0) + 1
        self.grants.domain_arrived(domain)
        self.store.domain_arrived(domain)
        self.audit.record("arrive", domid=domain.domid, name=domain.name, uid=domain.uid, pid=domain.pid)
        fields = domain.domid, wire.VERSION, os.geteuid(), domain.uid, PAGE_BYTES, self.incarnation
        return Reply(wire.WELCOME.pack(*fields) + domain.name.encode())

    def _admit(self, uid: int, gid: int, pid: int, wanted: int, name: bytes) -> DomainRecord:
        try:
            admission = self.policy.admit(
                uid,
                gid,
                None if wanted == DOMID_ANY else wanted,
                name.decode() or None,
                self.domains.__contains__,
                self._of_uid.get(uid, 0),
                name_in_use=self._names.__contains__,
            )
        except UnicodeDecodeError:
            raise Refused(errno.EINVAL, "hello: the name is no UTF-8") from None
        except Refused as refused:
            self.audit.record("refuse", call="hello", uid=uid, pid=pid, reason=refused.reason)
            raise
        return DomainRecord(admission.domid, admission.name, uid, gid, pid, admission.control, admission.quotas)

    def _gone(self, connection: Connection) -> None:
        domain = connection.domain
        if domain is None:
            self._strangers.pop(connection).cancel()
            return
        del self._connections[domain.domid]
        del self.domains[domain.domid]
        self._names.discard(domain.name)
        self._of_uid[domain.uid] -= 1
        if not self._of_uid[domain.uid]:
            del self._of_uid[domain.uid]
        self.grants.domain_gone(domain)  # before its ports: it may owe an event
        self.ports.domain_gone(domain)
        self.store.domain_gone(domain)
        self.ports.raise_virq(VIRQ_DOM_EXC)
        self.audit.record("leave", domid=domain.domid, name=domain.name)

    def _peer(self, domain: DomainRecord, payload: memoryview) -> Reply:
        (domid,) = wire.PEER.unpack(payload)
        other = self.domains.get(domid)
        if other is None:
            raise Refused(errno.ENOENT, f"peer(domain {domid}): there is no such domain")
        isolated = self.grants.are_isolated(domain.domid, domid)
        return Reply(wire.PEER_IS.pack(other.uid, isolated) + other.name.encode())

    def _status(self, connection: Connection) -> Reply:
        if not self.policy.may_read_status(connection.peer.uid, connection.peer.gid):
            raise Refused(errno.EACCES, f"status: the policy does not let uid {connection.peer.uid} read it")
        text = status_of.as_json(self)
        descriptor = os.memfd_create("usermm:status", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, text)
        except OSError:
            os.close(descriptor)
            raise
        return Reply(wire.STATUS.pack(len(text)), [descriptor])

    def _may_grant(self, domain: DomainRecord, grantee: int) -> bool:
        return self.policy.may_grant(domain, grantee)
