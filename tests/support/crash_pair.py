"""Two processes that share memory in every way there is, until one of them is killed; and two whom nothing may disturb.

Each is a forked child. A survivor says on its pipe what it was told of the other's death, as JSON.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import time
import traceback
from collections.abc import Callable
from typing import Any

from support.processes import fork
from usermm.errors import GrantError, HypervisorGoneError
from usermm.grants.domain import Domain
from usermm.grants.gntdev import Copy

GRANTOR, GRANTEE = 100, 101
LIMIT_S = 1.0
_LOOKS = 50
_MEET_S = 5.0
_MARK = 0x55
_RACES = (errno.EINVAL, errno.ENOENT, errno.ESRCH, errno.EAGAIN, errno.EFAULT, errno.EACCES, errno.EEXIST)


class Gone(Exception):  # noqa: N818 - what is expected
    """The other domain is not there any more."""


class Side:
    """What both do: meet, share the page of the last will, then everything, at random, for ever."""

    def __init__(self, socket: str, seed: int, own: int, other: int, say: Callable[[str], None]) -> None:
        self.random = random.Random(seed)
        self.other = other
        self.say = say
        self.before = len(os.listdir("/proc/self/fd"))
        self.domain = Domain(socket, domid=own)
        self.store = self.domain.store
        self.release = self.store.watch("@releaseDomain")
        self.release.read(LIMIT_S)
        self.armed = self.seen_event = False
        self.port = 0
        self.will: Any = None
        self.shared: list[Any] = []
        self.left_open: Any = None

    def run(self) -> None:
        try:
            self.meet()
            self.share_last_will()
            self.armed = True
            self.say("armed")
            while True:
                self.step()
        except Gone:
            self.say(json.dumps(self.verdict()))

    def path(self, name: str, domid: int) -> str:
        return f"/local/domain/{domid}/{name}"

    def publish(self, name: str, value: str) -> None:
        """In our home, for the other to read."""
        with self.unless_gone():
            self.store.write(name, value)
            self.store.set_permissions(name, (self.domain.domid, "n"), (self.other, "b"))

    def learn(self, name: str) -> str:
        """Waits for what the other publishes."""
        end = time.monotonic() + _MEET_S
        while time.monotonic() < end:
            with contextlib.suppress(GrantError):
                return self.store.read(self.path(name, self.other)).decode()
            if self.release.read(0.0005):
                self.check_other()
        raise Gone

    def meet(self) -> None:
        end = time.monotonic() + _MEET_S
        while not self.store.is_introduced(self.other):
            if time.monotonic() > end:
                raise Gone
            time.sleep(0.0005)

    def check_other(self) -> None:
        if not self.store.is_introduced(self.other):
            raise Gone

    @contextlib.contextmanager
    def unless_gone(self) -> Any:
        """What the other's death, or its next step, makes of a call is no failure; what else it can be, is."""
        try:
            yield
        except HypervisorGoneError:
            raise
        except OSError as error:
            self.check_other()
            if error.errno not in _RACES:
                raise

    def step(self) -> None:
        with self.unless_gone():
            self.random.choice(self.steps())()
        if self.release.read(0):
            self.check_other()

    def transaction(self) -> None:
        """Of both, on the same node."""
        counter = self.path("counter", GRANTOR)

        def add(view: Any) -> None:
            view.write(counter, str(int(view.read(counter)) + 1))

        if self.random.random() < 0.3:
            self.left_open = self.store.transaction()
            self.left_open.write("left", b"open")
        self.store.atomically(add, tries=20)

    def watch(self) -> None:
        with self.store.watch(self.path("refs", GRANTOR), str(self.random.random())) as watch:
            self.store.write("noise", str(self.random.random()))
            watch.read(0.0005)

    def more_ports(self) -> None:
        evtchn = self.domain.evtchn
        port = evtchn.bind_unbound_port(self.other)
        self.publish("port", str(port))
        with contextlib.suppress(GrantError):
            far = int(self.store.read(self.path("port", self.other)))
            bound = evtchn.bind_interdomain(self.other, far)
            evtchn.notify(bound)
            evtchn.unbind(bound)
        evtchn.unbind(port)

    def events(self) -> None:
        self.domain.evtchn.notify(self.port)
        if self.port in self.domain.evtchn.read(0):
            self.seen_event = True  # the last one, if the other is gone
            self.check_other()
            self.seen_event = False
            self.domain.evtchn.unmask(self.port)

    def steps(self) -> list[Callable[[], None]]:
        raise NotImplementedError

    def share_last_will(self) -> None:
        raise NotImplementedError

    def told(self) -> dict[str, bool]:
        raise NotImplementedError

    def verdict(self) -> dict[str, Any]:
        """What came within a second, how long it took, and whether this process is as it was before."""
        start = time.monotonic()
        told: dict[str, bool] = {}
        looks = 0
        while self.armed:
            told = self.told()
            looks += 1
            if all(told.values()) or (time.monotonic() - start > LIMIT_S and looks > _LOOKS):
                break
            time.sleep(0.0005)
        return {"armed": self.armed, "told": told, "waited_s": time.monotonic() - start, **self.let_go()}

    def let_go(self) -> dict[str, Any]:
        self.release.close()
        for memory in (*self.shared, self.will):
            if memory is not None:
                memory.close()
        self.left_open = None
        self.domain.close()
        return {"leaked": len(os.listdir("/proc/self/fd")) - self.before}


