"""The audit: what is written and remembered, and what becomes of it where nothing can be written."""

from __future__ import annotations

import json
import os
import resource
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from usermm.errors import UsermmError
from usermm.hypervisor.audit import Audit

PATIENCE_S = 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Sets how long a file of this process can be, as a full disk would; put back afterwards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_a_record_is_a_line_with_time_and_event(path: Path) -> None:
    before = time.time()
    audit = Audit(path)
    audit.record("grant", domid=1, peer=2, reference=8, count=4, writable=True)
    audit.record("leave", domid=1, reason="a\nb")
    audit.close()
    first, second = records(path)
    assert before - 1 <= first.pop("time") <= time.time()
    assert first == {"event": "grant", "domid": 1, "peer": 2, "reference": 8, "count": 4, "writable": True}
    assert second["reason"] == "a\nb"


def test_the_last_thousand_are_remembered() -> None:
    audit = Audit()
    for number in range(1200):
        audit.record("map", number=number)
    assert [record["number"] for record in audit.last()] == list(range(200, 1200))
    assert [record["number"] for record in audit.last(2)] == [1198, 1199]
    assert audit.last(0) == []
    assert len(audit.last(5000)) == 1000
    audit.close()
    assert audit.dropped == 0


def test_it_is_appended_to_and_private(path: Path) -> None:
    path.write_text('{"event":"old"}\n')
    path.chmod(0o644)
    for event in ("first", "second"):
        audit = Audit(path)
        audit.record(event)
        audit.close()
        audit.close()
    assert [record["event"] for record in records(path)] == ["old", "first", "second"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_after_the_close_nothing_is_written(path: Path) -> None:
    audit = Audit(path)
    audit.close()
    audit.record("late")
    assert records(path) == []
    assert audit.last()[0]["event"] == "late"


def test_the_file_has_a_limit_and_one_predecessor(path: Path) -> None:
    audit = Audit(path, limit_bytes=4000)
    for number in range(400):
        audit.record("map", number=number)
        if number % 10 == 9:  # a batch that the writer took at once would be longer than the limit
            wait_until(audit._waiting.empty)
    audit.close()
    old = path.with_name(f"{path.name}.1")
    assert sorted(path.parent.iterdir()) == [path, old]
    numbers = [record["number"] for record in records(old) + records(path)]
    assert numbers == list(range(numbers[0], 400)), "the newest, without a gap"
    assert stat.S_IMODE(old.stat().st_mode) == stat.S_IMODE(path.stat().st_mode) == 0o600
    assert old.stat().st_size + path.stat().st_size <= 8000 + 1000


def test_where_it_cannot_be_written_is_one_line_at_the_start(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsermmError, match=r"^audit\(.*\): No such file or directory: give a file that can be written$"):
        Audit(tmp_path / "none" / "audit")
    with pytest.raises(UsermmError, match="Is a directory"):
        Audit(tmp_path)
    with pytest.raises(UsermmError, match="null"):
        Audit("a\0b")
    target = tmp_path / "target"
    path.symlink_to(target)
    with pytest.raises(UsermmError, match="symbolic links"):
        Audit(path)
    assert not target.exists()


def test_what_a_full_disk_refuses_is_counted_and_the_count_is_written_later(
    path: Path, small_files: Callable[[int], None]
) -> None:
    audit = Audit(path)
    audit.record("first")
    wait_until(lambda: path.stat().st_size > 0)
    small_files(path.stat().st_size + 5)  # room for a piece of the next line
    for number in range(3):
        audit.record("refused", number=number)
        wait_until(lambda number=number: audit.dropped == number + 1)
    small_files(1 << 20)
    audit.record("second")
    audit.close()
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["event"] == "first"
    assert len(lines[1]) == 5, "what was torn has a line of its own"
    lost, second = (json.loads(line) for line in lines[2:])
    assert (lost["event"], lost["count"], second["event"]) == ("lost", 3, "second")
    assert audit.dropped == 3
    assert [record["event"] for record in audit.last()] == ["first", "refused", "refused", "refused", "second"]


def test_who_does_not_read_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    """The writer's thread waits in the kernel; recording goes on, and drops what is too much."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    audit = Audit(path, most_waiting=100)
    try:
        for _ in range(5000):
            audit.record("map", reason="x" * 1000)
        wait_until(lambda: audit.dropped > 4000 or audit._waiting.qsize() == 100)
        for _ in range(200):
            audit.record("map")
        assert audit.dropped >= 200
    finally:
        os.close(reader)  # the waiting write fails, and is counted
        audit.close()


def test_a_moved_file_is_begun_anew(path: Path) -> None:
    audit = Audit(path)
    audit.record("before")
    wait_until(lambda: path.stat().st_size > 0)
    moved = path.rename(path.with_name("moved"))
    audit.reopen()
    audit.record("after")
    audit.close()
    assert [record["event"] for record in records(moved)] == ["before"]
    assert [record["event"] for record in records(path)] == ["after"]


def test_a_file_that_cannot_be_begun_anew_is_tried_again(path: Path) -> None:
    audit = Audit(path)
    path.unlink()
    path.mkdir()
    audit.reopen()
    audit.record("lost")
    wait_until(lambda: audit.dropped == 1)
    path.rmdir()
    audit.record("kept")
    audit.close()
    assert [(record["event"], record.get("count")) for record in records(path)] == [("lost", 1), ("kept", None)]


def test_its_thread_and_descriptor_end_with_it(path: Path) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    audit = Audit(path)
    assert threading.active_count() == threads + 1
    audit.record("x")
    audit.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
