"""One rank of the exchange: it offers parts of its arrays, and reads and writes what the others offer.

A round: blocks are renewed; registrations are taken for what is offered; offers travel as messages; each rank gets and
puts; after a barrier every rank looks at what was written into its memory. The window is locked for all by all
throughout, so access is one-sided, and `Win.Sync` stands between one's own accesses and the others'.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from blocks import Block, Blocks
from mpi4py import MPI
from pattern import Bytes, pattern, wrong_bytes
from witness import WitnessedWindow

from usermm import OverlapError
from usermm.registrars.mpi import Attachment


class Registered(Protocol):
    """What is used of a registration."""

    @property
    def address(self) -> int: ...
    @property
    def handle(self) -> Any: ...
    def release(self) -> None: ...


class Cache(Protocol):
    """What is used of a cache."""

    def get(self, buffer: Any, /) -> Registered: ...
    def evict(self, buffer: Any, /) -> int: ...


@dataclass(frozen=True)
class Part:
    """`where` at its owner, and which bytes of block `serial` these are."""

    where: Attachment
    serial: int
    offset: int

    @property
    def target(self) -> tuple[int, int, MPI.Datatype]:
        return self.where.displacement, self.where.length, MPI.BYTE


@dataclass(frozen=True)
class Offer:
    """What one rank lets another one do in this round."""

    read: Part
    write: Part


@dataclass
class Counts:
    """Of one rank, or of several added up."""

    fetched_bytes: int = 0
    put_bytes: int = 0
    bytes_across_hosts: int = 0
    wrong_bytes: int = 0
    refused_overlaps: int = 0


class Rank:
    """One rank's blocks, its cache, and the rounds it plays with all others of `comm`."""

    def __init__(self, comm: MPI.Intracomm, window: WitnessedWindow, cache: Cache, seed: int) -> None:
        self.comm = comm
        self.window = window
        self.cache = cache
        self.me = comm.rank
        self.hosts = comm.allgather(MPI.Get_processor_name())
        self.peers = [rank for rank in range(comm.size) if rank != self.me]
        self.dice = random.Random(seed * 1009 + self.me)
        self.blocks = Blocks(self.me, self.dice)
        self.held: list[Registered] = []
        self.counts = Counts()

    def play(self, rounds: int) -> None:
        self.window.window.Lock_all()
        for number in range(1, rounds + 1):
            self._renew()
            self._round(number)
        self.window.window.Unlock_all()
        self._release()

    def _round(self, number: int) -> None:
        written, offers = self._offer()
        self._serve(number, self._trade(offers))
        self.comm.Barrier()
        self.window.window.Sync()
        self._look_at(written, number)

    def _renew(self) -> None:
        """Registrations of the last round are let go before their memory is, or after: both have to be right."""
        early = self.dice.random() < 0.5
        if early:
            self._release()
        self.blocks.renew(self.window.look)
        if not early:
            self._release()

    def _offer(self) -> tuple[Block, dict[int, Offer]]:
        """For each peer a random part of some block to read, and its own slice of one block to write."""
        written, *others = self.dice.sample(list(self.blocks), len(self.peers) + 1)
        self.held = self._registrations([block.array for block in (written, *others)])
        slice_bytes = written.array.nbytes // len(self.peers)
        offers = {}
        for index, (peer, block) in enumerate(zip(self.peers, others, strict=True)):
            offset = self.dice.randrange(block.array.nbytes)
            length = self.dice.randint(1, block.array.nbytes - offset)
            offers[peer] = Offer(
                read=self._part(block, self.held[1 + index], offset, length),
                write=self._part(written, self.held[0], index * slice_bytes, slice_bytes),
            )
        return written, offers

    def _registrations(self, arrays: list[Bytes]) -> list[Registered]:
        """One for each array. Arrays share no bytes, but what is attached can reach from freed heap into two of them.

        MPI allows no second attachment there, so a get is refused while the first is held: it is let go and given up.
        """
        held: list[Registered] = []
        while len(held) < len(arrays):
            try:
                held.append(self.cache.get(arrays[len(held)]))
            except OverlapError:
                self.counts.refused_overlaps += 1
                refused = arrays[len(held)]
                while held:
                    held.pop().release()
                self.cache.evict(refused)
        return held

    def _part(self, block: Block, registration: Registered, offset: int, length: int) -> Part:
        inside = block.array.ctypes.data - registration.address + offset
        where = registration.handle.part(inside, length)
        self.window.hand_out(where)
        return Part(where, block.serial, offset)

    def _trade(self, offers: dict[int, Offer]) -> dict[int, Offer]:
        """Send each peer its offer, and return theirs. What was stored so far is in memory before they know of it."""
        self.window.window.Sync()
        requests = [self.comm.isend(offer, dest=peer) for peer, offer in offers.items()]
        theirs = {peer: self.comm.recv(source=peer) for peer in self.peers}
        MPI.Request.waitall(requests)
        return theirs

    def _serve(self, number: int, offers: dict[int, Offer]) -> None:
        """Get and put all that is offered; what was got must be the owner's pattern."""
        window = self.window.window
        got = {}
        for owner, offer in offers.items():
            got[owner] = np.empty(offer.read.where.length, np.uint8)
            window.Get([got[owner], MPI.BYTE], owner, offer.read.target)
            data = pattern(self.me, -number, offer.write.offset, offer.write.where.length)
            window.Put([data, MPI.BYTE], owner, offer.write.target)
        window.Flush_all()
        for owner, offer in offers.items():
            read, write = offer.read, offer.write
            expected = pattern(owner, read.serial, read.offset, read.where.length)
            self.counts.wrong_bytes += wrong_bytes(got[owner], expected)
            self.counts.fetched_bytes += read.where.length
            self.counts.put_bytes += write.where.length
            if self.hosts[owner] != self.hosts[self.me]:
                self.counts.bytes_across_hosts += read.where.length + write.where.length

    def _look_at(self, written: Block, number: int) -> None:
        """Each peer's slice has that peer's bytes now; all other bytes of all blocks are what they were."""
        expected = pattern(self.me, written.serial, 0, written.array.nbytes).copy()
        slice_bytes = written.array.nbytes // len(self.peers)
        for index, peer in enumerate(self.peers):
            offset = index * slice_bytes
            expected[offset : offset + slice_bytes] = pattern(peer, -number, offset, slice_bytes)
        self.counts.wrong_bytes += wrong_bytes(written.array, expected)
        self.blocks.fill(written)
        for block in self.blocks:
            self.counts.wrong_bytes += wrong_bytes(block.array, pattern(self.me, block.serial, 0, block.array.nbytes))

    def _release(self) -> None:
        while self.held:
            self.held.pop().release()
