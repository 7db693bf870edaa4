"""As much of an ELF file as decides whether its loader can load another shared object into it. See elf(5)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import BinaryIO, Final

from usermm.errors import UsermmError

MAGIC: Final = b"\x7fELF"
CLASS_32: Final = 1
CLASS_64: Final = 2

MACHINES: Final = {
    3: "i386",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC 64",
    22: "S/390",
    40: "ARM",
    62: "x86-64",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
}
"""e_machine in words, for the machines that Linux runs on today."""

_LITTLE: Final = 1
_BIG: Final = 2
_PT_LOAD: Final = 1
_PT_DYNAMIC: Final = 2
_PT_INTERP: Final = 3
_DT_NULL: Final = 0
_DT_NEEDED: Final = 1
_DT_STRTAB: Final = 5
_IDENT_BYTES: Final = 16
_LONGEST_PATH: Final = 4096  # PATH_MAX, the kernel's own limit for PT_INTERP
_MOST_SEGMENTS: Final = 1170  # 64 KiB of program headers of a 64-bit file, the kernel's own limit
_MOST_DYNAMIC_BYTES: Final = 1 << 16  # some 30 entries are usual, and one for each library
_LONGEST_NAME: Final = 256  # NAME_MAX and a null byte


class ElfError(UsermmError, ValueError):
    """The file is no ELF file, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What two files must share before one can be loaded into the other."""

    bits: int
    little_endian: bool
    machine: int

    def __str__(self) -> str:
        order = "" if self.little_endian else " big-endian"
        return f"{self.bits}-bit {MACHINES.get(self.machine, f'machine {self.machine}')}{order}"


@dataclass(frozen=True, slots=True)
class Elf:
    """`interpreter` is the path of the loader (PT_INTERP), or "" in a file that is loaded without one.

    `needed` are the libraries it is linked with (DT_NEEDED), none when the list is damaged or unusually long.
    """

    architecture: Architecture
    interpreter: str
    needed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Segment:
    """A program header: `length` bytes of the file from `offset` on lie at `address`."""

    type: int
    offset: int
    address: int
    length: int


def read(file: BinaryIO) -> Elf:
    """The headers of an open file. Raises ElfError for what is no ELF file or contradicts itself."""
    ident = file.read(_IDENT_BYTES)
    if len(ident) < _IDENT_BYTES or not ident.startswith(MAGIC):
        raise ElfError("the file has no ELF header")
    bits = {CLASS_32: 32, CLASS_64: 64}.get(ident[4])
    order = {_LITTLE: "<", _BIG: ">"}.get(ident[5])
    if bits is None or order is None:
        raise ElfError(f"the ELF header has class {ident[4]} and byte order {ident[5]}, which nobody defined")
    # e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum
    header = struct.Struct(order + ("HHIQQQIHHH" if bits == 64 else "HHIIIIIHHH"))
    _, machine, _, _, offset, _, _, _, size, count = header.unpack(_exactly(file, header.size))
    architecture = Architecture(bits, order == "<", machine)
    segments = _segments(file, order, bits, (offset, size, count))
    try:
        needed = tuple(_needed(file, order, bits, segments))
    except ElfError:  # the loader judges that, and says more
        needed = ()
    return Elf(architecture, _interpreter(file, segments), needed)


def _segments(file: BinaryIO, order: str, bits: int, table: tuple[int, int, int]) -> list[_Segment]:
    """The program headers at `table`: offset, size of one, count."""
    offset, size, count = table
    # p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz; in 32-bit files the flags come later.
    entry = struct.Struct(order + ("IIQQQQ" if bits == 64 else "IIIII"))
    if count and (size < entry.size or count > _MOST_SEGMENTS):
        raise ElfError(f"the program header table has {count} entries of {size} bytes")
    headers = _at(file, offset, size * count)
    segments = []
    for index in range(count):
        fields = entry.unpack_from(headers, index * size)
        offset, address = fields[2:4] if bits == 64 else fields[1:3]
        segments.append(_Segment(fields[0], offset, address, fields[-1]))
    return segments


def _interpreter(file: BinaryIO, segments: list[_Segment]) -> str:
    for segment in segments:
        if segment.type == _PT_INTERP:
            if segment.length > _LONGEST_PATH:
                raise ElfError(f"the path of the loader has {segment.length} bytes")
            return _at(file, segment.offset, segment.length).rstrip(b"\0").decode(errors="surrogateescape")
    return ""


def _needed(file: BinaryIO, order: str, bits: int, segments: list[_Segment]) -> Iterator[str]:
    dynamic = next((segment for segment in segments if segment.type == _PT_DYNAMIC), None)
    if dynamic is None:
        return
    if dynamic.length > _MOST_DYNAMIC_BYTES:
        raise ElfError(f"the dynamic section has {dynamic.length} bytes")
    entry = struct.Struct(order + ("QQ" if bits == 64 else "II"))  # d_tag, d_un
    data = _at(file, dynamic.offset, dynamic.length // entry.size * entry.size)
    entries = list(takewhile(lambda pair: pair[0] != _DT_NULL, entry.iter_unpack(data)))
    table = next((value for tag, value in entries if tag == _DT_STRTAB), None)
    if table is None:
        return
    for tag, value in entries:
        if tag == _DT_NEEDED:
            start, room = _place(segments, table + value)
            name, _, _ = _at(file, start, min(room, _LONGEST_NAME)).partition(b"\0")
            yield name.decode(errors="surrogateescape")


def _place(segments: list[_Segment], address: int) -> tuple[int, int]:
    """Where in the file the byte at `address` is, and how many bytes of its segment are left there."""
    for segment in segments:
        distance = address - segment.address
        if segment.type == _PT_LOAD and 0 <= distance < segment.length:
            return segment.offset + distance, segment.length - distance
    raise ElfError(f"the dynamic section points to address {address:#x}, which no segment has")


def _at(file: BinaryIO, offset: int, length: int) -> bytes:
    try:
        file.seek(offset)
    except (OSError, OverflowError):
        raise ElfError(f"the ELF headers point to offset {offset:#x}, where no file goes") from None
    return _exactly(file, length)


def _exactly(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise ElfError("the file ends inside its ELF headers")
    return data
