"""``usermm run --trace`` and ``usermm trace``: a client in C that makes a mistake, which is found, or none."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support import compiled, preload
from support.commands import TIMEOUT_S, command, environment, needs_preload, usermm
from support.processes import SOURCE

from usermm.traces import parse, records
from usermm.traces.findings import Kind
from usermm.traces.records import Record

pytestmark = [needs_preload, preload.needs_preload]

PAGE = 4096
FLAGS = ("-fno-optimize-sibling-calls", "-rdynamic", f"-I{SOURCE.parent / 'libusermm' / 'include'}")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.program("mistakes", tmp_path_factory.mktemp("client"), *FLAGS)


def traced(client: Path, kind: str, folder: Path) -> Path:
    path = folder / "trace"
    done = usermm("run", "--trace", path, client, kind)
    assert (done.returncode, done.stderr) == (0, ""), done
    return path


def found(path: Path) -> tuple[int, dict[str, Any]]:
    done = usermm("trace", path, "--json")
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def read(path: Path) -> list[Record]:
    with open(path, "rb") as stream:
        lines = parse.Lines(stream)
        result = list(lines)
    assert (lines.garbage, lines.cut_off) == (0, False), path.read_text()
    return result


@pytest.mark.parametrize("kind", ["right", "right-v1"])
def test_a_right_client(kind: str, client: Path, tmp_path: Path) -> None:
    path = traced(client, kind, tmp_path)
    status, data = found(path)
    assert (status, data["findings"]) == (0, []), path.read_text()
    assert (data["damaged_lines"], data["cut_off"]) == (0, False)
    (device,) = data["devices"]
    assert device["abi"] == (1 if kind.endswith("v1") else 2)
    assert device["left"] == 0
    assert device["closed_line"]


@pytest.mark.parametrize(
    ("name", "kinds", "site"),
    [
        ("last-not-reached", [Kind.LAST_NOT_REACHED], "(read_events)"),
        ("goes-on", [Kind.LAST_NOT_REACHED], "(read_events)"),
        ("not-drained", [Kind.NOT_DRAINED], ""),
        ("never-unregistered", [Kind.NEVER_UNREGISTERED], "(watch)"),
        ("cookie-leaked", [Kind.COOKIE_LEAKED], "(watch)"),
        ("cookie-in-use", [Kind.COOKIE_IN_USE], "(watch)"),
        ("cookie-unknown", [Kind.COOKIE_UNKNOWN], "(forget)"),
        ("exchange-late", [Kind.EXCHANGE_LATE], "mistakes+0x"),
        ("short-read", [Kind.SHORT_READ], "(read_events)"),
        ("bad-pointer", [Kind.BAD_POINTER], "mistakes+0x"),
        ("bad-buffer", [Kind.BAD_BUFFER], "mistakes+0x"),
        ("wrong-request", [Kind.WRONG_REQUEST], "(watch_v1)"),
        ("open-for-writing", [Kind.OPEN_FOR_WRITING], "mistakes+0x"),
        ("mmap-too-long", [Kind.MMAP_REFUSED], "mistakes+0x"),
        ("mmap-writable", [Kind.MMAP_REFUSED], "mistakes+0x"),
        ("mmap-of-nothing", [Kind.MMAP_REFUSED], "mistakes+0x"),
        ("mmap-further-on", [Kind.MMAP_REFUSED], "mistakes+0x"),
        ("mmap-odd-offset", [Kind.MMAP_REFUSED], "mistakes+0x"),
        ("parents-device", [Kind.PARENTS_DEVICE], "(watch)"),
        ("exec-leaks", [Kind.NEVER_UNREGISTERED], "(watch)"),
        ("last-not-reached-v1", [Kind.LAST_NOT_REACHED], "(read_events)"),
        ("interface-version", [Kind.INTERFACE_VERSION], "(watch_v1)"),
    ],
)
def test_a_mistake_is_found(name: str, kinds: list[Kind], site: str, client: Path, tmp_path: Path) -> None:
    path = traced(client, name, tmp_path)
    status, data = found(path)
    assert status == 1, path.read_text()
    assert [finding["kind"] for finding in data["findings"]] == kinds, path.read_text()
    assert site in data["findings"][0]["site"]
    text = usermm("trace", path)
    assert text.returncode == 1
    site = data["findings"][0]["site"]
    assert f"{f' ({site})' if site else ''}: {data['findings'][0]['what']}" in text.stdout


def test_a_warning_alone_is_no_mistake(client: Path, tmp_path: Path) -> None:
    path = traced(client, "empty-region", tmp_path)
    status, data = found(path)
    assert (status, [finding["kind"] for finding in data["findings"]]) == (0, [Kind.EMPTY_REGION])
    assert "(watch)" in data["findings"][0]["site"]
    text = usermm("trace", path)
    assert text.returncode == 0
    assert "\nwarning: " in text.stdout


@pytest.mark.parametrize(
    ("name", "call", "result"),
    [
        ("bad-buffer", records.Read, -errno.EFAULT),
        ("mmap-too-long", records.Mmap, -errno.EINVAL),
        ("mmap-writable", records.Mmap, -errno.EACCES),
        ("mmap-of-nothing", records.Mmap, -errno.EINVAL),
        ("mmap-further-on", records.Mmap, -errno.EINVAL),
        ("mmap-odd-offset", records.Mmap, -errno.EINVAL),
    ],
)
def test_a_refused_call_is_there_once(
    name: str, call: type[records.Read | records.Mmap], result: int, client: Path, tmp_path: Path
) -> None:
    assert [line.result for line in read(traced(client, name, tmp_path)) if isinstance(line, call)] == [result]


def test_every_call_and_notification_is_there(client: Path, tmp_path: Path) -> None:
    """With time, thread and place; two changes, of which the second is a discard."""
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    lines = read(traced(client, "right", tmp_path))
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    times = [line.time_ns for line in lines]
    assert before < min(times)
    assert max(times) < after
    process = lines[0].process
    assert {line.process for line in lines} == {process}
    assert {line.thread for line in lines if not isinstance(line, records.Notify)} == {process}
    assert {line.device for line in lines} == {1}
    assert isinstance(lines[0], records.Open)
    assert (lines[0].path, lines[0].abi, lines[0].result) == ("/dev/ummunotify", 2, 0)
    assert lines[0].flags == os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    assert isinstance(lines[-1], records.Close)
    sizes = [(line.end - line.start) // PAGE for line in lines if isinstance(line, records.Register)]
    assert sizes == [4, 2]
    notified = [line for line in lines if isinstance(line, records.Notify)]
    assert [(line.cause, line.generation, (line.end - line.start) // PAGE) for line in notified] == [
        ("unmap", 1, 4),
        ("discard", 2, 1),
    ]
    reads = [line for line in lines if isinstance(line, records.Read)]
    assert [line.last for line in reads] == [None, 1, None, 2]
    assert [hit.cookie for line in reads for hit in line.hits] == [1, 2]
    assert all(hit.hint for line in reads for hit in line.hits)
    assert [line.cookie for line in lines if isinstance(line, records.Unregister)] == [1, 2]
    assert all("mistakes+0x" in line.site for line in lines if isinstance(line, records.Register | records.Read))


@pytest.mark.parametrize("name", ["mpi", "spin", "eagain"])
def test_the_known_clients_drain_as_they_should(name: str, tmp_path: Path) -> None:
    """Threads change memory at random, so lines stand in any order; none of these clients cleans up at its end."""
    program = compiled.program(f"clients/{name}", tmp_path, *FLAGS)
    path = tmp_path / "trace"
    done = usermm("run", "--trace", path, program, "3000", "4", "none")
    assert (done.returncode, done.stderr) == (0, ""), done
    _, data = found(path)
    assert {finding["kind"] for finding in data["findings"]} <= {Kind.NEVER_UNREGISTERED, Kind.EMPTY_REGION}
    assert data["damaged_lines"] == 0
    assert data["devices"][0]["notifications"] > 100


def test_beside_a_sanitizer(client: Path, tmp_path: Path) -> None:
    """Its runtime ends the program unless it is the first library."""
    runtime = preload.optional_library("libasan.so", "libgcc-12-dev")
    program = compiled.program("mistakes", tmp_path, *FLAGS, "-fsanitize=address")
    path = tmp_path / "trace"
    for target in (client, program):
        done = usermm("run", "--trace", path, target, "right", env=environment(LD_PRELOAD=runtime))
        assert (done.returncode, done.stderr) == (0, ""), done
        assert found(path)[1]["devices"][0]["notifications"] == 2


def test_a_program_without_a_device_leaves_an_empty_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    assert usermm("run", "--trace", path, "true").returncode == 0
    assert path.read_bytes() == b""
    done = usermm("trace", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("no call was traced")


def test_without_trace_nothing_is_written(client: Path, tmp_path: Path) -> None:
    done = usermm("run", client, "right", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_many_processes_write_one_trace(client: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    loop = f"for i in 1 2 3 4 5 6 7 8; do {client} right & {client} right-v1 & done; wait"
    assert usermm("run", "--trace", path, "sh", "-c", loop).returncode == 0
    status, data = found(path)
    assert (status, data["findings"], data["damaged_lines"]) == (0, [], 0)
    assert len(data["devices"]) == 16


def test_the_trace_of_a_killed_program_is_read(client: Path, tmp_path: Path) -> None:
    """Whatever is cut off: the whole lines are there, and nothing of it is an error."""
    path = tmp_path / "trace"
    loop = f"while :; do {client} right || exit; done"
    words = command("run", "--trace", path, "sh", "-c", loop)
    with subprocess.Popen(words, env=environment(), start_new_session=True) as child:
        until = time.monotonic() + TIMEOUT_S
        while time.monotonic() < until and (not path.exists() or path.stat().st_size < 50_000):
            time.sleep(0.01)
        os.killpg(child.pid, signal.SIGKILL)
    status, data = found(path)
    assert status in (0, 1)
    assert data["damaged_lines"] == 0
    assert data["records"] > 100
