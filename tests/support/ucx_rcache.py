"""UCX's registration cache for tests: benchmarks/c/ucx_rcache.c by ctypes. What it knows of lost memory it is told.

UCX cannot be unloaded and sets environment variables, so use it in a process of its own.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

from support.processes import SOURCE
from usermm.measurement import ucx

_C = SOURCE.parent / "benchmarks" / "c"
_COMPILER = shutil.which("gcc")
_IN_THE_LOOK_UP = 2  # UCS_RCACHE_REGION_FLAG_PGTABLE
_FLAGS = 62  # where they are in `theirs`: libucs 1.22, tried out by ucx_open


def missing() -> str | None:
    """Why there is no UCX to compare with, or None."""
    try:
        ucx.library()
    except ucx.UcxError as error:
        return str(error)
    return None if _COMPILER else "needs gcc: apt install gcc libc6-dev"


def build(folder: Path) -> Path:
    """The shared object, in `folder`."""
    assert _COMPILER is not None
    target = folder / "ucx_rcache.so"
    options = ("-std=c11", "-O2", "-shared", "-fPIC", "-D_GNU_SOURCE", "-pthread")
    subprocess.run([_COMPILER, *options, str(_C / "ucx_rcache.c"), "-o", str(target)], check=True)
    return target


class Region(ctypes.Structure):
    """struct ucx_region."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("theirs", ctypes.c_ubyte * 72),
        ("handle", ctypes.c_uint64),
    )


class _Limits(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("max_regions", "max_bytes", "alignment", "unlocked"))


class UcxCache:
    """One cache; handles are 1, 2, 3, ... in order of registration. A limit of 0 is none."""

    def __init__(self, shared_object: Path, alignment: int, *, max_regions: int = 0, max_bytes: int = 0) -> None:
        self._c = _declared(ctypes.PyDLL(str(shared_object)))
        limits = _Limits(max_regions, max_bytes, alignment, 0)
        self._cache = ctypes.c_void_p()
        refusal = self._c.ucx_open(str(ucx.library()).encode(), ctypes.byref(limits), ctypes.byref(self._cache))
        assert refusal is None, refusal

    def get(self, address: int, length: int) -> Any:
        """A pointer to a Region, to be put."""
        region = self._c.ucx_get(self._cache, address, length)
        assert region, "ucs_rcache_get refused"
        return region

    def put(self, region: Any) -> None:
        self._c.ucx_put(self._cache, region)

    def invalidate(self, address: int, length: int) -> None:
        """The memory is gone."""
        self._c.ucx_invalidate(self._cache, address, length)

    @property
    def registered(self) -> int:
        """How many registrations were ever made."""
        return int(self._c.ucx_registrations(self._cache))

    @property
    def live(self) -> int:
        """How many are registered with the device now."""
        return int(self._c.ucx_live(self._cache))

    def close(self) -> None:
        self._c.ucx_close(self._cache)


def is_valid(region: Any) -> bool:
    """Whether a region that is held is in the look-up."""
    return bool(region.contents.theirs[_FLAGS] & _IN_THE_LOOK_UP)


def _declared(c: ctypes.PyDLL) -> ctypes.PyDLL:
    u64, pointer = ctypes.c_uint64, ctypes.c_void_p
    c.ucx_open.restype = ctypes.c_char_p
    c.ucx_open.argtypes = [ctypes.c_char_p, ctypes.POINTER(_Limits), ctypes.POINTER(pointer)]
    c.ucx_get.restype = ctypes.POINTER(Region)
    c.ucx_get.argtypes = c.ucx_invalidate.argtypes = [pointer, u64, u64]
    c.ucx_put.argtypes = [pointer, ctypes.POINTER(Region)]
    c.ucx_registrations.restype = c.ucx_live.restype = u64
    c.ucx_registrations.argtypes = c.ucx_live.argtypes = c.ucx_close.argtypes = [pointer]
    c.ucx_put.restype = c.ucx_invalidate.restype = c.ucx_close.restype = None
    return c
