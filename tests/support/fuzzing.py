"""Requests that are mostly right: each field is what it may be, what it must not be, or what somebody was given."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
from collections import Counter

from support.attackers import Client, close_all
from usermm.hypercalls import grants as layouts
from usermm.hypercalls import pools as pool_layouts
from usermm.hypercalls import ports as port_layouts
from usermm.hypercalls import store as store_layouts
from usermm.hypercalls import wire
from usermm.hypercalls.wire import NO_REPLY, Operation

_FIXED: dict[int, struct.Struct] = {
    Operation.PEER: wire.PEER,
    Operation.ALLOCATE: layouts.ALLOCATE,
    Operation.POOL: pool_layouts.POOL,
    Operation.RELEASE: layouts.RANGE,
    Operation.OPEN_OWN: layouts.RANGE,
    Operation.REVOKE: layouts.RANGE,
    Operation.GRANTOR_NOTIFY: layouts.GRANTOR_NOTIFY,
    Operation.GRANTEE_NOTIFY: layouts.GRANTEE_NOTIFY,
    Operation.UNMAPPED: layouts.HANDLE,
    Operation.POOL_UNMAPPED: pool_layouts.POOL_UNMAPPED,
    Operation.PORT_UNBOUND: port_layouts.UNBOUND,
    Operation.PORT_INTERDOMAIN: port_layouts.INTERDOMAIN,
    Operation.PORT_VIRQ: port_layouts.VIRQ,
    Operation.PORT_CLOSE: port_layouts.PORT,
    Operation.PORT_REARM: port_layouts.PORT,
}
_OPERATIONS = [*_FIXED, Operation.MAP, Operation.MAP, Operation.MAP, Operation.STORE, Operation.STORE, Operation.WATCH]
_EDGES = {
    "H": (0, 1, 2, 3, 0x7FEF, 0x7FF0, 0xFFFF),
    "I": (0, 1, 2, 3, 32, 4095, 0xFFFFFFFF),
    "Q": (0, 1, (1 << 64) - 1),
}
_BITS = {"H": 16, "I": 32, "Q": 64}
_HOME = b"/local/domain/1"
_PARTS = (b"", b"/", b"key", b"a/b/c", _HOME, _HOME + b"/key", b"/names", b"@introduceDomain", b"//", b"..")
_RESTS = (b"", b"", b"value", b"n1\0", b"n1\0r2\0b3\0", b"\0\0\0\0", b"T\0", b"F\0", bytes(2100))
_MOST_KEPT = 100
_MOST_REMEMBERED = 50


class Fuzzer:
    """One domain at a time, which reconnects now and then."""

    def __init__(self, path: str, seed: int) -> None:
        self._path = path
        self._random = random.Random(seed)
        self._kept: list[int] = []
        self._seen: dict[str, list[int]] = {"H": [], "I": [], "Q": []}
        self._client = self._connect()
        self.answers: Counter[str] = Counter()

    def run(self, messages: int) -> dict[str, int]:
        """How often each errno came."""
        for _ in range(messages):
            self._step()
        self._client.close()
        close_all(self._kept)
        return dict(self.answers)

    def _connect(self) -> Client:
        client = Client(self._path)
        self._remember("H", client.hello())
        return client

    def _step(self) -> None:
        chance = self._random.random()
        if chance < 0.002:
            self._client.close()
            self._client = self._connect()
        elif chance < 0.05 and self._kept:
            self._use(self._kept.pop(self._random.randrange(len(self._kept))))
        operation = self._random.choice(_OPERATIONS)
        payload = self._payload(operation)
        if self._random.random() < 0.08:
            payload = self._mutated(payload)
        if self._random.random() < 0.01:
            operation = self._random.choice((0, Operation.HELLO, Operation.STATUS, 15, 255, 0xFFFF))
        if self._random.random() < 0.05:
            self._client.send(operation, payload, NO_REPLY | self._random.getrandbits(15) << 1)
            return
        self._client.send(operation, payload, self._random.getrandbits(15) << 1)
        self._learn(operation, *self._client.receive())

    def _payload(self, operation: int) -> bytes:
        if operation in _FIXED:
            return self._packed(_FIXED[operation])
        if operation == Operation.MAP:
            count = self._random.choice((1, 1, 1, 2, 5, 300))
            flags = self._random.choice((0, 0, 0, 1, 2, 3, 0xFFFF))
            runs = b"".join(self._packed(layouts.RUN) for _ in range(count))
            return layouts.MAP.pack(flags, 0, count if self._random.random() < 0.97 else self._field("I")) + runs
        path = b"".join(self._random.choice(_PARTS) for _ in range(self._random.randrange(3))) + b"\0"
        if operation == Operation.WATCH:
            return path + b"%d" % self._random.randrange(20)
        kind = self._random.choice(list(store_layouts.Type))
        transaction = self._field("I") if self._random.random() < 0.3 else 0
        rest = self._random.choice(_RESTS)
        if kind in (store_layouts.Type.TRANSACTION_START, store_layouts.Type.TRANSACTION_END):
            path = b""
        return store_layouts.HEADER.pack(kind, 0, transaction) + path + rest

    def _packed(self, layout: struct.Struct) -> bytes:
        return layout.pack(*(self._field(letter) for letter in layout.format if letter in _BITS))

    def _field(self, letter: str) -> int:
        chance = self._random.random()
        if chance < 0.6 and self._seen[letter]:
            return self._random.choice(self._seen[letter])
        if chance < 0.95:
            return self._random.choice(_EDGES[letter])
        return self._random.getrandbits(_BITS[letter])

    def _mutated(self, payload: bytes) -> bytes:
        data = bytearray(payload)
        way = self._random.randrange(4)
        if way == 0 and data:
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        elif way == 1:
            del data[self._random.randrange(len(data) + 1) :]
        elif way == 2:
            data += self._random.randbytes(self._random.choice((1, 7, 4096)))
        else:
            data = bytearray(self._random.randbytes(self._random.randrange(64)))
        return bytes(data)

    def _learn(self, operation: int, status: int, answer: bytes, descriptors: list[int]) -> None:
        self.answers["done" if not status else errno.errorcode.get(-status, str(status))] += 1
        self._kept += descriptors
        while len(self._kept) > _MOST_KEPT:
            os.close(self._kept.pop(self._random.randrange(len(self._kept))))
        if status:
            return
        if operation in (Operation.ALLOCATE, Operation.POOL) and len(answer) == layouts.ALLOCATED.size:
            self._remember("I", layouts.ALLOCATED.unpack(answer)[0])
        elif operation == Operation.MAP and len(answer) > layouts.MAPPED.size:
            self._remember("Q", layouts.SEGMENT.unpack_from(answer, layouts.MAPPED.size)[0])
        elif len(answer) == 4:
            self._remember("I", struct.unpack("=I", answer)[0])

    def _remember(self, letter: str, value: int) -> None:
        seen = self._seen[letter]
        seen.append(value)
        if len(seen) > _MOST_REMEMBERED:
            del seen[self._random.randrange(len(seen))]

    def _use(self, descriptor: int) -> None:
        """Whatever it is: a page, a port's end, a watch."""
        with contextlib.suppress(OSError):
            os.pwrite(descriptor, self._random.randbytes(16), self._random.choice((0, 2048, 4092)))
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\1")
        os.close(descriptor)


def fuzz(path: str, seed: int, messages: int) -> dict[str, int]:
    """Within an actor."""
    return Fuzzer(path, seed).run(messages)
