"""Traces as files: what is printed of them, and what happens with one that is cut off, damaged or none."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
from support.written import Trace, opened

from usermm.__main__ import main
from usermm.reporters import trace as reporter
from usermm.traces import parse

EOPNOTSUPP = -95


def run(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    status = main(["trace", str(path), *options])
    output = capsys.readouterr()
    return status, output.out, output.err


def wrong() -> Trace:
    return opened().register(7, site="client+0x5 (add)").close()


def test_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = opened().mmap().register(0xAB, 1 << 20, 3 << 20).notify(1, 1 << 20, 2 << 20).read(0xAB, last=1)
    status, out, err = run(trace.unregister(0xAB).close().write(tmp_path / "t"), capsys)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == (
        "    0.000000  10/10           device 1  open /dev/ummunotify O_RDONLY|O_NONBLOCK = descriptor 3"
        "   client+0x1 (main)"
    )
    assert "    0.002000" in lines[2]
    assert "register [0x100000, 0x300000) 2 MiB cookie 0xab = 0   client+0x3 (main)" in lines[2]
    assert lines[3].endswith("unmap [0x100000, 0x200000) 1 MiB: generation 1")
    assert "read 4 KiB = 64, cookie 0xab [0x1000, 0x2000) 4 KiB exactly, LAST 1" in lines[4]
    assert lines[7] == "0 findings"
    assert (
        lines[8] == "process 10, device 1: /dev/ummunotify, version 2, opened at line 1, page mapped, closed at line 7"
    )
    assert lines[9] == "  1 region registered, 1 unregistered, 0 left; 1 notification; 1 read with 2 events"


def test_a_finding_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(wrong().write(tmp_path / "t"), capsys)
    assert (status, err) == (1, "")
    assert (
        "mistake: process 10, device 1, line 2 (client+0x5 (add)): region [0x1000, 0x2000) of cookie 0x7 was not "
        "unregistered before its close at line 3: what was pinned or registered for it stays so; "
        "UNREGISTER each cookie before close or exit\n1 finding\n"
    ) in out


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_warning_alone_is_no_mistake(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = opened().register(7, 4096, 4096).unregister(7)
    status, out, _ = run(empty.write(tmp_path / "t"), capsys, *options)
    assert status == 0
    assert "warning" in out
    assert run(empty.register(8).write(tmp_path / "t"), capsys, *options)[0] == 1


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(wrong().write(tmp_path / "t"), capsys, "--json")
    assert (status, err) == (1, "")
    data = json.loads(out)
    (finding,) = data["findings"]
    assert (finding["kind"], finding["lines"], finding["site"]) == ("never-unregistered", [2], "client+0x5 (add)")
    (device,) = data["devices"]
    assert (device["registered"], device["left"], device["closed_line"]) == (1, 1, 3)
    assert (data["records"], data["damaged_lines"], data["cut_off"]) == (3, 0, False)


def test_errors_have_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = opened().register(1, result=EOPNOTSUPP).register(2, result=-9999).nothing()
    _, out, _ = run(trace.write(tmp_path / "t"), capsys)
    assert "= EOPNOTSUPP" in out
    assert "= errno 9999" in out
    assert "= EAGAIN" in out


def test_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(Trace().write(tmp_path / "t", end=b""), capsys)
    assert (status, err) == (0, "")
    assert out.startswith("no call was traced")


@pytest.mark.parametrize("kept", range(1, 60))
def test_a_last_line_that_is_cut_off(kept: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = opened().lines[0].encode()[:kept]
    status, out, err = run(opened().write(tmp_path / "t", end=b"\n" + cut), capsys)
    assert (status, err) == (0, "")
    assert "line 2, the last, is cut off" in out
    assert run(Trace().write(tmp_path / "t", end=cut), capsys)[0] == 0


def test_a_line_that_is_cut_off_in_the_middle_costs_only_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process was killed while it wrote; another went on at the end of the file."""
    trace = opened().register(1).unregister(1).close()
    trace.lines[1] = trace.lines[0][:30] + trace.lines[1]
    status, out, _ = run(trace.write(tmp_path / "t"), capsys)
    assert status == 0
    assert "note: 1 line of 4 damaged or not of a trace: 2\n" in out
    assert "1 region registered, 1 unregistered" in out


