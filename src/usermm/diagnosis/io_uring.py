"""Whether this process can set up an io_uring and pin memory with it: tried with one page."""

from __future__ import annotations

from dataclasses import dataclass

from usermm.errors import DeviceError
from usermm.monitors import calls
from usermm.uring import Ring


@dataclass(frozen=True, slots=True)
class IoUring:
    """`problem` is "" where it works, else the one-line error, and `errno` its number."""

    works: bool
    errno: int = 0
    problem: str = ""


def try_io_uring() -> IoUring:
    """Sets up a ring, registers a page as a fixed buffer, gives both back."""
    page = calls.map_memory(calls.PAGE)
    try:
        with Ring(1) as ring:
            ring.update(0, page, calls.PAGE)
        return IoUring(True)
    except DeviceError as error:
        return IoUring(False, error.errno or 0, error.strerror or str(error))
    finally:
        calls.unmap(page, calls.PAGE)
