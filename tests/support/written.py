"""Traces written by hand: one method a line, in the preload library's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAGE = 4096


class Trace:
    """Process 10, device 1, a call every millisecond; every field can be given another value by keyword."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, call: str, **fields: Any) -> Trace:
        line: dict[str, Any] = {"t": 10**12 + len(self.lines) * 10**6, "pid": 10, "tid": 10, "call": call, "device": 1}
        if call not in ("notify", "close"):
            line["site"] = f"client+0x{len(self.lines) + 1:x} (main)"
        self.lines.append(json.dumps({**line, **fields}))
        return self

    def open(self, abi: int = 2, **fields: Any) -> Trace:
        path = "/dev/ummunotify" if abi == 2 else "/dev/ummunot"
        return self.add("open", **{"path": path, "abi": abi, "flags": 0o4000, "fd": 3, "result": 0, **fields})

    def refused_open(self, errno: int, flags: int = 0o4000) -> Trace:
        """It has neither descriptor nor device."""
        self.open(flags=flags, result=-errno)
        line = json.loads(self.lines.pop())
        self.lines.append(json.dumps({key: line[key] for key in line if key not in ("fd", "device")}))
        return self

    def register(self, cookie: int, start: int = PAGE, end: int = 2 * PAGE, **fields: Any) -> Trace:
        return self.add("register", **{"start": start, "end": end, "cookie": cookie, "result": 0, **fields})

    def unregister(self, cookie: int, **fields: Any) -> Trace:
        return self.add("unregister", **{"cookie": cookie, "result": 0, **fields})

    def notify(self, generation: int, start: int = PAGE, end: int = 2 * PAGE, **fields: Any) -> Trace:
        changed = {"start": start, "end": end, "cause": "unmap", "generation": generation, "tid": 11}
        return self.add("notify", **{**changed, **fields})

    def read(self, *cookies: int, last: int | None = None, **fields: Any) -> Trace:
        events: list[list[Any]] = [["inval", cookie, PAGE, 2 * PAGE, 1] for cookie in cookies]
        events += [] if last is None else [["last", last]]
        return self.add("read", **{"size": PAGE, "result": 32 * len(events), "events": events, **fields})

    def nothing(self, **fields: Any) -> Trace:
        """A read that answers EAGAIN."""
        return self.read(**{"result": -11, **fields})

    def mmap(self, **fields: Any) -> Trace:
        return self.add("mmap", **{"length": 8, "result": 0, "address": 0x7F0000000000, **fields})

    def close(self, **fields: Any) -> Trace:
        return self.add("close", **{"result": 0, **fields})

    def write(self, path: Path, *, end: bytes = b"\n") -> Path:
        path.write_bytes("\n".join(self.lines).encode() + end)
        return path


def opened(abi: int = 2) -> Trace:
    """A trace that begins with a successful open."""
    return Trace().open(abi)
