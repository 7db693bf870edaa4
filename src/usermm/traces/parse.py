"""JSON lines to records. A trace may end anywhere, and several processes write it: a bad line costs only itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

from usermm.errors import UsermmError
from usermm.traces import records
from usermm.traces.records import Record

LONGEST_LINE_BYTES: Final = 1 << 16
"""A read of 128 events takes some 12 KiB; what is longer is no line of ours, and is not kept in memory."""

MOST_NUMBERS: Final = 10
"""Of so many bad lines the numbers are kept."""

_PATIENCE_LINES: Final = 1000
_START: Final = b'{"t":'
_U64: Final = (0, (1 << 64) - 1)
_S64: Final = (-(1 << 63), (1 << 63) - 1)
_PROCESS: Final = (0, (1 << 31) - 1)

Line = Mapping[str, Any]
_Common = tuple[int, int, int, int, int, str]


class TraceError(UsermmError, ValueError):
    """The file is no trace."""


class _BadLineError(ValueError):
    pass


@dataclass(slots=True)
class Lines:
    """Iterate over it once for the records, in the order of the file; the counts are complete after that.

    That raises TraceError when there are lines and none is one of a trace.
    """

    stream: BinaryIO
    lines: int = 0
    records: int = 0
    garbage: int = 0
    """How many lines are none of ours."""
    garbage_lines: list[int] = field(default_factory=list)
    """The numbers of the first `MOST_NUMBERS` of them."""
    cut_off: bool = False
    """The last line has no end: whoever wrote it was stopped."""

    def __iter__(self) -> Iterator[Record]:
        for text, ended in _split(self.stream):
            self.lines += 1
            record, whole = _salvaged(text, self.lines)
            if not whole:
                self._blame(text, ended)
            if record is not None:
                self.records += 1
                yield record
            elif not self.records and (self.lines == _PATIENCE_LINES or len(text) >= LONGEST_LINE_BYTES):
                break  # it may be endless, such as /dev/urandom
        if self.garbage and not self.records:
            raise TraceError("no line is one of a trace: give the file of `usermm run --trace`")

    def _blame(self, text: bytes, ended: bool) -> None:
        if not ended and (text.startswith(_START) or _START.startswith(text)):
            self.cut_off = True
            return
        self.garbage += 1
        if len(self.garbage_lines) < MOST_NUMBERS:
            self.garbage_lines.append(self.lines)


def may_be_replaced(stream: BinaryIO) -> bool:
    """True for an empty file and for one that begins with a line of a trace, be it cut off."""
    for text, ended in _split(stream):
        begun = not ended and text.startswith(_START) and len(text) < LONGEST_LINE_BYTES
        return begun or _record(text, 1) is not None
    return True


def _split(stream: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Lines without their end, and whether they had one; of a line that is too long only the beginning."""
    while text := stream.readline(LONGEST_LINE_BYTES):
        ended = text.endswith(b"\n")
        yield text.removesuffix(b"\n"), ended
        while not ended and len(text) == LONGEST_LINE_BYTES:
            text = stream.readline(LONGEST_LINE_BYTES)
            ended = text.endswith(b"\n")


def _salvaged(text: bytes, number: int) -> tuple[Record | None, bool]:
    """The record of a line, also where one that was cut off stands before it, and whether the line is whole."""
    record = _record(text, number)
    begin = text.rfind(_START)
    if record is None and begin > 0:
        return _record(text[begin:], number), False
    return record, record is not None


def _record(text: bytes, number: int) -> Record | None:
    try:
        line = json.loads(text.decode(errors="replace"))
        if not isinstance(line, dict):
            return None
        make = _CALLS.get(_text(line, "call"))
        return None if make is None else make(line, _common(line, number))
    except (ValueError, RecursionError):  # ValueError: no JSON, no trace, or a number of more than 4300 digits
        return None


def _common(line: Line, number: int) -> _Common:
    return (
        number,
        _integer(line, "t", _U64),
        _integer(line, "pid", _PROCESS),
        _integer(line, "tid", _PROCESS),
        0 if _is_refused_open(line) else _integer(line, "device", _U64),
        _text(line, "site") if "site" in line else "",
    )


def _is_refused_open(line: Line) -> bool:
    """It has no descriptor and no device."""
    return line.get("call") == "open" and _result(line) < 0


def _integer(line: Line, key: str, limits: tuple[int, int]) -> int:
    return _limited(line.get(key), limits)


def _limited(value: object, limits: tuple[int, int]) -> int:
    if type(value) is not int or not limits[0] <= value <= limits[1]:
        raise _BadLineError
    return value


def _text(line: Line, key: str) -> str:
    value = line.get(key)
    if not isinstance(value, str):
        raise _BadLineError
    return value


def _result(line: Line) -> int:
    return _integer(line, "result", _S64)


def _open(line: Line, common: _Common) -> Record:
    abi, flags = _integer(line, "abi", (1, 2)), _integer(line, "flags", _S64)
    descriptor = -1 if _is_refused_open(line) else _integer(line, "fd", _S64)
    return records.Open(*common, _text(line, "path"), abi, flags, descriptor, _result(line))


def _read(line: Line, common: _Common) -> Record:
    events = line.get("events", [])
    if not isinstance(events, list) or not all(isinstance(event, list) and event for event in events):
        raise _BadLineError
    last = [_last(event) for event in events if event[0] == "last"]
    if len(last) > 1 or (last and events[-1][0] != "last"):
        raise _BadLineError
    hits = tuple(_hit(event) for event in events if event[0] != "last")
    return records.Read(*common, _integer(line, "size", _U64), _result(line), hits, last[0] if last else None)


def _hit(event: list[Any]) -> records.Hit:
    if len(event) != 5 or event[0] != "inval":
        raise _BadLineError
    cookie, start, end = (_limited(value, _U64) for value in event[1:4])
    if event[4] not in (0, 1):
        raise _BadLineError
    return records.Hit(cookie, start, end, bool(event[4]))


def _last(event: list[Any]) -> int:
    if len(event) != 2:
        raise _BadLineError
    return _limited(event[1], _U64)


def _notify(line: Line, common: _Common) -> Record:
    start, end, generation = (_integer(line, key, _U64) for key in ("start", "end", "generation"))
    return records.Notify(*common, start, end, _text(line, "cause"), generation)


def _register(line: Line, common: _Common) -> Record:
    start, end, cookie = (_integer(line, key, _U64) for key in ("start", "end", "cookie"))
    return records.Register(*common, start, end, cookie, _result(line))


def _unregister(line: Line, common: _Common) -> Record:
    return records.Unregister(*common, _integer(line, "cookie", _U64), _result(line))


def _ioctl(line: Line, common: _Common) -> Record:
    return records.Ioctl(*common, _integer(line, "request", _U64), _result(line))


def _mmap(line: Line, common: _Common) -> Record:
    return records.Mmap(*common, _integer(line, "length", _U64), _integer(line, "address", _U64), _result(line))


_CALLS: Final[Mapping[str, Callable[[Line, _Common], Record]]] = {
    "open": _open,
    "register": _register,
    "unregister": _unregister,
    "exchange": lambda line, common: records.Exchange(*common, _result(line)),
    "ioctl": _ioctl,
    "read": _read,
    "mmap": _mmap,
    "close": lambda line, common: records.Close(*common, _result(line)),
    "notify": _notify,
}
