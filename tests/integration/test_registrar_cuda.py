"""Host memory registered with CUDA: with a GPU for real, without one by what a stand-in was asked to do.

What happens without the package, without a driver and without a GPU is tried for real where that is the case.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from usermm import ArgumentError, DeviceError, ForkedError, LimitError, OverlapError, UnavailableError
from usermm.registrars import Cuda, Overlap, cuda

PAGE_BYTES = 4096
HAS_BINDINGS = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
HAS_DEVICE = any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/dxg"))
needs_bindings = pytest.mark.skipif(not HAS_BINDINGS, reason="no cuda-bindings here: pip install usermm[cuda]")
needs_gpu = pytest.mark.skipif(
    not (HAS_BINDINGS and HAS_DEVICE), reason="no NVIDIA GPU here, or no cuda-bindings: a machine with both runs it"
)


def in_a_process(story: Callable[[], object]) -> None:
    """CUDA keeps threads and descriptors until the process ends. Fails with what the process wrote."""
    done = subprocess.run(
        [sys.executable, __file__, story.__name__], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# With a GPU


@needs_gpu
def test_registered_memory_is_pinned_and_overlaps_are_refused() -> None:
    in_a_process(on_a_gpu)


def on_a_gpu() -> None:
    from cuda.bindings import runtime

    memory = mmap.mmap(-1, 1 << 20)
    view = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(view)
    registrar = Cuda()
    handle = registrar.register(address, 1 << 20)
    assert runtime.cudaHostGetFlags(address)[0].value == 0, "it is pinned"
    assert handle.device_pointer == runtime.cudaHostGetDevicePointer(address, 0)[1]
    for start, length in ((address, 1 << 20), (address + PAGE_BYTES, PAGE_BYTES)):
        with pytest.raises(OverlapError):
            registrar.register(start, length)
    assert runtime.cudaGetLastError()[0].value == 0, "no error is left for others to find"
    registrar.deregister(handle)
    registrar.deregister(handle)
    assert runtime.cudaHostGetFlags(address)[0].value != 0
    runtime.cudaGetLastError()
    handle = registrar.register(address, PAGE_BYTES)
    del view
    memory.close()
    registrar.deregister(handle)
    child = os.fork()
    if child == 0:
        registrar.deregister(handle)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@needs_gpu
def test_the_program_of_the_how_to_page() -> None:
    in_a_process(the_page)


def the_page() -> None:
    exec(page(), {})


def page() -> Any:
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "cuda.md").read_text()
    return compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "cuda.md", "exec")


# Without


def test_the_program_of_the_how_to_page_is_one() -> None:
    assert page().co_names


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UnavailableError, match=r"pip install usermm\[cuda\]") as caught:
        Cuda()
    assert caught.value.errno == errno.ENOSYS


@needs_bindings
@pytest.mark.skipif(HAS_DEVICE, reason="an NVIDIA driver is here: a machine without one runs it")
def test_the_driver_is_missing() -> None:
    in_a_process(without_a_driver)


def without_a_driver() -> None:
    with pytest.raises(UnavailableError, match="driver") as caught:
        Cuda()
    assert caught.value.errno == errno.ENODEV
    assert "\n" not in str(caught.value)


# By what a stand-in was asked


def result(name: str) -> Any:
    return SimpleNamespace(value=0 if name.lower().endswith("success") else 1, name=name)


class StandIn:
    """Runtime and driver of a machine with two GPUs; `fails` says which call answers with which error, and as what."""

    cudaHostRegisterPortable, cudaHostRegisterMapped, cudaHostRegisterReadOnly = 1, 2, 8  # noqa: N815

    def __init__(self) -> None:
        self.fails: dict[str, str] = {}
        self.raises: dict[str, BaseException] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.current = ["the thread's"]

    def __getattr__(self, call: str) -> Callable[..., tuple[Any, ...]]:
        def answer(*arguments: Any) -> tuple[Any, ...]:
            self.asked.append((call, *arguments))
            if call in self.raises:
                raise self.raises[call]
            if call in self.fails:
                return result(self.fails[call]), None
            return self._work(call, *arguments)

        return answer

    def _work(self, call: str, *arguments: Any) -> tuple[Any, ...]:
        if call == "cuCtxPushCurrent":
            self.current.append(*arguments)
        elif call == "cuCtxPopCurrent":
            self.current.pop()
        elif call.startswith("cudaHost"):
            assert self.current[-1] == "context of 1", "the call has to be made in the context of the device"
        answers = {
            "cudaGetDeviceCount": 2,
            "cudaGetDevice": 1,
            "cudaGetErrorString": b"no such luck",
            "cuDeviceGet": arguments[0] if arguments else None,
            "cuDevicePrimaryCtxRetain": f"context of {arguments[0]}" if arguments else None,
            "cudaHostGetDevicePointer": 0xD000,
        }
        return (result("success"), *([answers[call]] if call in answers else []))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    library = StandIn()
    monkeypatch.setattr(cuda, "_bindings", lambda: (library, library))
    return library


def test_a_registration(stand_in: StandIn) -> None:
    registrar = Cuda()
    assert repr(registrar) == "<usermm.registrars.Cuda, device 1>"
    assert registrar.traits.overlap is Overlap.REFUSED
    assert (registrar.traits.granularity_bytes, registrar.traits.writes) == (PAGE_BYTES, True)
    handle = registrar.register(0x2000, PAGE_BYTES)
    assert (handle.address, handle.length, handle.device_pointer) == (0x2000, PAGE_BYTES, 0xD000)
    registrar.deregister(handle)
    assert [asked for asked in stand_in.asked if asked[0].startswith("cudaHost")] == [
        ("cudaHostRegister", 0x2000, PAGE_BYTES, 3),
        ("cudaHostGetDevicePointer", 0x2000, 0),
        ("cudaHostUnregister", 0x2000),
    ]
    assert stand_in.current == ["the thread's"]


@pytest.mark.parametrize(
    ("options", "flags"),
    [({"portable": False}, 2), ({"mapped": False}, 1), ({"read_only": True}, 11), ({"granularity_bytes": 1}, 3)],
)
def test_options(stand_in: StandIn, options: dict[str, Any], flags: int) -> None:
    registrar = Cuda(1, **options)
    handle = registrar.register(0x2000, PAGE_BYTES)
    assert ("cudaHostRegister", 0x2000, PAGE_BYTES, flags) in stand_in.asked
    assert (handle.device_pointer is None) == (options.get("mapped") is False)
    assert registrar.traits.writes == (not options.get("read_only", False))
    assert registrar.traits.granularity_bytes == options.get("granularity_bytes", PAGE_BYTES)


@pytest.mark.parametrize("call", ["cudaHostRegister", "cudaHostGetDevicePointer", "cudaHostUnregister"])
@pytest.mark.parametrize(
    ("name", "kind", "number"),
    [
        ("cudaErrorHostMemoryAlreadyRegistered", OverlapError, errno.EADDRINUSE),
        ("cudaErrorMemoryAllocation", LimitError, errno.ENOMEM),
        ("cudaErrorInvalidValue", DeviceError, errno.EINVAL),
        ("cudaErrorNotSupported", DeviceError, errno.EINVAL),
    ],
)
def test_each_refusal_has_its_error(
    stand_in: StandIn, call: str, name: str, kind: type[DeviceError], number: int
) -> None:
    registrar = Cuda()
    stand_in.fails[call] = name
    with pytest.raises(DeviceError, match=rf"{call}: 4096 bytes at 0x2000: no such luck \({name}\)") as caught:
        registrar.deregister(registrar.register(0x2000, PAGE_BYTES))
    assert (type(caught.value), caught.value.errno) == (kind, number)
    names = [asked[0] for asked in stand_in.asked]
    assert ("cudaHostUnregister" in names) == (call != "cudaHostRegister"), "after an error nothing is registered"
    assert "cudaGetLastError" in names
    assert stand_in.current == ["the thread's"]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("cudaHostUnregister", "cudaErrorHostMemoryNotRegistered"),
        ("cudaHostUnregister", "cudaErrorCudartUnloading"),
        ("cuCtxPushCurrent", "CUDA_ERROR_DEINITIALIZED"),
        ("cuCtxPushCurrent", "CUDA_ERROR_CONTEXT_IS_DESTROYED"),
    ],
)
def test_what_is_gone_already_is_not_missed(stand_in: StandIn, call: str, name: str) -> None:
    registrar = Cuda()
    handle = registrar.register(0x2000, PAGE_BYTES)
    stand_in.fails[call] = name
    registrar.deregister(handle)
    assert stand_in.current == ["the thread's"]


@pytest.mark.parametrize(
    ("call", "name", "kind"),
    [
        ("cudaGetDeviceCount", "cudaErrorNoDevice", UnavailableError),
        ("cudaGetDeviceCount", "cudaErrorInsufficientDriver", UnavailableError),
        ("cudaGetDevice", "cudaErrorUnknown", UnavailableError),
        ("cuDevicePrimaryCtxRetain", "CUDA_ERROR_OUT_OF_MEMORY", LimitError),
        ("cuDevicePrimaryCtxRetain", "CUDA_ERROR_UNKNOWN", DeviceError),
    ],
)
def test_no_device_no_registrar(stand_in: StandIn, call: str, name: str, kind: type[DeviceError]) -> None:
    stand_in.fails[call] = name
    with pytest.raises(DeviceError, match=f"{call}: .*{name}") as caught:
        Cuda()
    assert type(caught.value) is kind


def test_bindings_that_raise_without_a_driver(stand_in: StandIn) -> None:
    stand_in.raises["cudaGetDeviceCount"] = RuntimeError("Failed to dlopen libcuda.so.1")
    with pytest.raises(UnavailableError, match="libcuda") as caught:
        Cuda()
    assert caught.value.errno == errno.ENODEV


@pytest.mark.usefixtures("stand_in")
def test_bad_arguments() -> None:
    for device in (-1, 2):
        with pytest.raises(ArgumentError, match="below 2"):
            Cuda(device)
    with pytest.raises(ArgumentError):
        Cuda(granularity_bytes=3)
    with pytest.raises(ArgumentError):
        Cuda().register(0x2000, 0)


def test_a_forked_child_does_nothing(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    registrar = Cuda()
    handle = registrar.register(0x2000, PAGE_BYTES)
    calls = len(stand_in.asked)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    registrar.deregister(handle)
    with pytest.raises(ForkedError) as caught:
        registrar.register(0x2000, PAGE_BYTES)
    assert caught.value.errno == errno.ECHILD
    assert len(stand_in.asked) == calls


if __name__ == "__main__":
    globals()[sys.argv[1]]()
