"""C of the tests, and copies of the libraries that lack a protection; compiled where they are needed."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

from support.processes import SOURCE, TESTS

NATIVE = TESTS / "support" / "native"
LIBRARY = SOURCE.parent / "libusermm"
COMPILER = shutil.which("gcc")
HEADERS = Path(sysconfig.get_paths()["include"])

_REASON = "needs gcc and Python.h (apt install gcc python3-dev)"
MISSING = None if COMPILER and (HEADERS / "Python.h").exists() else _REASON
"""Why nothing can be compiled here, or None."""

_OPTIONS = ("-std=c11", "-O2", "-shared", "-fPIC", "-fvisibility=default", "-pthread", f"-I{HEADERS}")
_PROGRAM = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
# Programs that hand on sizes and pointers that are wrong.
_WRONG_ON_PURPOSE = ("-Wno-stringop-overflow", "-Wno-stringop-overread", "-Wno-nonnull")


def shared_object(name: str, directory: Path) -> Path:
    """tests/support/native/NAME.c, to be loaded by ctypes.PyDLL."""
    target = directory / f"{name}.so"
    _compile(target, "-Wall", "-Wextra", "-Werror", NATIVE / f"{name}.c")
    return target


def package_without(protection: str, directory: Path) -> Path:
    """The folder from which `usermm` is imported without the protection USERMM_WITHOUT_`protection`."""
    return package_with(directory / f"without_{protection.lower()}", f"-DUSERMM_WITHOUT_{protection}")


def package_with(directory: Path, *options: str) -> Path:
    """`directory`, where `usermm` is imported from with an extension that was compiled with these options."""
    package = directory / "usermm"
    shutil.copytree(SOURCE / "usermm", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    sources = [*LIBRARY.glob("src/*.c"), *LIBRARY.glob("python/*.c")]
    _compile(package / "_core.abi3.so", *options, f"-I{LIBRARY / 'include'}", *sources)
    return directory


def run_time(sanitizer: str) -> Path | None:
    """The shared library that a program must load first which loads what was compiled for `sanitizer`."""
    name = {"address": "libasan.so", "undefined": "libubsan.so"}[sanitizer]
    command = [COMPILER or "gcc", f"-print-file-name={name}"]
    found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return found if found.is_absolute() else None


def program(name: str, directory: Path, *flags: str) -> Path:
    """tests/support/native/NAME.c as a program of its own."""
    target = directory / Path(name).name
    _build(target, *_PROGRAM, *_WRONG_ON_PURPOSE, *flags, NATIVE / f"{name}.c")
    return target


def preload_without(protection: str, directory: Path) -> Path:
    """The preload library without the protection USERMM_WITHOUT_`protection`."""
    target = directory / f"preload_without_{protection.lower()}.so"
    sources = [*LIBRARY.glob("src/*.c"), *LIBRARY.glob("preload/*.c")]
    options = (
        "-std=c11",
        "-O2",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-ftls-model=initial-exec",
        "-fexceptions",
        "-pthread",
    )
    includes = ("-DUSERMM_PRELOAD", "-U_FORTIFY_SOURCE", f"-I{LIBRARY / 'include'}", f"-I{LIBRARY / 'src'}")
    _build(target, *options, f"-DUSERMM_WITHOUT_{protection}", *includes, *sources)
    return target


def _compile(target: Path, *arguments: str | Path) -> None:
    _build(target, *_OPTIONS, *arguments)


def _build(target: Path, *arguments: str | Path) -> None:
    assert COMPILER is not None
    done = subprocess.run([COMPILER, *arguments, "-o", target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