class Grantor(Side):
    """Its last will: the page's byte 1 is cleared, and an event is sent, when the page is no longer granted."""

    def share_last_will(self) -> None:
        self.publish("counter", "0")
        self.will = self.domain.gntalloc.allocate(self.other, writable=True)
        self.will.write(0, bytes([_MARK] * 8))
        self.port = self.domain.evtchn.bind_unbound_port(self.other)
        self.domain.gntalloc.set_unmap_notify(self.will.index + 1, clear_byte=True, port=self.port)
        self.publish("will", f"{self.will.references[0]} {self.port}")
        self.learn("ready")
        self.domain.evtchn.read(0)
        self.domain.evtchn.unmask(self.port)

    def told(self) -> dict[str, bool]:
        """The grantee's will was byte 0, and its end of the port."""
        port = self.port in self.domain.evtchn.pending()
        return {"cleared": self.will.read(0, 2) == bytes([0, _MARK]), "event": port or self.seen_event}

    def steps(self) -> list[Callable[[], None]]:
        return [self.allocate, self.allocate, self.revoke, self.free, self.transaction, self.watch, self.more_ports,
                self.events]  # fmt: skip

    def allocate(self) -> None:
        pages = self.domain.gntalloc.allocate(
            self.other, self.random.choice((1, 1, 2, 16, 200)), writable=self.random.random() < 0.5
        )
        pages.write(0, b"data")
        if self.random.random() < 0.3:
            self.domain.gntalloc.set_unmap_notify(pages.index, clear_byte=True, port=self.port)
        self.shared.append(pages)
        if len(self.shared) > 3:
            self.free()
        first, count = pages.references[0], len(pages.references)
        self.publish("refs", f"{first} {count} {int(pages.grantee_writes)}")

    def revoke(self) -> None:
        if self.shared:
            pages = self.random.choice(self.shared)
            if self.random.random() < 0.5:
                pages.revoke()
            else:
                self.domain.gntalloc.revoke(self.random.choice(list(pages.references)))

    def free(self) -> None:
        if self.shared:
            self.shared.pop(self.random.randrange(len(self.shared))).close()


class Grantee(Side):
    """Its last will: byte 0 of the page that it maps is cleared, and an event is sent, when it no longer does."""

    def share_last_will(self) -> None:
        reference, port = map(int, self.learn("will").split())
        try:
            with self.unless_gone():
                self.port = self.domain.evtchn.bind_interdomain(self.other, port)
                self.will = self.domain.gntdev.map(self.other, reference, writable=True)
                self.domain.gntdev.set_unmap_notify(self.will.index, clear_byte=True, port=self.port)
                self.publish("ready", "1")
        finally:
            self.check_other()

    def told(self) -> dict[str, bool]:
        """The grantor's will was byte 1, and its end of the port."""
        port = self.port in self.domain.evtchn.pending()
        return {"cleared": self.will.read(0, 2) == bytes([_MARK, 0]), "event": port or self.seen_event}

    def steps(self) -> list[Callable[[], None]]:
        return [self.map, self.map, self.copy, self.unmap, self.transaction, self.watch, self.more_ports, self.events]

    def published(self) -> tuple[list[int], bool]:
        first, count, writable = map(int, self.store.read(self.path("refs", self.other)).split())
        return list(range(first, first + count)), bool(writable)

    def map(self) -> None:
        references, writable = self.published()
        mapping = self.domain.gntdev.map(self.other, references, writable=writable)
        self.shared.append(mapping)
        if writable:
            self.domain.gntdev.set_unmap_notify(mapping.index + 7, clear_byte=True, port=self.port)
        assert mapping.read(0, 4) in (b"data", b"new!", b"\0ata", b"\0ew!", bytes(4))
        if writable:
            mapping.write(0, b"new!")
        if len(self.shared) > 4:
            self.unmap()

    def unmap(self) -> None:
        if self.shared:
            self.shared.pop(self.random.randrange(len(self.shared))).close()

    def copy(self) -> None:
        references, _ = self.published()
        target = bytearray(4)
        self.domain.gntdev.copy([Copy((self.other, references[-1], 0), target, 4)])


class Child:
    """A forked process, and the lines that it says."""

    def __init__(self, run: Callable[[Callable[[str], None]], None]) -> None:
        read_end, write_end = os.pipe()
        self.pid = fork()
        if self.pid == 0:
            os.close(read_end)
            _become(run, write_end)
        os.close(write_end)
        self._stream = os.fdopen(read_end)
        self._ended = False

    def hear(self) -> str:
        """One line; empty when it ended."""
        return self._stream.readline().strip()

    def end(self, number: int = 9) -> None:
        """Kills it, unless it has ended. May be called again."""
        if not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            self.wait()

    def wait(self) -> int:
        """For its end; the status."""
        self._ended = True
        _, status = os.waitpid(self.pid, 0)
        self._stream.close()
        return status


def _become(run: Callable[[Callable[[str], None]], None], write_end: int) -> None:
    def say(line: str) -> None:
        os.write(write_end, line.encode() + b"\n")

    try:
        run(say)
        os._exit(0)
    except BaseException:
        say(json.dumps({"failure": traceback.format_exc()}))
        os._exit(1)


def start(side: type[Side], socket: str, seed: int) -> Child:
    """Grantor or Grantee."""
    own, other = (GRANTOR, GRANTEE) if side is Grantor else (GRANTEE, GRANTOR)
    return Child(lambda say: side(socket, seed, own, other, say).run())