def test_garbage_is_reported_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = opened()
    trace.lines += ["hello", "", "{}", "[1]", "null", '{"call": []}', '{"call": "dance"}', "\x00\x01", "[" * 30000]
    trace.close()
    _, out, _ = run(trace.write(tmp_path / "t"), capsys)
    assert "note: 9 lines of 11 damaged or not of a trace: 2, 3, 4, 5, 6, 7, 8, 9, 10\n" in out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("t", -1), ("t", None), ("t", "0"), ("t", True), ("t", 1.5), ("pid", -1), ("pid", 1 << 40), ("tid", []),
        ("device", -1), ("start", 1 << 64), ("end", 10**30), ("cookie", -1), ("result", 1 << 63), ("result", {}),
        ("site", 5), ("call", 1),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be(key: str, value: object) -> None:
    trace = opened().register(1).close()
    trace.lines[1] = json.dumps({**json.loads(trace.lines[1]), key: value})
    lines = parse.Lines(io.BytesIO("\n".join(trace.lines).encode()))
    assert len(list(lines)) == 2
    assert lines.garbage_lines == [2]


@pytest.mark.parametrize(
    "events",
    [5, [5], [[]], [["inval", 1]], [["inval", 1, 2, 3, 2]], [["inval", 1, 2, 3, []]], [["last"]], [["last", -1]],
     [["first", 1, 2, 3, 4]], [["last", 1], ["last", 2]], [["last", 1], ["inval", 1, 2, 3, 1]], [[{}, 1]]],
)  # fmt: skip
def test_events_that_cannot_be(events: object) -> None:
    trace = opened().read(events=events).close()
    lines = parse.Lines(io.BytesIO("\n".join(trace.lines).encode()))
    assert len(list(lines)) == 2
    assert lines.garbage_lines == [2]


def test_huge_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = (1 << 64) - 1
    trace = opened().register(top, 0, top, t=top).unregister(top, t=0)
    trace.lines.append(trace.lines[0].replace("1000000000000", "9" * 5000))
    status, out, err = run(trace.close().write(tmp_path / "t"), capsys)
    assert (status, err) == (0, "")
    assert f"cookie {top:#x}" in out
    assert "not of a trace: 4\n" in out


@pytest.mark.parametrize(
    "data", [b"\x7fELF" + bytes(1000), b"\0" * 200_000, b"hello\nworld\n", b"\n", b"a" * 70_000 + b"\n"]
)
def test_a_file_that_is_no_trace(data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t"
    path.write_bytes(data)
    status, out, err = run(path, capsys)
    assert (status, out) == (2, "")
    assert err.startswith(f"usermm trace: {path}: no line is one of a trace")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/urandom"])
def test_a_file_without_end_is_given_up(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Path(name), capsys)[0] == 2


@pytest.mark.parametrize("name", ["/no/such/file", "/", "a\0b"])
def test_a_file_that_cannot_be_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(Path(name), capsys)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1


def test_what_a_terminal_would_obey_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = opened().register(1, site="\x1b[2J\n\u202eevil\ud800").open(device=2, path="\x1b]0;x\x07")
    _, out, _ = run(trace.write(tmp_path / "t"), capsys)
    assert all(line.isprintable() for line in out.splitlines())
    assert r"\x1b[2J\n\u202eevil\ud800" in out


def _drained() -> Trace:
    trace = opened().mmap().register(1).register(2).notify(1).read(1).unregister(1).read(2)
    return trace.unregister(2).read(last=1).register(1).unregister(1).close()


def test_random_bytes_in_a_trace_do_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = random.Random(5)
    whole = "\n".join(_drained().lines).encode() + b"\n"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(source.randrange(1, 6)):
            data[source.randrange(len(data))] = source.randrange(256)
        path = tmp_path / "t"
        path.write_bytes(bytes(data))
        status, _, err = run(path, capsys)
        assert status in (0, 1)
        assert err == ""


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"", True),
        (opened().lines[0].encode(), True),
        (opened().lines[0].encode() + b"\nmore\n", True),
        (opened().lines[0].encode()[:20], True),
        (b'{"t":5', True),
        (b"\n", False),
        (b"hello", False),
        (b'{"t": 5}\n', False),
        (b"\x7fELF", False),
        (b"{}\n", False),
        (b'{"t":' + b"1" * 70_000 + b"\n", False),
    ],
)
def test_only_a_trace_may_be_replaced(data: bytes, answer: bool) -> None:
    assert parse.may_be_replaced(io.BytesIO(data)) is answer


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (0, "0 B"),
        (31, "31 B"),
        (4096, "4 KiB"),
        (5000, "4.9 KiB"),
        (-4096, "-4 KiB"),
        (3 << 30, "3 GiB"),
        (1536, "1.5 KiB"),
    ],
)
def test_sizes(length: int, text: str) -> None:
    assert reporter.size(length) == text
