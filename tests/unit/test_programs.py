"""Where a program is found, what a script is run by, and what is said of a file before it starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.elves import TRUE, compiled, elf32, linked

from usermm.errors import UsermmError
from usermm.programs import elf, inspection, preload, privileges, scripts, search

HERE = {"PATH": os.environ["PATH"]}


def make(path: Path, data: bytes = b"", mode: int = 0o755) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def said(path: Path, library: Path = TRUE, **environment: str) -> list[str]:
    """What stands against preloading `library`, any ELF file of this machine, into the program."""
    image = inspection.resolve(str(path), HERE)
    return list(inspection.obstacles(image, str(library), {**HERE, **environment}))


def test_the_first_in_path_is_found(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    make(tmp_path / "one" / "tool", mode=0o644)
    (tmp_path / "two" / "tool").mkdir()
    make(tmp_path / "three" / "tool")
    path = ":".join(str(tmp_path / name) for name in ("nowhere", "one", "two", "three"))
    assert search.find("tool", {"PATH": path}) == str(tmp_path / "three" / "tool")


def test_an_empty_part_of_path_is_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "tool")
    monkeypatch.chdir(tmp_path)
    assert search.find("tool", {"PATH": "/nowhere::"}) == "./tool"


def test_without_path_the_usual_places() -> None:
    assert search.find("sh", {}) in ("/bin/sh", "/usr/bin/sh")


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("", 127),
        ("no-such-program", 127),
        ("/no/such/program", 127),
        ("a\0b", 127),
        ("/etc/passwd/x", 127),
        ("x" * 300, 126),
        ("/etc/passwd", 126),
        ("/", 126),
        ("/dev/null", 126),
    ],
)
def test_what_cannot_be_started(name: str, status: int) -> None:
    with pytest.raises(search.ProgramError) as caught:
        search.find(name, HERE)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)


def test_a_name_without_x_is_named_when_nothing_better_comes(tmp_path: Path) -> None:
    refused = make(tmp_path / "tool", mode=0o644)
    with pytest.raises(search.ProgramError, match=str(refused)) as caught:
        search.find("tool", {"PATH": f"{tmp_path}:/nowhere"})
    assert caught.value.status == 126


@pytest.mark.parametrize(
    ("line", "program"),
    [
        (b"#!/bin/sh\n", "/bin/sh"),
        (b"#! /bin/sh -e\nset\n", "/bin/sh"),
        (b"#!\t/bin/sh\t-e -x", "/bin/sh"),
        (b"#!/usr/bin/env sh\n", search.find("sh", HERE)),
        (b"#!/usr/bin/env -S sh -e\n", search.find("sh", HERE)),
        (b"#!/usr/bin/env -SA=1 sh\n", search.find("sh", HERE)),
        (b"#!/usr/bin/env no-such-program\n", "/usr/bin/env"),
        (b"#!/usr/bin/env -S 'open\n", "/usr/bin/env"),
        (b"#!/usr/bin/env\n", "/usr/bin/env"),
        (b"#!\n", ""),
        (b"#!   \n", ""),
        (b"#!/\xff\xfe\n", "/\udcff\udcfe"),
        (b"#!/" + b"a" * 1000, "/" + "a" * (scripts.LINE_BYTES - 3)),
    ],
)
def test_what_a_script_is_run_by(line: bytes, program: str) -> None:
    assert scripts.interpreter(line, HERE) == program


def test_nothing_is_said_of_an_ordinary_program(tmp_path: Path) -> None:
    assert said(TRUE) == []
    assert said(compiled(tmp_path)) == []
    assert said(make(tmp_path / "script", b"#!/usr/bin/env sh\n")) == []


@pytest.mark.parametrize("option", ["-static", "-static-pie"])
def test_a_static_program(option: str, tmp_path: Path) -> None:
    path = compiled(tmp_path, option)
    (line,) = said(path)
    assert line.startswith(f"{path} is statically linked")
    assert said(make(tmp_path / "script", f"#!{path}\n".encode())) == [line]
    assert said(make(tmp_path / "outer", f"#!{tmp_path / 'script'}\n".encode())) == [line]


def test_the_loader_itself_is_a_program_that_preloads() -> None:
    with open(TRUE, "rb") as file:
        loader = Path(elf.read(file).interpreter)
    assert said(loader.resolve()) == []


def test_a_static_program_with_a_similar_name(tmp_path: Path) -> None:
    path = compiled(tmp_path, "-static").rename(tmp_path / "ldconfig")
    assert len(said(path)) == 1


def test_another_architecture(tmp_path: Path) -> None:
    (line,) = said(make(tmp_path / "old", elf32("<", 3, b"/lib/ld-linux.so.2\0")))
    assert "32-bit i386" in line
    (line,) = said(make(tmp_path / "big", elf32(">", 8, b"/lib/ld.so.1\0")))
    assert "32-bit MIPS big-endian" in line


def test_musl(tmp_path: Path) -> None:
    (line,) = said(compiled(tmp_path, compiler="musl-gcc"))
    assert "musl" in line


def test_musl_is_known_by_its_loaders_name(tmp_path: Path) -> None:
    """As above, where there is no musl-gcc: the path of the loader in a real program is written over."""
    data = compiled(tmp_path).read_bytes()
    with open(TRUE, "rb") as file:
        loader = elf.read(file).interpreter.encode()
    musl = b"/lib/ld-musl-x.so.1".ljust(len(loader), b"\0")
    assert len(musl) == len(loader)
    (line,) = said(make(tmp_path / "patched", data.replace(loader, musl, 1)))
    assert "musl" in line


@pytest.mark.parametrize(
    ("runtime", "cure"),
    [
        ("libasan.so.8", "$(gcc -print-file-name=libasan.so)"),
        ("libclang_rt.asan-x86_64.so", "$(clang -print-file-name=libclang_rt.asan-x86_64.so)"),
    ],
)
def test_address_sanitizer_wants_to_be_first(runtime: str, cure: str, tmp_path: Path) -> None:
    """Linked with a library of that name, which need not exist for this."""
    path = linked(tmp_path, runtime)
    (line,) = said(path)
    assert f"LD_PRELOAD={cure} usermm run" in line
    assert said(path, LD_PRELOAD="/a.so:/b/asan.so") == [line]
    assert said(path, ASAN_OPTIONS="verify_asan_link_order=1") == [line]
    assert said(path, LD_PRELOAD=f"/a.so /b/{runtime}") == []
    assert said(path, ASAN_OPTIONS="a=b:verify_asan_link_order=0") == []


@pytest.mark.parametrize("name", ["libtsan.so.2", "libubsan.so.1", "liblsan.so.0", "libasanity.so.1", "myasan.so"])
def test_other_runtimes_need_not_be_first(name: str, tmp_path: Path) -> None:
    assert said(linked(tmp_path, name)) == []


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert inspection.resolve(str(make(tmp_path / "a", b"#!/no/shell\n")), HERE).missing == "/no/shell"
    image = inspection.resolve(str(make(tmp_path / "b", elf32("<", 3, b"/no/ld.so\0"))), HERE)
    assert image.missing == "/no/ld.so"
    assert inspection.resolve(str(tmp_path / "nothing"), HERE).missing == str(tmp_path / "nothing")


def test_a_script_that_runs_itself_ends(tmp_path: Path) -> None:
    path = make(tmp_path / "script", f"#!{tmp_path / 'script'}\n".encode())
    assert said(path) == []


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\x7fELF", b"echo hello\n", b"MZ" + bytes(200)])
def test_a_file_of_no_known_kind_is_not_judged(data: bytes, tmp_path: Path) -> None:
    assert said(make(tmp_path / "file", data)) == []


def test_a_set_user_id_file_of_ones_own_is_an_ordinary_file(tmp_path: Path) -> None:
    """Secure mode is about ids that differ, not about the bit."""
    assert privileges.gained(str(make(tmp_path / "own", TRUE.read_bytes(), 0o6755))) == ""


def test_without_the_groups_x_the_group_bit_means_something_else(tmp_path: Path) -> None:
    path = make(tmp_path / "locked", b"", 0o2745)
    if os.geteuid() == 0:
        os.chown(path, -1, 1)
        path.chmod(0o2745)
        assert privileges.gained(str(path)) == ""
        path.chmod(0o2755)
        assert "set-group-ID 1" in privileges.gained(str(path)) or os.statvfs(path).f_flag & os.ST_NOSUID
    else:
        pytest.skip("giving a file to another group needs root: run the tests as root")


def test_the_library_stands_in_front() -> None:
    lib = "/opt/lib.so"
    assert preload.prepare({"A": "b"}, lib, None) == {"A": "b", "LD_PRELOAD": lib}
    assert preload.prepare({"LD_PRELOAD": "/a.so /b.so"}, lib, "/t") == {
        "LD_PRELOAD": f"{lib}:/a.so:/b.so",
        "USERMM_TRACE": "/t",
    }
    assert preload.prepare({"LD_PRELOAD": f"/a.so:{lib}::/b.so"}, lib, None)["LD_PRELOAD"] == f"{lib}:/a.so:/b.so"


def test_the_library_is_left_out() -> None:
    assert preload.leave_out({"A": "b", "LD_PRELOAD": "/a.so:/lib.so /c.so"}, "/lib.so") == {
        "A": "b",
        "LD_PRELOAD": "/a.so:/c.so",
    }
    assert preload.leave_out({"A": "b", "LD_PRELOAD": "/lib.so"}, "/lib.so") == {"A": "b"}
    assert preload.leave_out({"A": "b"}, "/lib.so") == {"A": "b"}


@pytest.mark.parametrize(
    "runtime", ["libasan.so.8", "/usr/lib/libtsan.so.2", "liblsan.so.0", "/l/libclang_rt.asan-x86_64.so"]
)
def test_a_sanitizer_stays_first(runtime: str) -> None:
    value = preload.prepare({"LD_PRELOAD": f"/a.so:{runtime}"}, "/lib.so", None)["LD_PRELOAD"]
    assert value == f"{runtime}:/lib.so:/a.so"


@pytest.mark.parametrize("library", ["/my files/lib.so", "/a:b/lib.so", "/$LIB/lib.so"])
def test_a_path_that_the_loader_would_split_is_refused(library: str) -> None:
    with pytest.raises(UsermmError, match="LD_PRELOAD cannot name"):
        preload.prepare({}, library, None)
