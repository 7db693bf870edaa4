"""``usermm config``, on copies of the package: in a folder with a space, and with parts missing."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import SOURCE

PARTS = ("--cflags", "--libs", "--header", "--preload", "--pkgconfig", "--man")
FILES = {
    "--cflags": "include/usermm.h",
    "--libs": "lib/libusermm.so",
    "--header": "include/usermm.h",
    "--preload": "lib/libusermm-preload.so",
    "--pkgconfig": "lib/pkgconfig/usermm.pc",
    "--man": "share/man/man7/usermm.7",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """With empty files for the C parts, which config does not open."""
    copy = tmp_path / "a folder" / "usermm"
    shutil.copytree(SOURCE / "usermm", copy, ignore=shutil.ignore_patterns("lib", "include", "share", "__pycache__"))
    for name in FILES.values():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    return copy


def config(package: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "usermm", "config", *options]
    environment = {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


def words(package: Path, *options: str) -> list[str]:
    done = config(package, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    return shlex.split(done.stdout)


def test_flags_are_quoted_for_a_shell(package: Path) -> None:
    assert words(package, "--cflags") == [f"-I{package}/include", "-pthread"]
    lib = f"{package}/lib"
    assert words(package, "--libs") == [f"-L{lib}", "-lusermm", f"-Wl,-rpath,{lib}", "-pthread"]


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("--header", "include"),
        ("--preload", "lib/libusermm-preload.so"),
        ("--pkgconfig", "lib/pkgconfig"),
        ("--man", "share/man"),
    ],
)
def test_a_path_is_printed_as_it_is(package: Path, option: str, place: str) -> None:
    assert config(package, option).stdout == f"{package / place}\n"


def test_options_combine_on_one_line_in_the_linker_s_order(package: Path) -> None:
    assert words(package, "--libs", "--cflags") == words(package, "--cflags") + words(package, "--libs")


@pytest.mark.parametrize("option", PARTS)
def test_what_is_missing_is_named_with_what_to_do(package: Path, option: str) -> None:
    missing = package / FILES[option]
    missing.unlink()
    done = config(package, *(part for part in PARTS if part != option and FILES[part] != FILES[option]))
    assert done.returncode == 0, "the other parts are there"
    done = config(package, option)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"usermm config: {missing} is missing: run `make build`")
    assert done.stderr.count("\n") == 1


def test_asking_for_nothing_names_what_there_is(package: Path) -> None:
    done = config(package)
    assert (done.returncode, done.stdout) == (2, "")
    assert all(part in done.stderr for part in PARTS)
    assert done.stderr.count("\n") == 1


def test_an_unknown_option(package: Path) -> None:
    done = config(package, "--ldflags")
    assert done.returncode == 2
    assert "--ldflags" in done.stderr
