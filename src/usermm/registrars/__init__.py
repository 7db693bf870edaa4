"""What a buffer can be registered with: one file for each device. Each is imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from usermm.registrars.base import Overlap, Registrar, Traits

if TYPE_CHECKING:
    from usermm.registrars.cuda import Cuda
    from usermm.registrars.io_uring import IoUring
    from usermm.registrars.mlock import Mlock
    from usermm.registrars.mpi import MpiWindow
    from usermm.registrars.ucx import UcxMemory

__all__ = ["Cuda", "IoUring", "Mlock", "MpiWindow", "Overlap", "Registrar", "Traits", "UcxMemory"]

_HOMES = {"Cuda": "cuda", "IoUring": "io_uring", "Mlock": "mlock", "MpiWindow": "mpi", "UcxMemory": "ucx"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
