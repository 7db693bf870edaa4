"""The reference models on a toy machine."""

from __future__ import annotations

import select
from typing import ClassVar

from conformance.grants_world import Device, DomainDriver, FileDriver, Personality, World, listed

from usermm.testing.grant_evtchn import ModelEvtchn
from usermm.testing.grant_gntalloc import ModelGntalloc
from usermm.testing.grant_gntdev import ModelGntdev
from usermm.testing.grant_gntdev2007 import ModelGntdev2007
from usermm.testing.grant_machine import GrantMachine, ModelDomain
from usermm.testing.grant_memory import ModelMapping

ModelFile = ModelGntalloc | ModelGntdev | ModelGntdev2007 | ModelEvtchn


class _File(FileDriver):
    def __init__(self, file: ModelFile, domain: ModelDomain) -> None:
        self.model = file
        self._domain = domain

    def ioctl(self, request: int, argument: bytearray) -> int:
        return self.model.ioctl(request, argument)

    def mmap(self, length: int, prot: int, flags: int, offset: int) -> int:
        assert not isinstance(self.model, ModelEvtchn)
        return self.model.mmap(length, prot, flags, offset).address

    def munmap(self, address: int) -> None:
        assert not isinstance(self.model, ModelEvtchn)
        mapping = self._domain.memory.at(address)
        assert isinstance(mapping, ModelMapping) and mapping.address == address
        self.model.munmap(mapping)

    def close(self) -> None:
        self.model.close()

    def read(self, size: int) -> bytes:
        assert isinstance(self.model, ModelEvtchn)
        return self.model.read(size)

    def write(self, data: bytes) -> int:
        assert isinstance(self.model, ModelEvtchn)
        return self.model.write(data)

    def readable(self, timeout_s: float = 0) -> bool:  # noqa: ARG002
        assert isinstance(self.model, ModelEvtchn)
        return bool(self.model.poll() & select.POLLIN)


class _Domain(DomainDriver):
    def __init__(self, domain: ModelDomain) -> None:
        self.model = domain
        self.domid = domain.domid

    def open(self, device: Device, personality: Personality = "mainline") -> _File:
        kinds: dict[str, type[ModelFile]] = {
            "gntalloc": ModelGntalloc,
            "evtchn": ModelEvtchn,
            "gntdev": ModelGntdev if personality == "mainline" else ModelGntdev2007,
        }
        return _File(kinds[device](self.model), self.model)

    def place(self, data: bytes, *, at_end: bool = False) -> int:
        return self.model.memory.place(data, at_end=at_end)

    def peek(self, address: int, length: int = 1) -> bytes:
        return self.model.memory.read(address, length)

    def poke(self, address: int, data: bytes) -> None:
        self.model.memory.write(address, data)

    def peek_in_child(self, address: int, length: int = 1) -> bytes:
        return self.model.memory.forked().read(address, length)

    def ioctl_in_child(self, file: FileDriver, request: int, argument: bytearray) -> bytes:
        file.ioctl(request, argument)
        return bytes(argument)

    def revoke(self, file: FileDriver, reference: int) -> None:  # noqa: ARG002
        self.model.revoke(reference)

    def crash(self) -> None:
        self.model.machine.crash(self.model)


@listed
class ModelWorld(World):
    name: ClassVar = "model"

    def __init__(self) -> None:
        self.machine = GrantMachine()
        self._made = 0

    def make_domain(self, *, control: bool = False) -> _Domain:
        self._made += 1  # a number is not used twice: grants to it may be left
        return _Domain(self.machine.add_domain(0 if control else self._made))

    @property
    def unused_domid(self) -> int:
        return 0x7FEF

    def close(self) -> None:
        for domain in tuple(self.machine.domains.values()):
            self.machine.crash(domain)
