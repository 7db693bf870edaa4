"""Who was granted what: the last records in memory, and all of them in a file, one JSON object a line.

A thread of its own writes, so that a slow disk keeps nobody waiting. What it cannot keep up with, and what a full disk
refuses, is dropped and counted; the count is written as a record of its own as soon as something can be written.
"""

from __future__ import annotations

import collections
import enum
import itertools
import json
import os
import queue
import threading
import time
from typing import Any, Final

from usermm.hypervisor.audit_file import AuditFile

REMEMBERED: Final = 1000
LIMIT_BYTES: Final = 16 << 20
_MOST_WAITING = 10_000
_BATCH = 500
_CLOSING_S = 5.0  # a disk that hangs must not keep the hypervisor from ending


class _Order(enum.Enum):
    END = enum.auto()
    REOPEN = enum.auto()


class Audit:
    """The records, as dictionaries with "time" (seconds since 1970), "event", and what the event is about.

    `path` None: in memory only. The file has mode 0600; at `limit_bytes` it is renamed to ``path.1``, in the place of
    the one before. Raises `UsermmError` where the file cannot be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        limit_bytes: int = LIMIT_BYTES,
        most_waiting: int = _MOST_WAITING,
    ) -> None:
        self._last: collections.deque[dict[str, Any]] = collections.deque(maxlen=REMEMBERED)
        self._most_waiting = most_waiting
        self._not_queued = 0  # counted by the thread that records
        self._not_written = 0  # counted by the thread that writes
        self._reported = 0
        self._waiting: queue.SimpleQueue[dict[str, Any] | _Order] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if path is not None:
            file = AuditFile(os.fspath(path), limit_bytes)
            self._thread = threading.Thread(target=self._write, args=(file,), name="usermm audit", daemon=True)
            self._thread.start()

    def record(self, event: str, **fields: object) -> None:
        """Never waits and never fails. `fields` are plain data and are not changed afterwards."""
        entry = {"time": round(time.time(), 6), "event": event, **fields}
        self._last.append(entry)
        if self._thread is None:
            return
        if self._waiting.qsize() >= self._most_waiting:
            self._not_queued += 1
        else:
            self._waiting.put(entry)

    def last(self, count: int = REMEMBERED) -> list[dict[str, Any]]:
        """The newest `count` records, at most 1000, oldest first. For the thread that records."""
        return list(itertools.islice(self._last, max(0, len(self._last) - count), None))

    @property
    def dropped(self) -> int:
        """Records that are not in the file, and never will be."""
        return self._not_queued + self._not_written

    def reopen(self) -> None:
        """Begins the file anew, for who has moved it away."""
        if self._thread is not None:
            self._waiting.put(_Order.REOPEN)

    def close(self) -> None:
        """Writes what waits. May be called twice; later records are kept in memory only."""
        if self._thread is not None:
            self._waiting.put(_Order.END)
            self._thread.join(_CLOSING_S)
            self._thread = None

    def _write(self, file: AuditFile) -> None:
        """The thread's own: batch after batch until the END."""
        ended = False
        while not ended:
            batch, ended, reopen = self._next_batch()
            self._append(file, batch)
            if reopen:
                try:
                    file.reopen()
                except OSError:
                    continue  # the next append opens it, or counts what it drops
        file.close()

    def _next_batch(self) -> tuple[list[dict[str, Any]], bool, bool]:
        batch: list[dict[str, Any]] = []
        item = self._waiting.get()
        while True:
            if isinstance(item, _Order):
                return batch, item is _Order.END, item is _Order.REOPEN
            batch.append(item)
            if len(batch) >= _BATCH:
                return batch, False, False
            try:
                item = self._waiting.get_nowait()
            except queue.Empty:
                return batch, False, False

    def _append(self, file: AuditFile, batch: list[dict[str, Any]]) -> None:
        lost = self.dropped - self._reported
        if lost:
            batch.insert(0, {"time": round(time.time(), 6), "event": "lost", "count": lost})
        if not batch:
            return
        text = "".join(f"{json.dumps(entry, default=str, separators=(',', ':'))}\n" for entry in batch)
        try:
            file.append(text.encode())
        except OSError:
            self._not_written += len(batch) - bool(lost)
        else:
            self._reported += lost
