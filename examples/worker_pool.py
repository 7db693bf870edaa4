"""A pool of workers over arrays: tasks go out and results come back by channels; a worker that is killed is replaced,
and its task done again."""

from __future__ import annotations

import os
import signal

import numpy as np

import usermm

WORKERS, TASKS, SIDE = 2, 8, 256
SIZE = SIDE * SIDE * 8
DEADLY = 5  # the task on which its first worker is killed


def work(socket: str, number: int) -> None:
    """One worker, in a process of its own: it looks at a matrix where it lies, and fills in the answer."""
    with (
        usermm.Domain(socket) as domain,
        usermm.Channel.connect(domain, "pool", f"worker-{number}", 20, slot_bytes=SIZE) as channel,
    ):
        try:
            while True:
                matrix = channel.receive_array(timeout=20)
                with channel.loan(matrix.shape, matrix.dtype, timeout=20) as slot:
                    np.matmul(matrix, matrix, out=slot.array)
                    del matrix
                    slot.send()
        except usermm.PeerGoneError:
            return  # the pool has all it wanted


def start(socket: str, number: int) -> int:
    """Another process for worker `number`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(socket, number)
            status = 0
        finally:
            os._exit(status)
    return child


def matrix_of(task: int) -> np.ndarray:
    """What the task is about: its square is known."""
    return np.eye(SIDE) * (task + 1)


def main() -> None:
    """The pool: one task at a time for each worker."""
    with usermm.Hypervisor() as hypervisor, usermm.Domain(hypervisor.socket, name="pool") as domain:
        listeners = [usermm.Channel.listen(domain, f"worker-{number}", slot_bytes=SIZE) for number in range(WORKERS)]
        children = [start(hypervisor.socket, number) for number in range(WORKERS)]
        channels = [listener.accept(20) for listener in listeners]
        killed = 0
        for task in range(TASKS):
            number = task % WORKERS
            while True:
                try:
                    channels[number].send_array(matrix_of(task), timeout=20)
                    if task == DEADLY and not killed:
                        os.kill(children[number], signal.SIGKILL)
                        killed += 1
                    square = channels[number].receive_array(timeout=20)
                    break
                except usermm.PeerGoneError:
                    print(f"task {task}: worker {number} is gone; another one does it again")
                    channels[number].close()
                    os.waitpid(children[number], 0)
                    children[number] = start(hypervisor.socket, number)
                    channels[number] = listeners[number].accept(20)
            right = bool((square == np.eye(SIDE) * (task + 1) ** 2).all())
            print(f"task {task}: worker {number} says {square[0, 0]:.0f}, right: {right}")
            del square
        for channel, listener in zip(channels, listeners, strict=True):
            channel.close()
            listener.close()
        for child in children:
            os.waitpid(child, 0)


main()
