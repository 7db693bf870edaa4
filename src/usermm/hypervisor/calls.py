"""What an operation of the hypervisor answers: a `Reply`, or `Refused`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Reply(NamedTuple):
    """`descriptors` belong to the server from here on: it closes them once they are sent or cannot be."""

    payload: bytes = b""
    descriptors: Sequence[int] = ()


class Refused(Exception):  # noqa: N818 - an answer, not a failure of the hypervisor
    """The answer is `errno` with a reason of one line; nothing was changed.

    `status` is a GNTST_* code and `index` the element that was refused, where a request has several.
    """

    def __init__(self, errno: int, reason: str, *, status: int = 0, index: int = 0) -> None:
        super().__init__(errno, reason)
        self.errno = errno
        self.reason = reason
        self.status = status
        self.index = index


class NotNow(Exception):  # noqa: N818 - not a failure either
    """The request waits, and those of its connection behind it: `when` takes who is to be called when it is over."""

    def __init__(self, when: Callable[[Callable[[], None]], None]) -> None:
        super().__init__()
        self.when = when
