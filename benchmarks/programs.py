"""The C programs, built when a run begins, and processes that measure a round when they are asked."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(__file__).resolve().parent / "c"
PROGRAMS = ("munmap", "register", "notifications", "rcache", "clean")
PARTS = ("bare", "ucx_rcache")
"""Linked to each of them."""
COMPILER = "gcc"
# As setup.py builds the extension, so that the library is the one that Python users run.
FLAGS = ("-std=c11", "-O2", "-flto", "-fPIC", "-fno-plt", "-fvisibility=hidden", "-pthread")


class BenchmarkError(Exception):
    """Something that a run needs is missing here; the message is one line for whoever started it."""


class Programs:
    """What was built, in a folder of the caller's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        library = sorted((ROOT / "libusermm" / "src").glob("*.c"))
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda source: _compile("-c", source, "-o", folder / f"{source.stem}.o"), library))
            for part in PARTS:
                _compile("-D_GNU_SOURCE", "-c", SOURCES / f"{part}.c", "-o", folder / f"{part}.o")
            objects = [folder / f"{name}.o" for name in (*(source.stem for source in library), *PARTS)]
            list(pool.map(lambda name: self._link(name, objects), PROGRAMS))
            self._link("calls", objects, "-shared")

    def _link(self, name: str, objects: Sequence[Path], *flags: str) -> None:
        _compile("-D_GNU_SOURCE", *flags, SOURCES / f"{name}.c", *objects, "-o", self.folder / name)

    def path(self, name: str) -> Path:
        """The program or, for "calls", the shared object."""
        return self.folder / name


def _compile(*arguments: str | Path) -> None:
    try:
        command = [COMPILER, *FLAGS, f"-I{ROOT}/libusermm/include", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BenchmarkError(f"{COMPILER} is missing: apt install gcc libc6-dev") from None
    if done.returncode:
        raise BenchmarkError(f"{COMPILER} failed: {done.stderr.strip()}")


class Worker:
    """A process that measures one round for each line it gets, and sleeps in between."""

    def __init__(self, *command: str | Path) -> None:
        self._command = [str(word) for word in command]
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    @classmethod
    def python(cls, module: str, *arguments: str) -> Self:
        """The same of a module of ours, run by this interpreter."""
        return cls(sys.executable, "-m", module, *arguments)

    def round(self, operations: int) -> list[float]:
        """The figures of one round."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # it ended: the empty answer says so
            print(operations, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError(f"{' '.join(self._command)} ended with status {self._process.wait()}")
        return [float(word) for word in line.split()]

    def subject(self, operations: int) -> Callable[[], list[float]]:
        """What `interleave` calls once a round."""
        return lambda: self.round(operations)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
