"""As much of an ELF file as decides whether its loader can load a shared object into it. See elf(5)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
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
_PT_INTERP: Final = 3
_IDENT_BYTES: Final = 16
_LONGEST_PATH: Final = 4096  # PATH_MAX, the kernel's own limit for PT_INTERP
_MOST_SEGMENTS: Final = 1170  # 64 KiB of program headers of a 64-bit file, the kernel's own limit


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
    """`interpreter` is the path of the loader (PT_INTERP), or "" in a file that is loaded without one."""

    architecture: Architecture
    interpreter: str


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
    return Elf(architecture, _interpreter(file, order, bits, (offset, size, count)))


def _interpreter(file: BinaryIO, order: str, bits: int, table: tuple[int, int, int]) -> str:
    """The loader's path, from the program headers at `table`: offset, size of one, count."""
    offset, size, count = table
    # p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz; in 32-bit files the flags come later.
    entry = struct.Struct(order + ("IIQQQQ" if bits == 64 else "IIIII"))
    if count and (size < entry.size or count > _MOST_SEGMENTS):
        raise ElfError(f"the program header table has {count} entries of {size} bytes")
    headers = _at(file, offset, size * count)
    for index in range(count):
        fields = entry.unpack_from(headers, index * size)
        if fields[0] == _PT_INTERP:
            start, length = (fields[2], fields[5]) if bits == 64 else (fields[1], fields[4])
            if length > _LONGEST_PATH:
                raise ElfError(f"the path of the loader has {length} bytes")
            return _at(file, start, length).rstrip(b"\0").decode(errors="surrogateescape")
    return ""


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
