"""The part of UCX's C interface that registering memory takes: finding the library, a context, a context's threads.

Functions, structures and numbers are those of ucp.h and ucs/type/status.h, as they have been since UCX 1.13; the
structures say in `field_mask` which of their fields count, so later versions only add to them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import os
from collections.abc import Iterator

from usermm.errors import ArgumentError, DeviceError, LimitError, UnavailableError

MAP_FIELDS = 1 << 0 | 1 << 1
"""address and length of ucp_mem_map_params_t."""
NO_RESOURCES = (-2, -4, -21)
"""UCS_ERR_NO_RESOURCE, UCS_ERR_NO_MEMORY, UCS_ERR_EXCEEDS_LIMIT."""

_PARAMETER_FIELDS = 1 << 0 | 1 << 5  # features, mt_workers_shared
_FEATURE_RMA = 1 << 1
_ATTRIBUTE_THREAD_MODE = 1 << 1
_THREAD_MODE_MULTI = 2
_LIBRARY = "libucp.so.0"


class _Parameters(ctypes.Structure):
    """ucp_params_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("features", ctypes.c_uint64),
        ("request_size", ctypes.c_size_t),
        ("request_init", ctypes.c_void_p),
        ("request_cleanup", ctypes.c_void_p),
        ("tag_sender_mask", ctypes.c_uint64),
        ("mt_workers_shared", ctypes.c_int),
        ("rest", ctypes.c_size_t * 8),  # fields that are not set
    )


class _Attributes(ctypes.Structure):
    """ucp_context_attr_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("request_size", ctypes.c_size_t),
        ("thread_mode", ctypes.c_int),
        ("rest", ctypes.c_uint64 * 32),  # fields that are not asked for
    )


class MapParameters(ctypes.Structure):
    """ucp_mem_map_params_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("rest", ctypes.c_uint64 * 8),  # fields that are not set
    )


_STATUS = ctypes.c_int8  # ucs_status_t is packed into one byte
_POINTER = ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    "ucs_status_string": (ctypes.c_char_p, [_STATUS]),
    "ucp_get_version": (None, [_POINTER] * 3),
    "ucp_config_read": (_STATUS, [_POINTER] * 3),
    "ucp_config_modify": (_STATUS, [_POINTER, ctypes.c_char_p, ctypes.c_char_p]),
    "ucp_config_release": (None, [_POINTER]),
    "ucp_init_version": (_STATUS, [ctypes.c_uint, ctypes.c_uint, _POINTER, _POINTER, _POINTER]),
    "ucp_context_query": (_STATUS, [_POINTER, _POINTER]),
    "ucp_cleanup": (None, [_POINTER]),
    "ucp_mem_map": (_STATUS, [_POINTER] * 3),
    "ucp_mem_unmap": (_STATUS, [_POINTER] * 2),
    "ucp_rkey_pack": (_STATUS, [_POINTER] * 4),
    "ucp_rkey_buffer_release": (None, [_POINTER]),
}


def loaded(path: str | None, *, may_load: bool) -> ctypes.CDLL:
    """libucp: by its path, or else as the process has it already, from the wheel libucx, from the system.

    UnavailableError: none of them. ArgumentError: the process has none, and it had to (`may_load` is False).
    """
    with _without_hooks():
        ucp = _found(may_load) if path is None else _opened(path)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(ucp, name)
        function.restype, function.argtypes = result, arguments
    return ucp


def created(ucp: ctypes.CDLL) -> int:
    """A context for put and get that threads can share, without UCX's own registration cache."""
    major, minor, patch = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
    ucp.ucp_get_version(ctypes.byref(major), ctypes.byref(minor), ctypes.byref(patch))
    configuration, context = ctypes.c_void_p(), ctypes.c_void_p()
    _check(ucp, "ucp_config_read", ucp.ucp_config_read(None, None, ctypes.byref(configuration)))
    try:
        ucp.ucp_config_modify(configuration, b"RCACHE_ENABLE", b"n")  # unknown, and not needed, before UCX 1.15
        wanted = _Parameters(field_mask=_PARAMETER_FIELDS, features=_FEATURE_RMA, mt_workers_shared=1)
        status = ucp.ucp_init_version(major, minor, ctypes.byref(wanted), configuration, ctypes.byref(context))
        _check(ucp, "ucp_init", status)
    finally:
        ucp.ucp_config_release(configuration)
    return context.value or 0


def any_thread(ucp: ctypes.CDLL, context: int) -> bool:
    """Threads may use the context at the same time."""
    attributes = _Attributes(field_mask=_ATTRIBUTE_THREAD_MODE)
    _check(ucp, "ucp_context_query", ucp.ucp_context_query(context, ctypes.byref(attributes)))
    return bool(attributes.thread_mode == _THREAD_MODE_MULTI)


def reason(ucp: ctypes.CDLL, status: int) -> str:
    """What UCX says of a ucs_status_t."""
    text: bytes = ucp.ucs_status_string(status)
    return f"{text.decode()} ({status})"


def _found(may_load: bool) -> ctypes.CDLL:
    with contextlib.suppress(OSError):
        return ctypes.CDLL(_LIBRARY, os.RTLD_NOLOAD)
    if not may_load:
        step = "pass library=, the path of the one that made the context"
        raise ArgumentError(f"UcxMemory: no {_LIBRARY} is loaded in this process: {step}")
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("libucx").load_library()
    with contextlib.suppress(OSError):
        return ctypes.CDLL(_LIBRARY)  # the wheel's by now, or else the system's
    step = "pip install usermm[ucx], or apt install libucx0"
    raise UnavailableError(errno.ENOSYS, f"UcxMemory: the UCX library {_LIBRARY} is missing: {step}")


def _opened(path: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise UnavailableError(errno.ENOSYS, f"UcxMemory: {error}: pass the path of {_LIBRARY}") from None


@contextlib.contextmanager
def _without_hooks() -> Iterator[None]:
    """UCX reads this variable when it is loaded, and never again; programs that we start do not see it."""
    name = "UCX_MEM_EVENTS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "n"
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _check(ucp: ctypes.CDLL, call: str, status: int) -> None:
    if status < 0:
        kind, number = (LimitError, errno.ENOMEM) if status in NO_RESOURCES else (DeviceError, errno.EINVAL)
        raise kind(number, f"UcxMemory: {call}: {reason(ucp, status)}: UCX_LOG_LEVEL=info says more")
