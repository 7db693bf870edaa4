"""A decoder in a process of another user: it may write into the caller's picture, and nowhere else.

The caller grants two things: the compressed bytes, to read, and the memory of the picture, to write. Whatever a bug in
the decoder does, it reaches no other memory of the caller's. Run as root, the example makes the three processes those
of three users; otherwise they are of one, and not isolated.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable

import numpy as np

import usermm
from usermm.uapi.xen_gntdev import PAGE_BYTES

HYPERVISOR, CALLER, DECODER = 65532, 65533, 65534
"""Users, if this is root."""
SHAPE = (480, 640)


def say(line: str) -> None:
    """In one write: the lines of two processes stay whole."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def pages(size: int) -> int:
    """How many hold `size` bytes."""
    return -(-size // PAGE_BYTES)


def child(uid: int, work: Callable[[], None]) -> int:
    """Does `work` in a process of its own, as the user `uid` if that can be."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        work()
        status = 0
    finally:
        os._exit(status)


def decode(domain: usermm.Domain, orders: int, answers: int) -> None:
    """The decoder: what it gets is a domid, two references and a length."""
    os.write(answers, str(domain.domid).encode())
    caller, first_in, first_out, size = map(int, os.read(orders, 100).split())
    compressed = domain.gntdev.map(caller, range(first_in, first_in + pages(size)))
    picture = domain.gntdev.map(caller, range(first_out, first_out + pages(SHAPE[0] * SHAPE[1])), writable=True)
    with memoryview(compressed) as data, memoryview(picture) as pixels:
        decoded = zlib.decompress(data[:size])
        pixels[: len(decoded)] = decoded
    try:
        domain.gntdev.map(caller, first_in, writable=True)
    except usermm.BadReferenceError as error:
        say(f"decoder: may it write the input? {str(error.strerror).rsplit(': ', 2)[1]}")
    say(f"decoder: isolated from its caller: {domain.is_isolated_from(caller)}")
    os.write(answers, b"done")
    os.read(orders, 1)
    say(f"decoder: taken back, the picture reads {picture.read(0, 4)!r}")
    picture.close()
    compressed.close()


def call(domain: usermm.Domain, orders: int, answers: int) -> None:
    """The caller: it keeps the picture, whatever becomes of the decoder."""
    image = np.add.outer(np.arange(SHAPE[0]), np.arange(SHAPE[1])).astype(np.uint8) | 1
    data = zlib.compress(image.tobytes())
    decoder = int(os.read(answers, 10))
    compressed = domain.gntalloc.allocate(decoder, pages(len(data)))
    picture = domain.gntalloc.allocate(decoder, pages(image.size), writable=True)
    compressed.write(0, data)
    words = domain.domid, compressed.references[0], picture.references[0], len(data)
    os.write(orders, " ".join(map(str, words)).encode())
    assert os.read(answers, 10) == b"done"
    picture.revoke()
    os.write(orders, b"!")
    pixels = np.frombuffer(picture, np.uint8, image.size).reshape(SHAPE)
    say(f"caller: the picture is right: {bool((pixels == image).all())}")
    del pixels
    picture.close()
    compressed.close()


def serve(path: str, until: int) -> None:
    """The hypervisor, until somebody closes the pipe."""
    with usermm.Hypervisor(path):
        os.read(until, 1)


def with_domain(path: str, work: Callable[[usermm.Domain], None]) -> None:
    """Does `work` as a domain of the hypervisor, once that is there."""
    while not os.path.exists(path):
        time.sleep(0.01)
    with usermm.Domain(path) as domain:
        work(domain)


def main() -> None:
    """Runs the three."""
    order_end, orders = os.pipe()
    answers, answer_end = os.pipe()
    until, end = os.pipe()
    _ = usermm.Domain, usermm.Hypervisor  # imported now: as another user the files may be out of reach
    with tempfile.TemporaryDirectory(prefix="usermm-decoder-") as folder:
        os.chmod(folder, 0o711)
        place = os.path.join(folder, "hypervisor")
        os.mkdir(place)
        if os.geteuid() == 0:
            os.chown(place, HYPERVISOR, HYPERVISOR)
        path = os.path.join(place, "socket")

        def hypervisor() -> None:
            os.close(end)
            serve(path, until)

        def decoder() -> None:
            with_domain(path, lambda domain: decode(domain, order_end, answer_end))

        def caller() -> None:
            with_domain(path, lambda domain: call(domain, orders, answers))

        server = child(HYPERVISOR, hypervisor)
        for number in (child(CALLER, caller), child(DECODER, decoder)):
            assert os.waitpid(number, 0)[1] == 0
        os.close(end)
        os.waitpid(server, 0)


main()
