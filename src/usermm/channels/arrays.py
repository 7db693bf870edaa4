"""Messages and arrays where they are: slots to fill, and views of what came."""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from usermm._core import Message, MessageSlot
from usermm.channels.rings import MOST_DIMENSIONS, Incoming
from usermm.errors import ArgumentError, ArgumentTypeError, NotInstalledError, protocol_broken

if TYPE_CHECKING:
    import numpy as np

# Numbers, and times: never objects, whose items are addresses.
_ITEM_TYPE = re.compile(rb"[<>|=](?:[biufc](?:1|2|4|8|16|32)|[mM]8(?:\[(?:[1-9][0-9]{0,5})?[a-zA-Z]{1,7}\])?)")

_TOO_LONG = 1 << 63
BYTES = b"|u1"
"""What a message without an item type is as an array."""


def need_numpy(call: str) -> None:
    """Before a message is taken that nobody could make an array of. Raises NotInstalledError."""
    try:
        import numpy as np  # noqa: F401
    except ImportError:
        raise NotInstalledError(f"{call}: NumPy is not installed: pip install numpy") from None


def bytes_of(data: Any, call: str) -> memoryview:
    """Raises ArgumentTypeError."""
    try:
        return memoryview(data)
    except TypeError:
        raise ArgumentTypeError(f"{call}: pass bytes, or what has a buffer, not {type(data)!r}") from None




@functools.lru_cache(maxsize=256)
def item_type(code: bytes) -> np.dtype[Any]:
    """What a descriptor says the items are. Raises ProtocolError for anything but numbers, truths and times."""
    import numpy as np

    if _ITEM_TYPE.fullmatch(code):
        try:
            return np.dtype(code.decode())
        except (TypeError, ValueError):
            pass
    raise protocol_broken(f"an array of items {code[:16]!r}")


@functools.lru_cache(maxsize=256)
def code_of(wanted: Any) -> tuple[bytes, int]:
    """A NumPy type as a descriptor has it, and its bytes. Raises ArgumentError for what cannot be handed over."""
    need_numpy("loan")
    import numpy as np

    kind = np.dtype(wanted)
    code = kind.str.encode()
    if not _ITEM_TYPE.fullmatch(code) or len(code) > 16:
        raise ArgumentError(f"channel: items of type {kind} cannot be handed over: only numbers, truths and times can")
    return code, kind.itemsize


class Slot(MessageSlot):
    """Granted memory to be filled in and sent: `view` as bytes, `array` where a type was asked for.

    It is the caller's until send() or cancel(); leaving a `with` block without send() cancels. After send() the memory
    is the receiver's to read: whoever still has a view of it must not write to it before the slot comes back, or the
    receiver sees it change.
    """

    __slots__ = ()

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The same memory as an array of the shape and type that were asked for (bytes where none was)."""
        make, _ = _form(self.item_type or BYTES, self.shape if self.item_type else (len(self),))
        return make(self.view)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


def copy_into(slot: Slot, array: np.ndarray[Any, Any]) -> None:
    """An array of the shape and type that the slot was asked for."""
    try:
        slot.fill(array)
    except (BufferError, ValueError):  # not contiguous, or times, which NumPy gives no buffer of
        slot.array[...] = array


@functools.lru_cache(maxsize=256)
def _form(code: bytes, shape: tuple[int, ...]) -> tuple[Callable[[Any], np.ndarray[Any, Any]], int]:
    """What makes such an array over a buffer, and how many bytes it has. Raises ProtocolError."""
    import numpy as np

    make: Callable[..., np.ndarray[Any, Any]] = np.ndarray
    kind = item_type(code)
    return functools.partial(make, shape, kind), math.prod(shape) * kind.itemsize


def as_array(incoming: Incoming, message: Message, *, copy: bool) -> np.ndarray[Any, Any]:
    """A read-only array over the message's memory, or a copy of it. Raises ProtocolError, having let the slot go.

    Every view of it, however it was made, keeps the message alive, whose end gives the slot back.
    """
    length = len(message)
    try:
        code, shape = message.item_type, message.shape
        make, wanted = _form(code, shape) if code else _form(BYTES, (length,))  # ValueError: an impossible shape
        if wanted != length:
            raise protocol_broken(f"an array of shape {shape} and type {code.decode()} in {length} bytes")
        if not copy:
            return make(message)
        array = make(bytearray(incoming.copy(message)))
    except ValueError as error:
        message.release()
        raise protocol_broken(f"an array of shape {shape} and type {code.decode()}: {error}") from None
    except BaseException:
        message.release()
        raise
    message.release()
    return array


def form_of(array: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and type of an array that is to be sent. Raises ArgumentTypeError, ArgumentError."""
    try:
        form = array.shape, array.dtype
    except AttributeError:
        text = f"send_array: pass a NumPy array, not {type(array)!r}: numpy.asarray makes one"
        raise ArgumentTypeError(text) from None
    if hasattr(array, "filled"):
        raise ArgumentError("send_array: a masked array's mask cannot go with it: send filled(), or data and mask")
    return form


def extent_of(wanted: Any, kind: Any, most: int) -> tuple[int, bytes, tuple[int, ...]]:
    """(bytes, type code, shape) of a loan. Raises ArgumentTypeError, ArgumentError."""
    try:
        if hasattr(wanted, "__index__"):
            sizes: int | tuple[int, ...] = operator.index(wanted)
        else:
            sizes = tuple([operator.index(size) for size in wanted])
        return _extent(sizes, kind, most)
    except TypeError as error:  # also a type that is none, or none that can be remembered, as a list of fields
        text = f"loan({wanted!r:.60}, {kind!r:.40}): pass a number of bytes, or a shape of ints with a dtype: {error}"
        raise ArgumentTypeError(text) from None


@functools.lru_cache(maxsize=256)
def _extent(wanted: int | tuple[int, ...], kind: Any, most: int) -> tuple[int, bytes, tuple[int, ...]]:
    """Raises ArgumentError when no slot is large enough."""
    shape: tuple[int, ...] = ()
    if kind is None:
        if not isinstance(wanted, int) or wanted < 0:
            raise ArgumentError(f"loan({wanted!r}): pass a number of bytes, or a shape with a dtype")
        length, code = wanted, b""
    else:
        code, item_bytes = code_of(kind)
        shape = (wanted,) if isinstance(wanted, int) else tuple(wanted)
        if len(shape) > MOST_DIMENSIONS or not all(0 <= size < _TOO_LONG for size in shape):
            raise ArgumentError(f"loan({shape}): at most {MOST_DIMENSIONS} dimensions, none negative or above 2**63")
        length = math.prod(shape) * item_bytes
    if length > most:
        text = f"loan({length} bytes): this side's slots have {most}: give its listen() or connect() more slot_bytes"
        raise ArgumentError(text)
    return length, code, shape
