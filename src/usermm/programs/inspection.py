"""Why a program would not find the devices although the library is preloaded, in plain language."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from usermm.errors import UsermmError
from usermm.monitors import userfaultfd
from usermm.programs import elf, preload, privileges, scripts

DEVICES: Final = ("ummunotify", "ummunot")
MOST_INTERPRETERS: Final = 5
"""A script run by a script run by ...: the kernel follows as many (execve(2), ELOOP)."""

_LOADER: Final = re.compile(r"ld[-.\w]*\.so")
"""The loader run as a program has no loader, and preloads."""

_ASAN: Final = re.compile(r"lib(?:clang_rt\.)?asan[.-]")
_ANY_ORDER: Final = re.compile(r"(?:^|[:\s,])verify_asan_link_order=(?:0|no|false)\b")
"""In ASAN_OPTIONS: the runtime need not be first."""


@dataclass(frozen=True, slots=True)
class Image:
    """The file that the kernel loads in the end, and `missing`: what it needs and what is not there, or ""."""

    path: str
    elf: elf.Elf | None
    missing: str = ""


def kernel_has_device() -> bool:
    """True when this kernel has one of the devices itself: then the library steps aside.

    Asked of the directory: under the library itself, every other call says that they exist.
    """
    try:
        return any(name in DEVICES for name in os.listdir("/dev"))
    except OSError:
        return False


def resolve(path: str, environment: Mapping[str, str]) -> Image:
    """The image behind `path`, through the interpreters of scripts."""
    for _ in range(MOST_INTERPRETERS):
        try:
            with open(path, "rb") as file:
                head = file.read(scripts.LINE_BYTES)
                if not head.startswith(scripts.HASH_BANG):
                    file.seek(0)
                    found = elf.read(file) if head.startswith(elf.MAGIC) else None
                    return Image(path, found, _missing(found))
        except elf.ElfError:
            return Image(path, None)
        except OSError as error:
            return Image(path, None, path if error.errno == errno.ENOENT else "")
        following = scripts.interpreter(head, environment)
        if not following or not os.path.exists(following):
            return Image(path, None, following)
        path = following
    return Image(path, None)


def obstacles(image: Image, library: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Each reason why `library`, preloaded into the image, gives it no device. Nothing when there is none.
    `environment` is that of the program, without `library`.

    A file that cannot be read, or that is no ELF file, is not judged: starting it says more.
    """
    if image.elf is not None:
        yield from _of_the_file(image.path, image.elf, library, environment)
    if not userfaultfd.probe_availability().available:
        yield "userfaultfd is not permitted here, so opening the device fails: `usermm doctor` names the cure"


def is_musl(found: elf.Elf | None) -> bool:
    """True when musl's loader loads it."""
    return found is not None and os.path.basename(found.interpreter).startswith("ld-musl-")


def is_ended_by_preload(found: elf.Elf | None, environment: Mapping[str, str]) -> bool:
    """True when a program would not run with a library preloaded into it, and does without.

    musl's loader does not forgive what it cannot resolve; AddressSanitizer's runtime does not when it is not first.
    """
    return found is not None and (is_musl(found) or bool(_late_runtime(found, environment)))


def _late_runtime(found: elf.Elf, environment: Mapping[str, str]) -> str:
    """The runtime of AddressSanitizer that the program needs and that would not be the first library, or ""."""
    if preload.has_sanitizer(environment) or _ANY_ORDER.search(environment.get("ASAN_OPTIONS", "")):
        return ""
    return next((name for name in found.needed if _ASAN.match(name)), "")


def _of_the_file(path: str, found: elf.Elf, library: str, environment: Mapping[str, str]) -> Iterator[str]:
    ours = architecture_of(library)
    if ours is not None and found.architecture != ours:
        yield f"{path} is {found.architecture} and the library {ours}: build the program for that"
    elif is_musl(found):
        yield f"{path} uses the C library musl, and the library needs glibc: build it with glibc"
    elif not found.interpreter and not _LOADER.match(os.path.basename(path)):
        yield f"{path} is statically linked, so nothing can be preloaded: link it dynamically"
    elif runtime := _late_runtime(found, environment):
        file = "gcc -print-file-name=libasan.so" if "clang" not in runtime else f"clang -print-file-name={runtime}"
        cure = f"LD_PRELOAD=$({file}) usermm run -- PROGRAM"
        yield f"{path} is built with AddressSanitizer, whose runtime must be the first library: {cure}"
    reason = privileges.gained(path)
    if reason:
        yield f"{path} runs with other privileges ({reason}), so its loader preloads nothing: run a copy without them"


def architecture_of(path: str) -> elf.Architecture | None:
    """That of an ELF file; None when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return elf.read(file).architecture
    except (OSError, UsermmError):
        return None


def _missing(found: elf.Elf | None) -> str:
    """The loader, when it does not exist: execve(2) answers ENOENT then, as if the program were not there."""
    if found is None or not found.interpreter or os.path.exists(found.interpreter):
        return ""
    return found.interpreter
