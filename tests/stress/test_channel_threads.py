"""Channels that are closed, forked and let go in the middle of everything that threads do with them."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from support.channels import joined
from support.processes import in_child

import usermm
from usermm.errors import ClosedError, PeerGoneError, UsermmError

ROUNDS = 2000 if os.environ.get("USERMM_STRESS") == "1" else 60
WAIT_S = 0.2
# A sanitizer's run time does not bring its locks through a fork beside threads.
FORKS = "san.so" not in os.environ.get("LD_PRELOAD", "")
FINE = (ClosedError, PeerGoneError, TimeoutError)


class Round:
    """One channel: a thread sends, one receives messages, one the stream, until it is closed under them."""

    def __init__(self, ends: tuple[usermm.Channel, usermm.Channel], seed: int) -> None:
        self.here, self.there = ends
        self.chance = random.Random(seed)
        self.over = threading.Event()
        self.loans: list[Any] = []
        self.views: list[Any] = []
        self.wrong: list[BaseException] = []

    def send(self) -> None:
        kind = self.chance.randrange(4)
        if kind == 0:
            self.here.send_message(bytes(self.chance.randrange(2000)), timeout=WAIT_S)
        elif kind == 1:
            array = np.ones(self.chance.randrange(500), self.chance.choice(["<i4", ">f8", "?"]))
            self.here.send_array(array, timeout=WAIT_S)
        elif kind == 2:
            self.here.send(bytes(self.chance.randrange(1, 9000)), timeout=WAIT_S)
        else:
            self.loans[:] = [*self.loans[-1:], self.here.loan((3, 4), "f4", timeout=WAIT_S)]
            if self.chance.random() < 0.5:
                self.loans.pop().send()

    def receive(self) -> None:
        array = self.there.receive_array(timeout=WAIT_S)
        if self.chance.random() < 0.5:
            self.views.append(array[::2])
        elif self.views:
            circle: list[Any] = [self.views[:]]
            circle.append(circle)
            self.views.clear()

    def receive_bytes(self) -> None:
        self.there.receive(5000, timeout=WAIT_S)

    def run(self, call: Callable[[], None]) -> None:
        try:
            while not self.over.is_set():
                call()
        except FINE:
            return
        except BaseException as error:
            self.wrong.append(error)

    def in_child(self) -> None:
        """Whatever a forked child does there is refused, and changes nothing."""
        calls = [self.send, self.receive, self.receive_bytes, self.here.close, self.there.close]
        for call in [*calls, *(lambda view=view: memoryview(view.base) for view in self.views)]:
            with suppress(UsermmError, TimeoutError, BufferError, TypeError):
                call()
        self.views.clear()
        self.loans.clear()
        gc.collect()

    def play(self) -> None:
        threads = [threading.Thread(target=self.run, args=(call,)) for call in self.calls()]
        for thread in threads:
            thread.start()
        time.sleep(self.chance.random() * 0.03)
        if self.chance.random() < 0.2 and FORKS:
            in_child(self.in_child)
        self.chance.choice([self.here.close, self.there.close, lambda: None])()
        time.sleep(self.chance.random() * 0.005)
        self.over.set()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        assert not self.wrong, self.wrong
        for view in self.views:
            view.sum()

    def calls(self) -> tuple[Callable[[], None], ...]:
        return self.send, self.receive, self.receive_bytes


@pytest.mark.timeout(60 + ROUNDS)
def test_closing_under_threads() -> None:
    with (
        usermm.Hypervisor() as hypervisor,
        usermm.Domain(hypervisor.socket, limit=1 << 16) as one,
        usermm.Domain(hypervisor.socket, limit=1 << 16) as other,
    ):
        for seed in range(ROUNDS):
            here, there = joined(one, other)
            with here, there:
                Round((here, there), seed).play()
        gc.collect()
