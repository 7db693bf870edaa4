"""UCX's registration cache (ucs_rcache of libucs) by ctypes, over functions of UCX's own that do nothing.

The cache is not in UCX's public interface: layouts and calls are those of UCX 1.22 on 64-bit machines (DWARF of the
wheel libucx-cu12 1.22.0), and any other version is refused. Loaded here, UCX patches no libc and learns of no lost
memory by itself: `invalidate` tells it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

VERSION: Final = (1, 22)
ADVICE: Final = "pip install libucx-cu12==1.22.0"

_PAGE: Final = 4096
_READ_WRITE: Final = 3  # PROT_READ | PROT_WRITE
_VM_UNMAPPED: Final = 0x20000  # UCM_EVENT_VM_UNMAPPED
_NEED_LRU_LOCK: Final = 0x8  # UCS_RCACHE_FLAG_NEED_LRU_LOCK
_IN_USE: Final = 3  # UCS_RCACHE_REGION_FLAG_REGISTERED, _PGTABLE
_EVENT_PRIORITY: Final = 1000
_WITHOUT: Final = 2**64 - 1  # a limit that is none

# For the library's constructor, which otherwise patches munmap, mmap, brk and others in libc, and handles SIGHUP.
_ENVIRONMENT: Final = {
    "UCX_MEM_MMAP_HOOK_MODE": "none",
    "UCX_MEM_MALLOC_HOOKS": "n",
    "UCX_DEBUG_SIGNO": "0",
    "UCX_VFS_ENABLE": "n",
}

_pointer, _size, _int, _status = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int8


class UcxError(Exception):
    """UCX cannot be measured here; the message is one line that says what to install."""


class _Operations(ctypes.Structure):
    """ucs_rcache_ops_t."""

    _fields_ = (("mem_reg", _pointer), ("mem_dereg", _pointer), ("merge", _pointer), ("dump_region", _pointer))


class _Parameters(ctypes.Structure):
    """ucs_rcache_params_t, 64 bytes."""

    _fields_ = (
        ("region_struct_size", _size),
        ("ucm_events", _int),
        ("ucm_event_priority", _int),
        ("operations", ctypes.POINTER(_Operations)),
        ("context", _pointer),
        ("flags", _int),
        ("max_regions", ctypes.c_ulong),
        ("max_size", _size),
        ("max_unreleased", _size),  # without: no thread of UCX's cleans up in the middle of a measurement
    )


class _Region(ctypes.Structure):
    """ucs_rcache_region_t, 88 bytes."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("lists", _pointer * 6),
        ("alignment", _size),
        ("references", ctypes.c_uint32),  # one more than its holders while it is in the look-up
        ("status", _status),
        ("protection", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("lru_flags", ctypes.c_uint8),
        ("private", ctypes.c_uint64),
    )


