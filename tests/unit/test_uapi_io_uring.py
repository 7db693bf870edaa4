"""Numbers and layouts of `usermm.uapi.io_uring` are those of the system's own header."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from usermm.uapi import io_uring as abi

HEADER = Path("/usr/include/linux/io_uring.h")
COMPILER = shutil.which("cc") or shutil.which("gcc")

CONSTANTS = (
    "IORING_OFF_SQ_RING",
    "IORING_OFF_SQES",
    "IORING_FEAT_SINGLE_MMAP",
    "IORING_ENTER_GETEVENTS",
    "IORING_UNREGISTER_BUFFERS",
    "IORING_REGISTER_BUFFERS2",
    "IORING_REGISTER_BUFFERS_UPDATE",
    "IORING_RSRC_REGISTER_SPARSE",
    "IORING_OP_READ_FIXED",
)
SIZES = {
    "struct io_uring_sqe": abi.SQE.size,
    "struct io_uring_cqe": abi.CQE.size,
    "struct io_uring_rsrc_register": abi.RSRC_REGISTER.size,
    "struct io_uring_rsrc_update2": abi.RSRC_UPDATE2.size,
    "struct iovec": abi.IOVEC.size,
    "struct io_uring_params": ctypes.sizeof(abi.Params),
}
OFFSETS = {
    "struct io_uring_sqe": {"fd": 4, "off": 8, "addr": 16, "len": 24, "user_data": 32, "buf_index": 40},
    "struct io_uring_cqe": {"user_data": 0, "res": 8, "flags": 12},
    "struct io_uring_rsrc_register": {"nr": 0, "flags": 4, "data": 16, "tags": 24},
    "struct io_uring_rsrc_update2": {"offset": 0, "data": 8, "tags": 16, "nr": 24},
    "struct io_uring_params": {
        "features": abi.Params.features.offset,
        "sq_off": abi.Params.sq_off.offset,
        "cq_off": abi.Params.cq_off.offset,
        "sq_off.array": abi.Params.sq_off.offset + abi.SqringOffsets.array.offset,
        "cq_off.cqes": abi.Params.cq_off.offset + abi.CqringOffsets.cqes.offset,
    },
}

pytestmark = pytest.mark.skipif(
    not HEADER.exists() or COMPILER is None, reason="needs a C compiler and linux-libc-dev (linux/io_uring.h)"
)


def expected() -> dict[str, int]:
    """What the C program below should print, by the expression that it prints."""
    values = {name: int(getattr(abi, name)) for name in CONSTANTS}
    values |= {name: getattr(abi, name) for name in ("SYS_IO_URING_SETUP", "SYS_IO_URING_REGISTER")}
    values |= {f"sizeof({name})": size for name, size in SIZES.items()}
    for name, fields in OFFSETS.items():
        values |= {f"offsetof({name}, {field})": at for field, at in fields.items()}
    return values


def test_the_header_of_this_system_agrees(tmp_path: Path) -> None:
    """One C program prints the header's values of everything that the module repeats."""
    lines = "\n".join(f'    printf("{text}=%llu\\n", (unsigned long long)({text}));' for text in expected())
    source = tmp_path / "values.c"
    source.write_text(
        "#include <linux/io_uring.h>\n#include <stddef.h>\n#include <stdio.h>\n#include <sys/uio.h>\n"
        "#include <sys/syscall.h>\n#define SYS_IO_URING_SETUP __NR_io_uring_setup\n"
        f"#define SYS_IO_URING_REGISTER __NR_io_uring_register\nint main(void)\n{{\n{lines}\n}}\n"
    )
    program = tmp_path / "values"
    subprocess.run([str(COMPILER), "-o", str(program), str(source)], check=True)
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in (line.rsplit("=", 1) for line in output.splitlines())}
    assert found == expected()
