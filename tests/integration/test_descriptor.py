"""What users can do to the descriptor behind fileno(), and what other threads see of a device that is being made."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import run_quietly

import usermm
from usermm.errors import ArgumentError, ArgumentTypeError


@pytest.mark.parametrize("make_blocking", ["os.set_blocking(fd, True)", "fcntl.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC)"])
def test_a_blocking_descriptor_does_not_hang_the_process(tmp_path: Path, make_blocking: str) -> None:
    """The usual way to ask for SIGIO clears O_NONBLOCK. The monitor empties the pipe under its lock, with signals
    blocked: with a full page of notifications in it a read that waits for more would have stopped everything."""
    text = f"""
        import fcntl, mmap, os, signal
        import usermm
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        device = usermm.Ummunotify()
        fd = device.fileno()
        {make_blocking}
        memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        device.register(memory, 1)
        for _ in range(2 * 4096):
            memory.madvise(mmap.MADV_DONTNEED)
        print(len(device.read(timeout=0)), device.read(timeout=0))
    """
    assert run_quietly(text, tmp_path, timeout_s=20) == "2 []\n"


def test_a_descriptor_closed_behind_the_device_fails_closed(tmp_path: Path) -> None:
    text = """
        import os, time
        import usermm
        device = usermm.Ummunotify()
        os.close(device.fileno())
        try:
            device.read(timeout=20)
        except usermm.MonitorFailedError:
            print("failed", time.process_time() < 5)
    """
    assert run_quietly(text, tmp_path, timeout_s=15) == "failed True\n"


def test_a_device_is_never_seen_half_made(tmp_path: Path) -> None:
    """Another thread that walks the garbage collector's objects finds a device only once it is open."""
    text = """
        import gc, threading, time
        import usermm
        end = time.monotonic() + 1.5
        def open_and_close():
            while time.monotonic() < end:
                usermm.Ummunotify().close()
        def look():
            while time.monotonic() < end:
                for found in gc.get_objects():
                    if isinstance(found, usermm.Ummunotify):
                        try:
                            found.generation
                        except usermm.ClosedError:
                            pass
        threads = [threading.Thread(target=work) for work in (open_and_close, open_and_close, look)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("alive")
    """
    assert run_quietly(text, tmp_path, timeout_s=30) == "alive\n"


class Interrupted:
    def __float__(self) -> float:
        raise KeyboardInterrupt


def test_an_interrupt_in_a_conversion_is_kept() -> None:
    with usermm.Ummunotify() as device, pytest.raises(KeyboardInterrupt):
        device.read(Interrupted())  # type: ignore[arg-type]


def test_messages_are_one_line_whatever_they_quote() -> None:
    strange = type("two\nlines", (), {})()
    with usermm.Ummunotify() as device:
        for call in (device.register, device.unregister, device.read):
            with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
                call(strange)
            assert "\n" not in str(caught.value)


def test_an_unknown_request_with_any_buffer_is_enotty() -> None:
    with usermm.Ummunotify() as device, pytest.raises(usermm.DeviceError) as caught:
        device.ioctl(0x5401, bytearray(4))
    assert caught.value.errno == 25