class UcxCache:
    """One cache without a limit, as UCX's own are by default. Raises UcxError."""

    def __init__(self) -> None:
        self._ucs = _loaded(library())
        nothing = ctypes.cast(self._ucs.ucs_empty_function, _pointer)
        succeed = ctypes.cast(self._ucs.ucs_empty_function_return_success, _pointer)
        self._operations = _Operations(succeed, nothing, nothing, nothing)
        parameters = _Parameters(
            ctypes.sizeof(_Region), _VM_UNMAPPED, _EVENT_PRIORITY, ctypes.pointer(self._operations), None,
            _NEED_LRU_LOCK, _WITHOUT, _WITHOUT, _WITHOUT,
        )  # fmt: skip
        self._cache = _pointer()
        name = b"usermm-bench"
        status = self._ucs.ucs_rcache_create(ctypes.byref(parameters), name, None, ctypes.byref(self._cache))
        if status:
            raise UcxError(f"ucs_rcache_create answered {status}: {ADVICE}")
        self._region = ctypes.pointer(_Region())
        self._ret_region = ctypes.byref(self._region)
        try:
            self._compare_layout()
        except UcxError:
            self.close()
            raise

    CODE = f"get(cache, buffer[0], buffer[1], {_PAGE}, {_READ_WRITE}, None, ret_region); put(cache, region)"
    """Get and put of the region that covers a (address, length), `buffer`; it is made if there is none."""

    def names(self) -> dict[str, object]:
        """What CODE uses."""
        get, put = self._ucs.ucs_rcache_get, self._ucs.ucs_rcache_region_put
        return {"get": get, "put": put, "cache": self._cache, "ret_region": self._ret_region, "region": self._region}

    def look_up(self, key: tuple[int, int]) -> None:
        """The same as a call."""
        self._get(*key)
        self._ucs.ucs_rcache_region_put(self._cache, self._region)

    def invalidate(self, address: int, length: int) -> None:
        """The memory is about to go: what overlaps leaves the look-up."""
        self._ucs.ucm_vm_munmap(address, length)

    def close(self) -> None:
        """Frees it. May be called again."""
        if self._cache:
            self._ucs.ucs_rcache_destroy(self._cache)
            self._cache = _pointer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _get(self, address: int, length: int) -> None:
        status = self._ucs.ucs_rcache_get(self._cache, address, length, _PAGE, _READ_WRITE, None, self._ret_region)
        if status:
            raise UcxError(f"ucs_rcache_get answered {status}: {ADVICE}")

    def _compare_layout(self) -> None:
        """A build with other options could have other layouts, although the version is right."""
        address = 0x100000
        self._get(address + 16, 32)
        region = self._region.contents
        found = (region.start, region.end, region.alignment, region.references, region.status, region.flags)
        self._ucs.ucs_rcache_region_put(self._cache, self._region)
        if found != (address, address + _PAGE, _PAGE, 2, 0, _IN_USE) or region.references != 1:
            raise UcxError(f"this build of UCX lays its regions out otherwise: {ADVICE}")
        self.invalidate(address, _PAGE)


def library() -> Path:
    """The path of libucs.so in the wheel libucx. Raises UcxError."""
    try:
        package = importlib.import_module("libucx")
    except ImportError:
        raise UcxError(f"UCX is not installed, so its rows are missing: {ADVICE}") from None
    wanted = ".".join(map(str, VERSION))
    if not package.__version__.startswith(f"{wanted}."):
        raise UcxError(f"UCX {package.__version__} is installed, whose cache is another: {ADVICE}")
    return Path(str(package.__file__)).with_name("lib") / "libucs.so"


def _loaded(path: Path) -> ctypes.CDLL:
    """With the interpreter's lock kept in each call, which is what costs least; nothing calls back into Python."""
    try:
        with _environment():
            ucs = ctypes.PyDLL(str(path))
            ucp = ctypes.PyDLL(str(path.with_name("libucp.so")))
    except OSError as error:
        raise UcxError(f"{error}: {ADVICE}") from None
    numbers = (ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint())
    ucp.ucp_get_version(*map(ctypes.byref, numbers))
    found = tuple(number.value for number in numbers)
    if found[:2] != VERSION:
        raise UcxError(f"{path} is UCX {'.'.join(map(str, found))}, whose cache is laid out otherwise: {ADVICE}")
    ucs.ucs_rcache_create.restype = ucs.ucs_rcache_get.restype = _status
    ucs.ucs_rcache_create.argtypes = [_pointer, ctypes.c_char_p, _pointer, _pointer]
    ucs.ucs_rcache_get.argtypes = [_pointer, _pointer, _size, _size, _int, _pointer, _pointer]
    ucs.ucs_rcache_region_put.argtypes = [_pointer, ctypes.POINTER(_Region)]
    ucs.ucs_rcache_region_put.restype = ucs.ucs_rcache_destroy.restype = ucs.ucm_vm_munmap.restype = None
    ucs.ucs_rcache_destroy.argtypes = [_pointer]
    ucs.ucm_vm_munmap.argtypes = [_pointer, _size]
    ucs.ucm_set_external_event.restype = None
    ucs.ucm_set_external_event(_VM_UNMAPPED)  # we shall tell: install nothing
    return ucs


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
