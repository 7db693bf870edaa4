"""``usermm run``: the program takes its place, with everything that a parent, a terminal or a shell expects of it."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import TIMEOUT_S, command, environment, library, needs_preload, script, usermm
from support.elves import TRUE
from support.written import Trace

pytestmark = needs_preload


# The end of the program is the end of the command.


@pytest.mark.parametrize("status", [0, 1, 2, 3, 42, 77, 125, 126, 127, 128, 129, 130, 137, 143, 254, 255])
def test_the_exit_status_is_the_programs(status: int) -> None:
    done = usermm("run", "sh", "-c", f"exit {status}")
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.mark.parametrize("name", ["KILL", "TERM", "INT", "SEGV", "ABRT", "PIPE", "XFSZ", "USR1"])
def test_a_death_by_signal_is_one_for_the_parent(name: str) -> None:
    """PIPE and XFSZ: the interpreter ignores both, the program must not."""
    done = usermm("run", "sh", "-c", f"ulimit -c 0; kill -{name} $$")
    assert done.returncode == -getattr(signal, f"SIG{name}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_signals_reach_the_program(number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    text = f"trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.05; done"
    child = subprocess.Popen(command("run", "sh", "-c", text), env=environment(), stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        assert child.stdout.read() == f"got {name}\n"
        assert child.wait(20) == 9


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup."""
    inner = " ".join(command("run", "sh", "-c", "'kill -HUP $$; echo alive'"))
    text = f"trap '' HUP; exec {inner}"
    done = subprocess.run(
        ["sh", "-c", text], env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_the_terminal_is_the_programs() -> None:
    """Ctrl-C typed at it is the program's, and so is the terminal itself."""
    terminal, side = os.openpty()
    text = "trap 'echo got it; exit 9' INT; test -t 0 && test -t 1 && echo ready; while :; do sleep 0.05; done"
    # A session's first process that opens a terminal gets it as its own.
    words = ["sh", "-c", f'exec <>{os.ttyname(side)} >&0 2>&0; exec "$@"', "sh", *command("run", "sh", "-c", text)]
    with subprocess.Popen(words, env=environment(), start_new_session=True) as child:
        try:
            with open(terminal, "rb", buffering=0) as screen:
                assert screen.readline() == b"ready\r\n"
                os.write(terminal, b"\x03")
                assert screen.readline().endswith(b"got it\r\n")  # the echo before it may be lost
                assert child.wait(20) == 9
        finally:
            child.kill()
            os.close(side)


def test_the_process_is_the_same() -> None:
    with subprocess.Popen(
        command("run", "sh", "-c", "echo $$ $PPID"), env=environment(), stdout=subprocess.PIPE
    ) as child:
        output, _ = child.communicate(timeout=TIMEOUT_S)
    assert output.split() == [str(child.pid).encode(), str(os.getpid()).encode()]


# What goes in and out.


def test_input_and_output_are_untouched() -> None:
    data = random.Random(1).randbytes(1 << 20)
    done = usermm("run", "cat", input=data)
    assert (done.returncode, done.stderr) == (0, b"")
    assert bytes(done.stdout) == data


def test_what_is_read_is_left_for_the_program() -> None:
    """The command reads nothing of its input itself."""
    done = usermm("run", "sh", "-c", "read a; cat; echo $a >&2", input="one\ntwo\n")
    assert (done.stdout, done.stderr) == ("two\n", "one\n")


@pytest.mark.parametrize("separator", [[], ["--"]])
@pytest.mark.parametrize(
    "arguments",
    [
        ["a b", "", " ", "it's", '"', "\\", "$HOME", "*"],
        ["--help"],
        ["-h"],
        ["--", "x", "--", "--"],
        ["--trace", "no", "--trace=no", "--version", "--tr"],
        ["-\n-", "\udcff\udcfe"],
    ],
)
def test_arguments_are_the_programs(separator: list[str], arguments: list[str]) -> None:
    done = usermm("run", *separator, "printf", "%s\\0", "begin", *arguments, text=False)
    assert done.stdout == b"".join(os.fsencode(word) + b"\0" for word in ["begin", *arguments])


def test_options_stand_before_the_program(tmp_path: Path) -> None:
    for options in (["--trace", tmp_path / "t"], ["--trace", tmp_path / "t", "--"], [f"--trace={tmp_path / 't'}"]):
        done = usermm("run", *options, "sh", "-c", "echo $USERMM_TRACE $1", "sh", "--trace")
        assert (done.stdout, done.stderr) == (f"{tmp_path / 't'} --trace\n", "")


def test_the_name_of_the_program_is_what_was_typed(tmp_path: Path) -> None:
    script(tmp_path / "tool", "#!/bin/sh\necho $0\n")
    where = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert usermm("run", "tool", env=where).stdout == f"{tmp_path / 'tool'}\n"
    done = usermm("run", sys.executable, "-c", "import sys; print(sys.orig_argv[0])")
    assert done.stdout == f"{sys.executable}\n"


def test_descriptors_pass(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        done = usermm("run", "sh", "-c", f"echo hello > /dev/fd/{file.fileno()}", pass_fds=(file.fileno(),))
        assert done.returncode == 0, done.stderr
        assert file.read() == b"hello\n"


# The environment.


def test_the_environment_is_only_added_to() -> None:
    """Also in the C locale, where the interpreter sets LC_CTYPE for itself."""
    given = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": environment()["PYTHONPATH"],
        "A": "b c",
        "EMPTY": "",
        "X": "\udcff",
    }
    done = usermm("run", "env", "-0", env=given, text=False)
    lines = [line for line in done.stdout.split(b"\0") if line]
    expected = [os.fsencode(f"{name}={value}") for name, value in {**given, "LD_PRELOAD": library()}.items()]
    assert sorted(lines) == sorted(expected)


def test_an_lc_ctype_that_was_given_stays() -> None:
    for given in ("C", "C.UTF-8", ""):
        done = usermm("run", "sh", "-c", "echo $LC_CTYPE", env=environment(LC_CTYPE=given))
        assert done.stdout == f"{given}\n"


def test_the_library_stands_before_others() -> None:
    """libm stands for any other library that is preloaded."""
    done = usermm("run", "sh", "-c", "echo $LD_PRELOAD", env=environment(LD_PRELOAD="libm.so.6 libdl.so.2"))
    assert done.stdout == f"{library()}:libm.so.6:libdl.so.2\n"


def test_run_within_run_adds_it_once() -> None:
    done = usermm("run", *command("run", "sh", "-c", "echo $LD_PRELOAD"))
    assert (done.stdout, done.stderr) == (f"{library()}\n", "")


def test_grandchildren_inherit_it(tmp_path: Path) -> None:
    text = "sh -c 'sh -c \"cat /proc/self/maps\"; echo $USERMM_TRACE'"
    done = usermm("run", "--trace", tmp_path / "t", "sh", "-c", text)
    assert library() in done.stdout  # mapped into cat
    assert done.stdout.endswith(f"{tmp_path / 't'}\n")


# Programs that are found, and that are not.


def test_the_program_is_searched_in_path(tmp_path: Path) -> None:
    script(tmp_path / "a tool", "#!/bin/sh\necho found $1\n")
    done = usermm("run", "a tool", "x", env=environment(PATH=f"/nowhere:{tmp_path}:{os.environ['PATH']}"))
    assert (done.returncode, done.stdout) == (0, "found x\n")


@pytest.mark.parametrize(
    ("name", "status"),
    [("no-such-program", 127), ("/no/such", 127), ("", 127), ("/etc/passwd", 126), ("/tmp", 126), ("/dev/null", 126)],
)
def test_what_cannot_be_started_is_one_line(name: str, status: int) -> None:
    done = usermm("run", "--", name)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("usermm run: ")
    assert done.stderr.count("\n") == 1


def test_an_environment_that_grows_too_long() -> None:
    """The kernel takes 32 pages for one variable."""
    room = 32 * os.sysconf("SC_PAGE_SIZE") - len("LD_PRELOAD=") - 1
    before = ":".join(["libm.so.6"] * (room // 10)).ljust(room, ":")
    done = usermm("run", TRUE, env=environment(LD_PRELOAD=before))
    assert (done.returncode, done.stderr) == (
        126,
        f"usermm run: {TRUE} cannot be executed: {os.strerror(errno.E2BIG)}\n",
    )


def test_without_a_program() -> None:
    for arguments in ([], ["--"], ["--trace", "x"]):
        done = usermm("run", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("usermm run: PROGRAM is missing")


@pytest.mark.parametrize("options", [["--bogus"], ["--trace"], ["-x", "--bogus"]])
def test_wrong_options_are_one_line_that_helps(options: list[str]) -> None:
    done = usermm("run", *options, *([] if options == ["--trace"] else ["echo", "started"]))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("usermm run: ")
    assert options[-1] in done.stderr
    assert "usermm run [-h] [--trace FILE] [--] PROGRAM [ARGS ...]" in done.stderr


@pytest.mark.parametrize("words", [[], ["bogus"], ["--bogus"], ["trace"], ["doctor", "x"], ["trace", "--no", "x"]])
def test_wrong_arguments_of_any_verb_are_one_line(words: list[str]) -> None:
    done = usermm(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert " --help` says more" in done.stderr


def test_scripts(tmp_path: Path) -> None:
    for first_line in ("#!/bin/sh", "#!/usr/bin/env sh", "#! /usr/bin/env -S sh -u", ""):
        path = script(tmp_path / "script", f"{first_line}\necho $1; cat /proc/$$/maps | grep -c preload\nexit 5\n")
        done = usermm("run", path, "a  b")
        assert done.returncode == 5
        assert done.stdout.startswith("a  b\n" if '"' in first_line else "a b\n")
        assert done.stderr == ""
        assert int(done.stdout.splitlines()[1]) > 0


def test_a_script_whose_interpreter_is_missing_names_it(tmp_path: Path) -> None:
    done = usermm("run", script(tmp_path / "script", "#!/no/shell\n"))
    assert done.returncode == 127
    assert done.stderr == f"usermm run: {tmp_path / 'script'} needs /no/shell, which is not there: install that\n"


# The trace's file.


def test_a_trace_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    before = Trace().open().close().write(tmp_path / "trace")
    assert usermm("run", "--trace", before, TRUE).returncode == 0
    assert before.read_bytes() == b""
    other = tmp_path / "letter"
    other.write_text("Dear reader\n")
    done = usermm("run", "--trace", other, "echo", "started")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"usermm run: --trace {other}: it is no trace and is kept: give another file, or remove it\n"
    )
    assert other.read_text() == "Dear reader\n"


@pytest.mark.parametrize("name", ["/no/such/folder/trace", "/tmp", "", "/proc/self/trace"])
def test_a_trace_that_cannot_be_written_is_said_before_the_start(name: str) -> None:
    done = usermm("run", "--trace", name, "echo", "started")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"usermm run: --trace {name}: ")
    assert done.stderr.count("\n") == 1


def test_the_traces_path_is_made_absolute(tmp_path: Path) -> None:
    done = usermm("run", "--trace", "t", "sh", "-c", "cd /; echo $USERMM_TRACE", cwd=tmp_path)
    assert done.stdout == f"{tmp_path / 't'}\n"
    assert (tmp_path / "t").read_bytes() == b""


def test_a_trace_may_be_a_pipe_or_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), Path("/dev/stderr")):
        done = usermm("run", "--trace", path, TRUE)
        assert (done.returncode, done.stderr) == (0, "")


def test_no_trace_is_left_when_the_program_is_not_found(tmp_path: Path) -> None:
    assert usermm("run", "--trace", tmp_path / "t", "no-such-program").returncode == 127
    assert not (tmp_path / "t").exists()
