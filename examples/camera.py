"""A camera and three who look: each frame is written once for each of them, in memory that they can only read."""

from __future__ import annotations

import os

import usermm
from usermm.channels.channel import Channel

VIEWERS, FRAMES, SHAPE = 3, 50, (120, 160)


def look(socket: str, number: int) -> None:
    """One viewer, in a process of its own."""
    with usermm.Domain(socket) as domain, Channel.connect(domain, "camera", f"viewer-{number}", 20) as channel:
        total = sum(int(channel.receive_array(timeout=20)[0, 0]) for _ in range(FRAMES))
        channel.send(str(total).encode())


def film(socket: str) -> None:
    """The camera: fills in slots, and waits for the slowest viewer."""
    with usermm.Domain(socket, name="camera") as domain:
        size = SHAPE[0] * SHAPE[1]
        listeners = [Channel.listen(domain, f"viewer-{number}", slot_bytes=size) for number in range(VIEWERS)]
        channels = [listener.accept(20) for listener in listeners]
        for number in range(FRAMES):
            for channel in channels:
                with channel.loan(SHAPE, "u1", timeout=20) as slot:
                    slot.array[...] = number
                    slot.send()
        for number, channel in enumerate(channels):
            print(f"viewer {number} saw {FRAMES} frames, sum {channel.receive(20, timeout=20).decode()}", flush=True)
            channel.close()
        for listener in listeners:
            listener.close()


def main() -> None:
    """Runs the four, and the hypervisor that they meet at."""
    with usermm.Hypervisor() as hypervisor:
        children = []
        for number in range(VIEWERS):
            child = os.fork()
            if child == 0:
                try:
                    look(hypervisor.socket, number)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        film(hypervisor.socket)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0


main()
