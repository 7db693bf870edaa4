"""Whole programs under the preload library: in several languages, with other preloads, and such as never use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import compiled
from support.preload import LIBRARY, needs_preload, optional_library, run, run_well, tool

PRELOAD = compiled.NATIVE / "preload"

pytestmark = needs_preload


def built(compiler: str, package: str, tmp_path: Path, *words: str) -> Path:
    """What `compiler WORDS -o TARGET` makes; $TARGET is a file in tmp_path."""
    target = tmp_path / "program"
    done = subprocess.run([tool(compiler, package), *words, "-o", target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.program("preload/caller", tmp_path_factory.mktemp("caller"))


def test_short_client_a_hundred_times(tmp_path: Path) -> None:
    """Opens, registers, unmaps, reads, and ends with the device open."""
    client = compiled.program("short_client", tmp_path)
    for _ in range(100):
        assert run_well([client], timeout_s=20) == "ok\n"


@pytest.mark.parametrize("name", ["caller", "own_malloc", "early"])
def test_c(name: str, tmp_path: Path) -> None:
    """Threads; a malloc of its own that uses the device; constructors, destructors and atexit."""
    assert run_well([compiled.program(f"preload/{name}", tmp_path)]) == "ok\n"


def test_cpp(tmp_path: Path) -> None:
    program = built("g++", "g++", tmp_path, "-Wall", "-Wextra", "-Werror", "-pthread", str(PRELOAD / "caller.cc"))
    assert run_well([program]) == "ok\n"


def test_fortran(tmp_path: Path) -> None:
    program = built("gfortran", "gfortran", tmp_path, "-Wall", "-Werror", str(PRELOAD / "caller.f90"))
    assert run_well([program]) == "ok\n"


def test_go(tmp_path: Path) -> None:
    """With cgo, so that libc makes the calls; Go's own memory management makes its system calls by itself."""
    go = tool("go", "golang-go")
    environment = {**os.environ, "GOCACHE": str(tmp_path / "cache"), "CGO_ENABLED": "1", "GO111MODULE": "off"}
    words = [go, "build", "-o", str(tmp_path / "program"), str(PRELOAD / "caller.go")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert run_well([tmp_path / "program"]) == "ok\n"


def test_libev(tmp_path: Path) -> None:
    """Its event loop by epoll, poll and select."""
    if not Path("/usr/include/ev.h").exists():
        pytest.skip("needs ev.h: apt install libev-dev")
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-DWITH_LIBEV"]
    program = built("gcc", "gcc", tmp_path, *flags, str(PRELOAD / "readiness.c"), "-lev")
    assert run_well([program, "libev"]) == ""


@pytest.mark.parametrize("first", [True, False])
def test_another_preloaded_library_that_uses_it_in_its_constructor(first: bool, tmp_path: Path) -> None:
    other = tmp_path / "early_library.so"
    flags = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-shared", "-fPIC", str(PRELOAD / "early_library.c"), "-o", str(other))
    subprocess.run([tool("gcc", "gcc"), *flags], check=True)
    order = [str(other), str(LIBRARY)] if first else [str(LIBRARY), str(other)]
    assert run_well(["/bin/true"], library=":".join(order)) == "ok\n"


@pytest.mark.parametrize("first", [True, False])
def test_jemalloc(caller: Path, first: bool) -> None:
    jemalloc = optional_library("libjemalloc.so.2", "libjemalloc2")
    order = [jemalloc, str(LIBRARY)] if first else [str(LIBRARY), jemalloc]
    assert run_well([caller], library=":".join(order)) == "ok\n"


@pytest.mark.parametrize("linked", ["-shared-libasan", "-static-libasan"])
def test_address_sanitizer(linked: str, tmp_path: Path) -> None:
    """libasan wants to be the first of the preloaded libraries, whatever the others are."""
    library = optional_library("libasan.so", "libgcc-12-dev")
    flags = ["-fsanitize=address", *([linked] if linked == "-static-libasan" else [])]
    program = compiled.program("preload/caller", tmp_path, *flags)
    order = f"{library}:{LIBRARY}" if linked == "-shared-libasan" else str(LIBRARY)
    assert run_well([program], library=order, ASAN_OPTIONS="detect_leaks=1") == "ok\n"


def test_thread_sanitizer(tmp_path: Path) -> None:
    library = optional_library("libtsan.so", "libgcc-12-dev")
    program = compiled.program("preload/caller", tmp_path, "-fsanitize=thread")
    assert run_well([program], library=f"{library}:{LIBRARY}") == "ok\n"


def test_fakeroot(caller: Path) -> None:
    """It puts its own library in front of ours, and wraps the stat family."""
    assert run_well([tool("fakeroot", "fakeroot"), caller]) == "ok\n"


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (["/bin/true"], ""),
        (["/bin/sh", "-c", "cat /dev/null; (echo a; echo b) | sort -r"], "b\na\n"),
        (
            [sys.executable, "-c", "import subprocess as s; print(s.run(['echo', 'x'], capture_output=True).stdout)"],
            None,
        ),
        (["/bin/ls", "/dev/null"], "/dev/null\n"),
        (["/usr/bin/env", "sh", "-c", "find / -maxdepth 1 -name proc"], "/proc\n"),
    ],
)
def test_programs_that_never_use_it(command: list[str], output: str | None) -> None:
    """The same as without, in every child that inherits the variable."""
    plain = run(command, preloaded=False)
    done = run(command)
    assert (done.returncode, done.stdout, done.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert output is None or done.stdout == output


def test_a_program_that_never_uses_it_gets_nothing_of_it() -> None:
    """No thread, no descriptor, no file."""
    text = "import os; print(len(os.listdir('/proc/self/task')), sorted(os.listdir('/proc/self/fd')))"
    command = [sys.executable, "-c", text]
    assert run_well(command) == run(command, preloaded=False).stdout


def test_a_library_that_is_not_there_is_the_loaders_affair() -> None:
    done = run(["/bin/true"], library="/nonexistent/libusermm-preload.so")
    assert done.returncode == 0
    assert "cannot be preloaded" in done.stderr
