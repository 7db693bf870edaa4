"""``usermm demo`` for real: its figures, its words, its exit status, and what it leaves behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from usermm import Ummunotify, UnavailableError
from usermm.uring import Ring

DEMO = ("-m", "usermm", "demo")
FIGURES = {"reads", "wrong_reads", "registrations", "hits", "pinned_bytes_max"}
ANOTHER_USER = 61234

# Change something, then run the command line in that process: python -c PATCHED CHANGE ARGUMENTS...
PATCHED = "import sys; exec(sys.argv[1]); from usermm.__main__ import main; sys.exit(main(sys.argv[2:]))"


# Before a buffer is unmapped its watch is taken off, behind the back of the cache.
UNSEEN = """
import fcntl, os
from usermm.demonstration.workbench import Buffer
from usermm.uapi.userfaultfd import RANGE, UFFDIO_UNREGISTER

def is_userfaultfd(number):
    try:
        return os.readlink(f"/proc/self/fd/{number}") == "anon_inode:[userfaultfd]"
    except FileNotFoundError:  # the directory's own descriptor, closed again
        return False

def close_unseen(buffer, close=Buffer.close):
    for number in [] if buffer.memory.closed else filter(is_userfaultfd, map(int, os.listdir("/proc/self/fd"))):
        fcntl.ioctl(number, UFFDIO_UNREGISTER, RANGE.pack(buffer.address, buffer.length))
    close(buffer)

Buffer.close = close_unseen
"""


def available() -> str:
    """Why the demo cannot run here; empty when it can."""
    try:
        Ring(1).close()
        Ummunotify().close()
    except UnavailableError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(available()), reason=f"needs io_uring and userfaultfd: {available()}")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def patched(change: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-c", PATCHED, change, "demo", *arguments)


def assert_one_line(result: subprocess.CompletedProcess[str], words: Sequence[str]) -> None:
    """Exit status 2, nothing shown, and one line on stderr that has all `words`."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("usermm demo: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_json_tells_the_hazard_and_the_cure() -> None:
    result = python(*DEMO, "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    figures = json.loads(result.stdout)
    assert set(figures) == {"by_hand", "usermm"}
    for half in figures.values():
        assert set(half) == FIGURES
        assert all(type(value) is int for value in half.values())
        assert half["reads"] >= 1500
        assert half["registrations"] + half["hits"] == half["reads"]
        assert half["pinned_bytes_max"] > 0
    assert figures["by_hand"]["wrong_reads"] > 0
    assert figures["usermm"]["wrong_reads"] == 0
    assert figures["usermm"]["pinned_bytes_max"] < figures["by_hand"]["pinned_bytes_max"]


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_every_random_sequence_shows_it(seed: int) -> None:
    result = python(*DEMO, "--json", "--reads", "400", "--seed", str(seed))
    figures = json.loads(result.stdout)
    assert figures["by_hand"]["wrong_reads"] > 0
    assert figures["usermm"]["wrong_reads"] == 0
    assert figures["usermm"]["hits"] > 0


def test_the_words_name_the_bug_and_end_with_the_table() -> None:
    result = python(*DEMO, "--reads", "300")
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert text.count("WRONG, and no error anywhere") == 1
    assert 'The buffer says "my own old bytes"' in text
    assert 'The buffer says "sector 00002000"' in text
    assert "\r" not in text
    *_, header, by_hand, usermm = text.splitlines()
    assert header.split() == ["reads", "wrong", "reads", "registrations", "hits", "pinned", "bytes", "(max)"]
    assert by_hand.split()[:3] == ["by", "hand", "300"]
    assert usermm.split()[:3] == ["usermm", "300", "0"]


def test_a_terminal_gets_a_counter_that_moves() -> None:
    main_end, terminal = pty.openpty()
    with subprocess.Popen([sys.executable, *DEMO, "--reads", "60"], stdout=terminal) as process:
        os.close(terminal)
        shown = b""
        try:
            while block := os.read(main_end, 65536):
                shown += block
        except OSError:  # EIO: the other end was closed
            pass
    os.close(main_end)
    assert process.returncode == 0
    assert b"\r  usermm        50 of 60 reads" in shown


def test_without_notifications_the_second_half_reads_wrong_too() -> None:
    """The zero is measured: keep the kernel from telling of an unmapping, and the exit status says so."""
    result = patched(UNSEEN, "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["usermm"]["wrong_reads"] > 0


def test_a_kernel_without_io_uring_gets_one_line() -> None:
    change = "import usermm.uapi.io_uring as abi; abi.SYS_IO_URING_SETUP = 0x7FFFFFF0"
    for arguments in ((), ("--json",)):
        assert_one_line(patched(change, *arguments), ("io_uring_setup", "CONFIG_IO_URING"))


def test_a_forbidden_io_uring_gets_one_line_with_the_cure() -> None:
    change = "import usermm.uring as uring; uring.syscall = lambda *arguments: -1"
    result = patched(change)
    assert_one_line(result, ("io_uring_setup", "not permitted"))
    assert "seccomp" in result.stderr or "kernel.io_uring_disabled=0" in result.stderr


def test_a_forbidden_userfaultfd_gets_one_line_with_the_cure() -> None:
    change = (
        "import usermm.demonstration.caches as caches; from usermm.errors import from_errno\n"
        "def refuse(registrar): raise from_errno(1, 'userfaultfd: not permitted; see usermm doctor')\n"
        "caches.RegistrationCache = refuse"
    )
    assert_one_line(patched(change), ("userfaultfd", "usermm doctor"))


def test_a_directory_that_cannot_be_written_gets_one_line(tmp_path: Path) -> None:
    result = python(*DEMO, "--directory", str(tmp_path / "none"))
    assert_one_line(result, (str(tmp_path / "none"), "--directory"))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become a user whose pins are limited")
def test_an_unprivileged_user_gets_smaller_buffers_or_one_line() -> None:
    """8 MiB (the kernel's default since 5.16) are enough for smaller buffers, 64 KiB (before) are not."""
    change = (
        "import encodings.ascii, os, resource, usermm.commands.demo\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, ({0}, {0}))\n"
        f"os.setgroups([]); os.setgid({ANOTHER_USER}); os.setuid({ANOTHER_USER})"
    )
    result = patched(change.format(8 << 20), "--json", "--reads", "300")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["by_hand"]["wrong_reads"] > 0
    assert 0 < figures["by_hand"]["pinned_bytes_max"] <= 8 << 20
    assert_one_line(patched(change.format(64 << 10)), ("ulimit -l",))


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-u", *DEMO, "--reads", "1000000", "--directory", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("Now 1000000 reads"):
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read().strip() == "usermm demo: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen([sys.executable, *DEMO], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_wrong_arguments_are_told_by_argparse() -> None:
    for arguments in (("--reads", "0"), ("--reads", "many"), ("--seed", "x"), ("--bogus",)):
        result = python(*DEMO, *arguments)
        assert result.returncode == 2
        assert "usage: usermm" in result.stderr
