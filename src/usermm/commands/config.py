"""``usermm config``: what a C compiler and linker, and a shell, need to find the installed libusermm.

Exit status: 0, or 2 when a part that was asked for is not installed.
"""

from __future__ import annotations

import argparse
import shlex

from usermm import installation
from usermm.errors import ArgumentError

HELP = "Print the flags to build C programs with libusermm, or where its files are"

OPTIONS = {
    "cflags": "flags for the compiler",
    "libs": "flags for the linker; the program finds the library again where it is now",
    "header": "the directory of the headers",
    "preload": "the library that `usermm run` puts into LD_PRELOAD",
    "pkgconfig": 'the directory of usermm.pc: PKG_CONFIG_PATH="$(usermm config --pkgconfig)"',
    "systemd": "the directory of the hypervisor's units",
    "man": 'the directory of the man pages: man -M "$(usermm config --man)" usermm',
}


def prepare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: any number of them, as for pkg-config."""
    for name, text in OPTIONS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Print all that was asked for on one line, in the order of the options above. Raises `NotInstalledError`."""
    words = [word for name in OPTIONS if getattr(args, name) for word in _words(name)]
    if not words:
        raise ArgumentError(f"say what: {', '.join(f'--{name}' for name in OPTIONS)}")
    print(" ".join(words))
    return 0


def _words(name: str) -> list[str]:
    """Flags are quoted for a shell; a path is as it is, for "$(...)"."""
    if name == "cflags":
        return [shlex.quote(f"-I{installation.header_directory()}"), "-pthread"]
    if name == "libs":
        directory = installation.library().parent
        flags = [f"-L{directory}", "-lusermm", f"-Wl,-rpath,{directory}", "-pthread"]
        return [shlex.quote(flag) for flag in flags]
    places = {
        "header": installation.header_directory,
        "preload": installation.preload_library,
        "pkgconfig": installation.pkgconfig_directory,
        "systemd": installation.systemd_directory,
        "man": installation.man_directory,
    }
    return [str(places[name]())]
