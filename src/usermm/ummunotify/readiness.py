"""Waiting for a descriptor under asyncio."""

from __future__ import annotations

import asyncio


async def readable(descriptor: int) -> None:
    """Returns once it polls readable; the running loop must not have a reader for it."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, wake)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
