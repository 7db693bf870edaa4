"""Finds what a client does wrong, in one pass over the records. The rules are those of docs/abi.md.

What a call answered decides, not what the records before it let expect: threads write their lines in any order.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from usermm.traces.devices import Device
from usermm.traces.findings import Finding, Findings, Kind
from usermm.traces.records import (
    Close,
    Exchange,
    Ioctl,
    Mmap,
    Notify,
    Open,
    Read,
    Record,
    Register,
    Unregister,
    error_name,
)
from usermm.uapi import ummunot, ummunotify

_EVENT_BYTES: Final = ummunotify.EVENT.size

_GOES_ON: Final = 2
"""So many REGISTER calls between two reads of one drain are no part of it. One is: Open MPI's handler of an event can
free watched memory of its own, and registers what replaces it."""

REQUESTS: Final = {
    ummunotify.EXCHANGE_FEATURES: (2, "EXCHANGE_FEATURES"),
    ummunotify.REGISTER_REGION: (2, "REGISTER_REGION"),
    ummunotify.UNREGISTER_REGION: (2, "UNREGISTER_REGION"),
    ummunot.REGISTER_REGION: (1, "REGISTER_REGION"),
    ummunot.UNREGISTER_REGION: (1, "UNREGISTER_REGION"),
}
"""Request to version and name."""

PATHS: Final = {1: ummunot.DEVICE_PATH, 2: ummunotify.DEVICE_PATH}


class Finder:
    """Feed it every record, then call `finish`; `devices` are in the order in which they appear."""

    def __init__(self) -> None:
        self.devices: list[Device] = []
        self._current: dict[tuple[int, int], Device] = {}
        self._findings = Findings()

    def feed(self, record: Record) -> None:
        """The next record of the file."""
        if isinstance(record, Open):
            self._open(record)
            return
        device = self._device(record)
        if getattr(record, "result", 0) == -errno.ECHILD:
            what = f"{type(record).__name__.lower()} of a device that the parent opened: ECHILD"
            self._add(Kind.PARENTS_DEVICE, record, what)
            return
        match record:
            case Register():
                self._register(device, record)
            case Unregister():
                self._unregister(device, record)
            case Read():
                self._read(device, record)
            case Exchange():
                self._exchange(device, record)
            case Ioctl():
                self._ioctl(device, record)
            case Mmap():
                self._mmap(device, record)
            case Notify():
                device.notify(record)
            case Close():
                device.closed = record.line
                self._end(device, f"its close at line {record.line}")
            case _:
                raise AssertionError(f"a record of an unknown kind: {record}")

    def finish(self) -> list[Finding]:
        """The findings, by their first line. Call it once."""
        for device in list(self._current.values()):
            self._end(device, "the end of the process or of the trace")
        return self._findings.in_order()

    def _device(self, record: Record) -> Device:
        device = self._current.get((record.process, record.device))
        if device is None:
            device = self._begin(Device(record.process, record.device, None))
        return device

    def _begin(self, device: Device) -> Device:
        self._current[device.owner] = device
        self.devices.append(device)
        return device

    def _add(
        self, kind: Kind, record: Record, what: str, *, also: tuple[int, ...] = (), advice: str | None = None
    ) -> None:
        lines = sorted({record.line, *also})
        self._findings.add(kind, (record.process, record.device, record.site), lines, what, advice)

    def _open(self, record: Open) -> None:
        if record.result < 0:
            if record.result == -errno.EINVAL and record.flags & os.O_ACCMODE != os.O_RDONLY:
                self._add(Kind.OPEN_FOR_WRITING, record, f"open of {record.path} for writing: EINVAL")
            return
        before = self._current.get((record.process, record.device))
        if before is not None:  # exec starts the numbers again, and so does a process that got a dead one's number
            self._end(before, f"the start of another program at line {record.line}")
        self._begin(Device(record.process, record.device, record))

    def _register(self, device: Device, record: Register) -> None:
        device.use(record.line)
        if device.in_drain is not None and device.in_drain.thread == record.thread:
            device.registered_in_drain += 1
            if device.registered_in_drain == _GOES_ON:
                self._last_not_reached(device, f"before it went on to REGISTER, at line {record.line}", (record.line,))
        if record.result < 0:
            self._refused(device, record)
            return
        if record.start >= record.end:
            shape = "is empty" if record.start == record.end else "ends before it starts"
            self._add(Kind.EMPTY_REGION, record, f"region {_range(record)} of cookie {record.cookie:#x} {shape}")
        device.register(record)

    def _refused(self, device: Device, record: Register) -> None:
        device.counts.refused += 1
        holder = device.regions.get(record.cookie)
        if record.result != -errno.EINVAL:
            device.remember(record.cookie, f"was refused at line {record.line} ({error_name(record.result)})")
        elif holder is not None or device.abi == 2:
            since = "" if holder is None else f", which is registered since line {holder.line}{_at(holder.site)}"
            what = f"REGISTER of cookie {record.cookie:#x}{since}: EINVAL"
            self._add(Kind.COOKIE_IN_USE, record, what, also=() if holder is None else (holder.line,))
        else:
            self._add(Kind.INTERFACE_VERSION, record, f"REGISTER of cookie {record.cookie:#x}, which is free: EINVAL")

    def _unregister(self, device: Device, record: Unregister) -> None:
        if record.result == 0:
            device.unregister(record)
        elif record.result == -errno.EINVAL:
            fate = device.former.get(record.cookie, "was never registered")
            what = f"UNREGISTER of cookie {record.cookie:#x}, which {fate}: EINVAL"
            self._add(Kind.COOKIE_UNKNOWN, record, what)

    def _read(self, device: Device, record: Read) -> None:
        device.use(record.line)
        if record.size < _EVENT_BYTES:
            self._add(Kind.SHORT_READ, record, f"read of {record.size} bytes")
        if record.result == -errno.EFAULT:
            self._add(Kind.BAD_BUFFER, record, "read into memory that cannot be written: EFAULT")
        elif record.result == -errno.EAGAIN:
            device.drain(device.generation)
        elif record.result > 0:
            device.events(record)

    def _exchange(self, device: Device, record: Exchange) -> None:
        if record.result == -errno.EINVAL:
            since = "" if device.first_use is None else f" at line {device.first_use}"
            also = () if device.first_use is None else (device.first_use,)
            self._add(Kind.EXCHANGE_LATE, record, f"EXCHANGE_FEATURES after the first use{since}: EINVAL", also=also)
        device.use(record.line)

    def _ioctl(self, device: Device, record: Ioctl) -> None:
        abi, name = REQUESTS.get(record.request, (0, f"request {record.request:#x}"))
        if record.result == -errno.EFAULT:
            if name == "EXCHANGE_FEATURES":
                device.use(record.line)
            self._add(Kind.BAD_POINTER, record, f"{name} with an argument at an address that cannot be used: EFAULT")
        elif record.result == -errno.ENOTTY:
            if abi not in (0, device.abi):
                advice = f"open {PATHS[abi]} for it, or use version {device.abi}'s requests"
                what = f"{name} of version {abi} on a device of version {device.abi}: ENOTTY"
                self._add(Kind.WRONG_REQUEST, record, what, advice=advice)
            else:
                self._add(Kind.WRONG_REQUEST, record, f"{name}: ENOTTY")

    def _mmap(self, device: Device, record: Mmap) -> None:
        if record.result >= 0:
            device.mapped = True
        elif record.result in (-errno.EINVAL, -errno.EACCES, -errno.EPERM):
            what = f"mmap of {record.length} bytes of the device: {error_name(record.result)}"
            self._add(Kind.MMAP_REFUSED, record, what)

    def _end(self, device: Device, how: str) -> None:
        """The device ended, as `how` says: what should have been done before?"""
        self._current.pop(device.owner, None)
        self._last_not_reached(device, f"before {how}", () if device.closed is None else (device.closed,))
        self._not_drained(device, how)
        for register in device.regions.values():
            region = f"region {_range(register)} of cookie {register.cookie:#x}"
            read = device.gone.get(register.cookie)
            if read is None:
                what = f"{region} was not unregistered before {how}"
                self._add(Kind.NEVER_UNREGISTERED, register, what)
            else:
                what = f"{region} was reported gone at line {read}, but not unregistered before {how}"
                self._add(Kind.COOKIE_LEAKED, register, what, also=(read,))
        device.left = len(device.regions)
        device.regions, device.gone, device.former, device.undrained = {}, {}, {}, []  # only the counts stay

    def _last_not_reached(self, device: Device, before: str, also: tuple[int, ...]) -> None:
        read, device.in_drain = device.in_drain, None
        if read is None:
            return
        # Version 1 gives LAST only where there is room, and never owes it.
        full = device.abi == 1 and len(read.hits) * _EVENT_BYTES + _EVENT_BYTES > read.size
        advice = f"read until EAGAIN, or give read more than {read.size} bytes" if full else None
        what = f"read gave {len(read.hits)} event(s), but neither LAST nor EAGAIN was read {before}"
        self._add(Kind.LAST_NOT_REACHED, read, what, also=also, advice=advice)

    def _not_drained(self, device: Device, how: str) -> None:
        """Memory that is freed at the very end need not be read about, when its regions are unregistered as well."""
        if not device.mapped or not device.undrained:
            return
        live = device.undrained_hits()
        if device.counts.reads and not live and device.registered_undrained is None:
            return
        first = (live or device.undrained)[0]
        if not device.counts.reads:
            known = "nothing was ever read"
        elif not device.counts.lasts and not device.drained:
            known = "no LAST was read"
        else:
            known = f"events were read only up to {device.drained}"
        what = f"the generation moved to {device.generation} (from line {first.line} on), but before {how} {known}"
        also = () if device.registered_undrained is None else (device.registered_undrained.line,)
        # No site: the library that should have read is somewhere in the program, and made no call.
        self._findings.add(Kind.NOT_DRAINED, (*device.owner, ""), sorted({first.line, *also}), what)


def _range(region: Register) -> str:
    return f"[{region.start:#x}, {region.end:#x})"


def _at(site: str) -> str:
    return f" ({site})" if site else ""
