"""The headers for C developers: any dialect, any order, any warning; with a built library for those that need one."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
from support.headers import INCLUDE

COMPILERS = {"c": shutil.which("gcc"), "c++": shutil.which("g++")}
ABI = ("linux/ummunotify.h", "linux/ummunot.h")
ALL = (*ABI, "usermm.h", "usermm_cache.h")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-pedantic-errors", "-Wconversion", "-Wundef")

USES_THE_ABI = """
int main(void) {
    struct ummunotify_register_ioctl newer;
    struct ummunot_register_ioctl older;
    struct ummunotify_event event;
    struct ummunot_event older_event;
    unsigned long requests[5];
    newer.start = 1, newer.end = 2, newer.user_cookie = 3, newer.flags = 4, newer.reserved = 5;
    older.intf_version = UMMUNOT_INTF_VERSION, older.reserved = 0;
    older.start = 1, older.end = 2, older.user_cookie = 3;
    event.type = UMMUNOTIFY_EVENT_TYPE_LAST, event.flags = UMMUNOTIFY_EVENT_FLAG_HINT, event.hint_start = 0;
    event.hint_end = 0, event.user_cookie_counter = 0;
    older_event.type = UMMUNOT_EVENT_TYPE_LAST, older_event.flags = UMMUNOT_EVENT_FLAG_HINT;
    requests[0] = UMMUNOTIFY_EXCHANGE_FEATURES, requests[1] = UMMUNOTIFY_REGISTER_REGION;
    requests[2] = UMMUNOTIFY_UNREGISTER_REGION, requests[3] = UMMUNOT_REGISTER_REGION;
    requests[4] = UMMUNOT_UNREGISTER_REGION;
    (void)newer, (void)older, (void)event, (void)older_event, (void)requests;
    return UMMUNOTIFY_EVENT_TYPE_INVAL || UMMUNOT_EVENT_TYPE_INVAL;
}
"""


def compiles(text: str, language: str, standard: str) -> None:
    compiler = COMPILERS[language]
    if compiler is None:
        pytest.skip(f"needs a compiler for {language} (apt install gcc g++)")
    command = [compiler, "-x", language, f"-std={standard}", *WARNINGS, f"-I{INCLUDE}", "-fsyntax-only", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def including(headers: tuple[str, ...]) -> str:
    return "".join(f"#include <{header}>\n" for header in headers)


@pytest.mark.parametrize(
    ("language", "standard"), [("c", "c89"), ("c", "c99"), ("c", "c11"), ("c++", "c++98"), ("c++", "c++20")]
)
@pytest.mark.parametrize("headers", list(itertools.permutations(ABI)), ids=lambda headers: headers[0])
def test_the_abi_in_any_dialect(headers: tuple[str, ...], language: str, standard: str) -> None:
    compiles(including(headers + headers) + USES_THE_ABI, language, standard)


@pytest.mark.parametrize("with_libc", [("sys/ioctl.h",), ("sys/ioctl.h", "linux/types.h", "fcntl.h")])
def test_the_abi_beside_the_system_s_headers(with_libc: tuple[str, ...]) -> None:
    for headers in (with_libc + ABI, ABI + with_libc):
        compiles(including(headers) + USES_THE_ABI, "c", "c89")


@pytest.mark.parametrize("header", ALL)
@pytest.mark.parametrize(("language", "standard"), [("c", "c11"), ("c++", "c++11")])
def test_a_header_needs_no_other(header: str, language: str, standard: str) -> None:
    compiles(including((header,)) + "int main(void) { return 0; }\n", language, standard)


@pytest.mark.parametrize(("language", "standard"), [("c", "c11"), ("c++", "c++11")])
def test_all_headers_together(language: str, standard: str) -> None:
    compiles(including(ALL) + USES_THE_ABI, language, standard)


def test_the_abi_s_headers_are_ours() -> None:
    """A permissive licence, and no word of the drivers' own headers, which are GPL-2.0-only."""
    for header in ABI:
        text = (INCLUDE / header).read_text()
        assert text.startswith("/* SPDX-License-Identifier: MIT */\n")
        assert "GPL" not in text and "GNU" not in text


def test_make_install(tmp_path: Path) -> None:
    """It is complete: every header, page and library, and a usermm.pc that finds them."""
    if shutil.which("make") is None or COMPILERS["c"] is None:
        pytest.skip("needs gcc and make")
    command = ["make", "-s", "-C", str(INCLUDE.parent), "install", "PREFIX=/opt/usermm", f"DESTDIR={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    prefix = tmp_path / "opt" / "usermm"
    for header in ALL:
        assert (prefix / "include" / header).read_text() == (INCLUDE / header).read_text()
    assert (prefix / "lib" / "libusermm.so").resolve().name == "libusermm.so.0"
    pages = {path.name for path in (INCLUDE.parent / "man").iterdir()}
    assert {path.name for path in (prefix / "share" / "man").glob("man*/*")} == pages
    found = (prefix / "lib" / "pkgconfig" / "usermm.pc").read_text()
    assert "@" not in found and "rpath" not in found
