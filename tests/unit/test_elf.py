"""ELF headers of real files, of files that were patched, and of damaged ones."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
from pathlib import Path

import pytest
from support.elves import TRUE, compiled, elf32, linked

from usermm.programs import elf
from usermm.programs.elf import Architecture, Elf, ElfError

_MACHINE = {"x86_64": 62, "aarch64": 183, "riscv64": 243}.get(os.uname().machine)


def read(path: str | Path) -> Elf:
    with open(path, "rb") as file:
        return elf.read(file)


def parse(data: bytes) -> Elf:
    return elf.read(io.BytesIO(data))


@pytest.mark.parametrize("path", [TRUE, Path(sys.executable).resolve(), Path("/proc/self/exe")], ids=str)
def test_a_program_of_this_machine(path: Path) -> None:
    found = read(path)
    assert os.path.exists(found.interpreter)
    assert found.architecture.bits == struct.calcsize("P") * 8
    assert found.architecture.little_endian == (sys.byteorder == "little")
    assert _MACHINE in (None, found.architecture.machine)


@pytest.mark.parametrize("option", ["-static", "-static-pie"])
def test_a_static_program_has_no_loader(option: str, tmp_path: Path) -> None:
    found = read(compiled(tmp_path, option))
    assert found.interpreter == ""
    assert found.architecture == read(TRUE).architecture


def test_a_dynamic_program_has_one(tmp_path: Path) -> None:
    assert read(compiled(tmp_path)).interpreter == read(TRUE).interpreter


def test_musl(tmp_path: Path) -> None:
    found = read(compiled(tmp_path, compiler="musl-gcc"))
    assert os.path.basename(found.interpreter).startswith("ld-musl-")


def test_the_libraries_it_needs(tmp_path: Path) -> None:
    assert read(linked(tmp_path, "libasan.so.8")).needed == ("libasan.so.8", *read(compiled(tmp_path)).needed)
    assert read(compiled(tmp_path, "-static")).needed == ()


def test_a_damaged_list_of_libraries_is_none(tmp_path: Path) -> None:
    """Whatever is there; the headers before it say enough."""
    path = compiled(tmp_path)
    whole = path.read_bytes()
    found = read(path)
    assert found.needed
    (offset,) = struct.unpack_from("@Q", whole, whole.index(struct.pack("@IIQ", 2, 6, 0)[:8]) + 8)
    for index in range(offset, offset + 256):
        for value in (0, 1, 0x7F, 0xFF):
            damaged = parse(whole[:index] + bytes([value]) + whole[index + 1 :])
            assert (damaged.architecture, damaged.interpreter) == (found.architecture, found.interpreter)
    assert parse(whole[: offset + 10]).needed == ()


@pytest.mark.parametrize(
    ("order", "machine", "text"),
    [
        ("<", 3, "32-bit i386"),
        ("<", 40, "32-bit ARM"),
        (">", 8, "32-bit MIPS big-endian"),
        ("<", 9999, "32-bit machine 9999"),
    ],
)
def test_a_32_bit_program_of_another_machine(order: str, machine: int, text: str) -> None:
    found = parse(elf32(order, machine, b"/lib/ld-linux.so.2\0"))
    assert found == Elf(Architecture(32, order == "<", machine), "/lib/ld-linux.so.2")
    assert str(found.architecture) == text


def test_the_machine_is_read_from_the_header() -> None:
    data = bytearray(TRUE.read_bytes())
    data[18:20] = (183 if _MACHINE != 183 else 62).to_bytes(2, sys.byteorder)
    assert parse(bytes(data)).architecture.machine == (183 if _MACHINE != 183 else 62)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no ELF header"),
        (b"\x7fELF", "no ELF header"),
        (b"#!/bin/sh\n" + bytes(100), "no ELF header"),
        (elf.MAGIC + bytes([3, 1]) + bytes(100), "class 3"),
        (elf.MAGIC + bytes([2, 0]) + bytes(100), "byte order 0"),
        (elf.MAGIC + bytes([2, 1]) + bytes(10), "ends inside"),
        (elf32("<", 3, b"/lib/ld.so\0")[:60], "ends inside"),
        (elf32("<", 3, b"/lib/ld.so\0")[:-3], "ends inside"),
        (elf32("<", 3, b"/" * 5000), "path of the loader"),
    ],
)
def test_damaged_headers(data: bytes, problem: str) -> None:
    with pytest.raises(ElfError, match=problem):
        parse(data)


@pytest.mark.parametrize("offset", [(1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_headers_that_point_nowhere(offset: int) -> None:
    data = bytearray(elf.MAGIC + bytes([elf.CLASS_64, 1]) + bytes(10))
    data += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, offset, 0, 0, 64, 56, 1, 0, 0, 0)
    with pytest.raises(ElfError):
        parse(bytes(data))


@pytest.mark.parametrize(("size", "count"), [(1, 1), (56, 65535), (65535, 65535)])
def test_a_table_that_cannot_be(size: int, count: int) -> None:
    data = bytearray(elf.MAGIC + bytes([elf.CLASS_64, 1]) + bytes(10))
    data += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, size, count, 0, 0, 0)
    with pytest.raises(ElfError, match="program header table"):
        parse(bytes(data))


def test_every_byte_of_the_headers_may_be_wrong() -> None:
    """Nothing but ElfError comes out, whatever byte of a real file is changed, or wherever it ends."""
    head = TRUE.read_bytes()[:1024]
    for index in range(len(head)):
        for value in (0, 0xFF):
            damaged = head[:index] + bytes([value]) + head[index + 1 :]
            for data in (damaged, head[:index]):
                with contextlib.suppress(ElfError):
                    parse(data)
