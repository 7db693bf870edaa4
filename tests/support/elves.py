"""Programs of every kind for tests: compiled, of the system, or made up byte by byte."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from usermm.programs import elf

TRUE = Path(shutil.which("true") or "/bin/true").resolve()

_PROGRAM = "int main(void) { return 0; }\n"


def compiled(folder: Path, *options: str, compiler: str = "gcc") -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}: apt install {'musl-tools' if compiler == 'musl-gcc' else 'gcc libc6-dev'}")
    source, target = folder / "program.c", folder / "program"
    source.write_text(_PROGRAM)
    subprocess.run([compiler, *options, str(source), "-o", str(target)], check=True, capture_output=True)
    return target


def linked(folder: Path, name: str) -> Path:
    """A program that needs a library of that name, which is beside it and empty."""
    library = folder / "library.so"
    compiled(folder, "-shared", "-fPIC", f"-Wl,-soname,{name}").rename(library)
    return compiled(folder, "-Wl,--no-as-needed", str(library))


def elf32(order: str, machine: int, interpreter: bytes) -> bytes:
    """The least of a 32-bit program: a header, one program header, the loader's path."""
    ident = elf.MAGIC + bytes([elf.CLASS_32, 1 if order == "<" else 2, 1]) + bytes(9)
    header = struct.pack(order + "HHIIIIIHHHHHH", 2, machine, 1, 0, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    segment = struct.pack(order + "IIIIIIII", 3, 84, 0, 0, len(interpreter), len(interpreter), 4, 1)
    return ident + header + segment + interpreter
