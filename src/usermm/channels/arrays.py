"""Messages and arrays where they are: slots to fill, and views of what came."""

from __future__ import annotations

import errno
import functools
import math
import re
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from usermm.channels.rings import MOST_DIMENSIONS, Descriptor, Incoming, Outgoing, broken
from usermm.errors import ArgumentError, ClosedError

if TYPE_CHECKING:
    import numpy as np

# Numbers, and times: never objects, whose items are addresses.
_ITEM_TYPE = re.compile(rb"[<>|=](?:[biufc](?:1|2|4|8|16|32)|[mM]8(?:\[[a-zA-Z0-9]{1,8}\])?)")


@functools.lru_cache(maxsize=256)
def item_type(code: bytes) -> np.dtype[Any]:
    """What a descriptor says the items are. Raises ProtocolError for anything but numbers, truths and times."""
    import numpy as np

    if _ITEM_TYPE.fullmatch(code):
        try:
            return np.dtype(code.decode())
        except (TypeError, ValueError):
            pass
    raise broken(f"an array of items {code[:16]!r}")


@functools.lru_cache(maxsize=256)
def code_of(wanted: Any) -> tuple[bytes, int]:
    """A NumPy type as a descriptor has it, and its bytes. Raises ArgumentError for what cannot be handed over."""
    import numpy as np

    kind = np.dtype(wanted)
    code = kind.str.encode()
    if not _ITEM_TYPE.fullmatch(code) or len(code) > 16:
        raise ArgumentError(f"channel: items of type {kind} cannot be handed over: only numbers, truths and times can")
    return code, kind.itemsize


class Slot:
    """Granted memory to be filled in and sent: `view` as bytes, `array` where a type was asked for.

    It is the caller's until send() or cancel(); leaving a `with` block without send() cancels.
    """

    __slots__ = ("_array", "_code", "_length", "_number", "_out", "_shape", "_view")

    def __init__(self, out: Outgoing, number: int, length: int, code: bytes, shape: tuple[int, ...]) -> None:
        self._out: Outgoing | None = out
        self._number, self._length, self._code, self._shape = number, length, code, shape
        self._view = out.slot(number, length)
        self._array: Any = None

    @property
    def view(self) -> memoryview:
        """The bytes, writable. ClosedError once sent."""
        self._check()
        return self._view

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The same memory as an array of the shape and type that were asked for (bytes where none was)."""
        self._check()
        if self._array is None:
            import numpy as np

            kind = item_type(self._code) if self._code else np.dtype(np.uint8)
            shape = self._shape if self._code else (self._length,)
            self._array = np.frombuffer(self._view, kind).reshape(shape)
        return self._array  # type: ignore[no-any-return] # made above

    def send(self) -> int:
        """Hands it over without a copy; the message's number, from 1.

        The memory is the receiver's to read from now on: whoever still has an array of it must not write to it before
        the slot comes back, or the receiver sees it change.
        """
        out = self._check()
        self._out = self._array = None
        return out.publish(self._number, self._length, self._code, self._shape)

    def cancel(self) -> None:
        """Gives the slot back unsent. May be called again."""
        out, self._out, self._array = self._out, None, None
        if out is not None:
            out.cancel(self._number)

    def _check(self) -> Outgoing:
        if self._out is None:
            raise ClosedError(errno.EBADF, "slot: it was sent or cancelled: ask for another loan")
        return self._out

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        if getattr(self, "_out", None) is not None:
            self.cancel()


class _Held:
    """What every view of an array that came keeps alive, however it was made; its end gives the slot back.

    NumPy keeps whom it got the interface from, where it makes a memoryview of its own over any buffer.
    """

    __slots__ = ("__array_interface__", "_incoming", "_memory", "_slot")

    def __init__(self, incoming: Incoming, message: Descriptor, code: str, shape: tuple[int, ...]) -> None:
        self._incoming, self._slot = incoming, message.slot
        self._memory = incoming.view(message)  # it cannot be unmapped meanwhile
        where = incoming.address(message), True
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": code, "data": where}

    def __del__(self) -> None:
        self._incoming.give_back(self._slot)


def as_array(incoming: Incoming, message: Descriptor, *, copy: bool) -> np.ndarray[Any, Any]:
    """A read-only array over the message's memory, or a copy of it. Raises ProtocolError, having let the slot go."""
    import numpy as np

    try:
        kind = item_type(message.item_type) if message.item_type else np.dtype(np.uint8)
        shape = message.shape if message.item_type else (message.length,)
        if math.prod(shape) * kind.itemsize != message.length:
            raise broken(f"an array of shape {shape} and type {kind} in {message.length} bytes")
        data = incoming.copy(message) if copy else None
    except BaseException:
        incoming.give_back(message.slot)
        raise
    if data is None:
        return np.asarray(_Held(incoming, message, kind.str, shape))
    incoming.give_back(message.slot)
    return np.frombuffer(bytearray(data), kind).reshape(shape)


@functools.lru_cache(maxsize=256)
def extent(wanted: int | tuple[int, ...], kind: Any, most: int) -> tuple[int, bytes, tuple[int, ...]]:
    """(bytes, type code, shape) of a loan. Raises ArgumentError when no slot is large enough."""
    shape: tuple[int, ...] = ()
    if kind is None:
        if not isinstance(wanted, int) or wanted < 0:
            raise ArgumentError(f"loan({wanted!r}): pass a number of bytes, or a shape with a dtype")
        length, code = wanted, b""
    else:
        code, item_bytes = code_of(kind)
        shape = (wanted,) if isinstance(wanted, int) else tuple(wanted)
        if len(shape) > MOST_DIMENSIONS or any(size < 0 for size in shape):
            raise ArgumentError(f"loan({shape}): at most {MOST_DIMENSIONS} dimensions, none negative")
        length = math.prod(shape) * item_bytes
    if length > most:
        raise ArgumentError(f"loan({length} bytes): a slot has {most}: open the channel with a larger slot_bytes")
    return length, code, shape
