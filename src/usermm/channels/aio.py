"""The asyncio twins of a channel's calls. asyncio.timeout() limits them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from usermm.channels import arrays
from usermm.channels.rings import WANTS_BYTES, WANTS_MESSAGE, WANTS_ROOM, WANTS_SLOT, Incoming, Outgoing
from usermm.channels.waiting import Sleeper

if TYPE_CHECKING:
    import numpy as np


class AsyncCalls:
    """Use these or the blocking calls on a channel, not both at a time: an event wakes only one of the kinds."""

    _sleeper: Sleeper
    _out: Outgoing
    _in: Incoming

    async def send_async(self, data: Any) -> None:
        """As `send`. When it is cancelled a part may have been sent."""
        with arrays.bytes_of(data, "send_async") as given, given.cast("B") as view:
            sent = 0
            while sent < len(view):
                rest = view[sent:]
                self._check_peer("send")
                sent += await self._sleeper.until_async(
                    lambda rest=rest: self._out.put(rest) or None, WANTS_ROOM, "send"  # type: ignore[misc]
                )

    async def receive_async(self, most: int = 65536) -> bytes:
        """As `receive`."""
        self._check()
        return await self._sleeper.until_async(lambda: self._in.take(most) or None, WANTS_BYTES, "receive")

    async def loan_async(self, wanted: int | tuple[int, ...], dtype: Any = None) -> arrays.Slot:
        """As `loan`."""
        sizes = arrays.extent_of(wanted, dtype, self._out.slot_bytes)
        self._check_peer("loan")
        attempt = functools.partial(arrays.Slot.take, self._out.messages, *sizes)
        return await self._sleeper.until_async(attempt, WANTS_SLOT, "loan")

    async def send_message_async(self, data: Any) -> int:
        """As `send_message`. When it is cancelled nothing was sent."""
        with arrays.bytes_of(data, "send_message_async") as given:
            slot = await self.loan_async(given.nbytes)
            slot.fill(given)
        return slot.send()

    async def receive_message_async(self) -> bytes:
        """As `receive_message`. When it is cancelled the message is still there."""
        self._check()
        message = await self._sleeper.until_async(self._in.messages.next, WANTS_MESSAGE, "receive_message")
        try:
            return self._in.copy(message)
        finally:
            message.release()

    async def send_array_async(self, array: Any) -> int:
        """As `send_array`."""
        slot = await self.loan_async(*arrays.form_of(array))
        arrays.copy_into(slot, array)
        return slot.send()

    async def receive_array_async(self, *, copy: bool = False) -> np.ndarray[Any, Any]:
        """As `receive_array`."""
        self._check()
        arrays.need_numpy("receive_array_async")
        message = await self._sleeper.until_async(self._in.messages.next, WANTS_MESSAGE, "receive_array")
        return arrays.as_array(self._in, message, copy=copy)

    def _check(self) -> None:
        raise NotImplementedError

    def _check_peer(self, call: str) -> None:
        raise NotImplementedError
