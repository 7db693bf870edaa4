"""A trace for people: a line a call, then the client's mistakes, then what each device was used for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Final

from usermm.traces.devices import Device
from usermm.traces.findings import Finding
from usermm.traces.mistakes import REQUESTS
from usermm.traces.parse import Lines
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

_UNITS: Final = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_MOST_EVENTS: Final = 4  # of one read, on one line
_OPEN_FLAGS: Final = ("O_NONBLOCK", "O_CLOEXEC", "O_CREAT", "O_EXCL", "O_TRUNC", "O_APPEND", "O_NOFOLLOW")
_ACCESS: Final = {os.O_RDONLY: "O_RDONLY", os.O_WRONLY: "O_WRONLY", os.O_RDWR: "O_RDWR"}


def record_line(record: Record, start_ns: int) -> str:
    """One call; the time is counted from `start_ns`."""
    seconds = (record.time_ns - start_ns) / 1e9
    who = f"{record.process}/{record.thread}"
    site = f"   {clean(record.site)}" if record.site else ""
    return f"{seconds:12.6f}  {who:<15} device {record.device}  {clean(_call(record))}{site}"


def finding_line(finding: Finding) -> str:
    """What, where, what it leads to, what to do."""
    label = "warning" if finding.is_warning else "mistake"
    lines = f"line{'s' if len(finding.lines) > 1 else ''} {', '.join(map(str, finding.lines))}"
    site = f" ({finding.site})" if finding.site else ""
    times = f" ({finding.count} times)" if finding.count > 1 else ""
    where = f"process {finding.process}, device {finding.device}, {lines}{site}"
    return clean(f"{label}: {where}: {finding.what}{times}: {finding.leads_to}; {finding.advice}")


def ending(lines: Lines, findings: Sequence[Finding], devices: Sequence[Device]) -> Iterator[str]:
    """What follows the calls."""
    if lines.garbage:
        more = ", ..." if lines.garbage > len(lines.garbage_lines) else ""
        numbers = ", ".join(map(str, lines.garbage_lines))
        yield f"note: {_count(lines.garbage, 'line')} of {lines.lines} damaged or not of a trace: {numbers}{more}"
    if lines.cut_off:
        yield f"note: line {lines.lines}, the last, is cut off: a process that wrote was killed, or still writes"
    if not lines.records:
        yield "no call was traced: the program opened no device, or does not find the library (`usermm run` says why)"
        return
    yield from (finding_line(finding) for finding in findings)
    yield _count(len(findings), "finding")
    for device in devices:
        yield from _device_lines(device)


def as_data(lines: Lines, findings: Sequence[Finding], devices: Sequence[Device]) -> dict[str, Any]:
    """The plain data of the JSON."""
    return {
        "findings": [_finding_data(finding) for finding in findings],
        "devices": [_device_data(device) for device in devices],
        "records": lines.records,
        "damaged_lines": lines.garbage,
        "first_damaged_lines": lines.garbage_lines,
        "cut_off": lines.cut_off,
    }


def clean(text: str) -> str:
    """Without what a terminal would obey: the file may say anything."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def size(length: int) -> str:
    """Exact where it is a whole number of a unit, else to one decimal."""
    for name, unit in _UNITS:
        if abs(length) >= unit:
            return f"{length // unit} {name}" if length % unit == 0 else f"{length / unit:.1f} {name}"
    return f"{length} B"


def answer(result: int) -> str:
    """A number that was returned, or the name of the errno."""
    return str(result) if result >= 0 else error_name(result)


def _call(record: Record) -> str:  # noqa: PLR0911 - one for each call
    match record:
        case Open():
            got = f"descriptor {record.descriptor}" if record.result >= 0 else answer(record.result)
            return f"open {record.path} {_flags(record.flags)} = {got}"
        case Register():
            where = _range(record.start, record.end)
            return f"register {where} cookie {record.cookie:#x} = {answer(record.result)}"
        case Unregister():
            return f"unregister cookie {record.cookie:#x} = {answer(record.result)}"
        case Exchange():
            return f"exchange features = {answer(record.result)}"
        case Ioctl():
            abi, name = REQUESTS.get(record.request, (0, ""))
            known = f" (version {abi}'s {name})" if name else ""
            return f"ioctl {record.request:#x}{known} = {answer(record.result)}"
        case Read():
            return f"read {size(record.size)} = {answer(record.result)}{_events(record)}"
        case Mmap():
            got = f"{record.address:#x}" if record.result >= 0 else answer(record.result)
            return f"mmap {size(record.length)} = {got}"
        case Close():
            return f"close = {answer(record.result)}"
        case Notify():
            return f"{record.cause} {_range(record.start, record.end)}: generation {record.generation}"
    raise AssertionError(f"a record of an unknown kind: {record}")


def _events(record: Read) -> str:
    parts = [
        f"cookie {hit.cookie:#x} {_range(hit.start, hit.end)}{' exactly' if hit.hint else ''}"
        for hit in record.hits[:_MOST_EVENTS]
    ]
    if len(record.hits) > _MOST_EVENTS:
        parts.append(f"and {len(record.hits) - _MOST_EVENTS} more")
    if record.last is not None:
        parts.append(f"LAST {record.last}")
    return "".join(f", {part}" for part in parts)


def _range(start: int, end: int) -> str:
    return f"[{start:#x}, {end:#x}) {size(end - start)}"


def _flags(flags: int) -> str:
    names, rest = [_ACCESS.get(flags & os.O_ACCMODE, "O_ACCMODE")], flags & ~os.O_ACCMODE
    for name in _OPEN_FLAGS:
        value = getattr(os, name)
        if rest & value == value:
            names.append(name)
            rest &= ~value
    return "|".join([*names, *([f"{rest:#o}"] if rest else [])])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _device_lines(device: Device) -> Iterator[str]:
    counts = device.counts
    if device.opened is None:
        opened = "a device of which the trace has no open (inherited over fork, most likely)"
    else:
        opened = f"{clean(device.opened.path)}, version {device.abi}, opened at line {device.opened.line}"
    closed = "not closed" if device.closed is None else f"closed at line {device.closed}"
    mapped = "page mapped" if device.mapped else "page not mapped"
    yield f"process {device.process}, device {device.number}: {opened}, {mapped}, {closed}"
    refused = f" ({counts.refused} refused)" if counts.refused else ""
    regions = f"{_count(counts.registers, 'region')} registered{refused}, {counts.unregisters} unregistered"
    yield (
        f"  {regions}, {device.left} left; {_count(counts.notifications, 'notification')};"
        f" {_count(counts.reads, 'read')} with {_count(counts.events, 'event')}"
    )


def _finding_data(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind.value,
        "warning": finding.is_warning,
        "process": finding.process,
        "device": finding.device,
        "lines": finding.lines,
        "site": finding.site,
        "count": finding.count,
        "what": finding.what,
        "leads_to": finding.leads_to,
        "advice": finding.advice,
    }


def _device_data(device: Device) -> dict[str, Any]:
    return {
        "process": device.process,
        "device": device.number,
        "path": device.opened.path if device.opened else None,
        "abi": device.abi if device.opened else None,
        "mapped": device.mapped,
        "opened_line": device.opened.line if device.opened else None,
        "closed_line": device.closed,
        "registered": device.counts.registers,
        "refused": device.counts.refused,
        "unregistered": device.counts.unregisters,
        "left": device.left,
        "notifications": device.counts.notifications,
        "reads": device.counts.reads,
        "events": device.counts.events,
        "generation": device.generation,
    }
