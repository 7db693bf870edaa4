"""Where the files beside the Python of usermm are: libraries, headers, man pages, units. Nothing is loaded or printed.

All of them lie in the package's own directory, so that a wheel carries them and a checkout has them after `make build`.
"""

from __future__ import annotations

from pathlib import Path

from usermm.errors import NotInstalledError

PACKAGE = Path(__file__).resolve().parent

REBUILD = "run `make build` in a checkout, or `pip install --force-reinstall usermm`"


def library() -> Path:
    """libusermm.so, to be linked with. Raises `NotInstalledError`."""
    return _present(PACKAGE / "lib" / "libusermm.so")


def preload_library() -> Path:
    """libusermm-preload.so, absolute, for LD_PRELOAD. Raises `NotInstalledError`."""
    return _present(PACKAGE / "lib" / "libusermm-preload.so")


def header_directory() -> Path:
    """What -I needs: usermm.h, usermm_cache.h, linux/ummunotify.h, linux/ummunot.h. Raises `NotInstalledError`."""
    return _present(PACKAGE / "include" / "usermm.h").parent


def pkgconfig_directory() -> Path:
    """For PKG_CONFIG_PATH: usermm.pc. Raises `NotInstalledError`."""
    return _present(PACKAGE / "lib" / "pkgconfig" / "usermm.pc").parent


def man_directory() -> Path:
    """For MANPATH or ``man -M``. Raises `NotInstalledError`."""
    return _present(PACKAGE / "share" / "man" / "man7" / "usermm.7").parents[1]


def systemd_directory() -> Path:
    """The units of `usermm hypervisor`, to be copied to /etc/systemd/system. Raises `NotInstalledError`."""
    return _present(PACKAGE / "share" / "systemd" / "usermm-hypervisor.service").parent


def _present(path: Path) -> Path:
    if not path.exists():
        raise NotInstalledError(f"{path} is missing: {REBUILD}")
    return path
