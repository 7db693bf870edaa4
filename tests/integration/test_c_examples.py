"""The C examples, built by their Makefile against what is installed; the flags of `usermm config` and pkg-config."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.available import needs_userfaultfd
from support.pages import ROOT, blocks

from usermm import installation

EXAMPLE = ROOT / "examples" / "ummunotify_c"
USERMM = f"{sys.executable} -m usermm"
PRELOAD = installation.PACKAGE / "lib" / "libusermm-preload.so"

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("make") is None, reason="needs gcc and make (apt install gcc make)"
)
needs_pkg_config = pytest.mark.skipif(
    shutil.which("pkg-config") is None, reason="needs pkg-config (apt install pkgconf)"
)
needs_preload = pytest.mark.skipif(not PRELOAD.exists(), reason=f"needs {PRELOAD.name}: `make build`")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs, away from the checkout: only the installed files can be found from there."""
    folder = tmp_path_factory.mktemp("example")
    for path in (*EXAMPLE.glob("*.[ch]"), EXAMPLE / "Makefile"):
        shutil.copy(path, folder)
    flags = "CFLAGS=-std=c11 -O2 -Wall -Wextra -Werror"
    done = run("make", "-s", "-C", folder, f"USERMM={USERMM}", flags)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


@pytest.fixture
def story() -> str:
    """What the README says that both programs print."""
    return blocks(EXAMPLE / "README.md", "")[0]


@needs_userfaultfd
def test_by_library(built: Path, story: str) -> None:
    done = run(built / "by_library")
    assert (done.returncode, done.stdout, done.stderr) == (0, story, "")


@needs_userfaultfd
@needs_preload
def test_by_device_with_the_preload_library(built: Path, story: str) -> None:
    done = run(built / "by_device", LD_PRELOAD=str(PRELOAD))
    assert (done.returncode, done.stdout, done.stderr) == (0, story, "")


@needs_userfaultfd
@needs_preload
def test_by_device_under_usermm_run(built: Path, story: str) -> None:
    done = run(*USERMM.split(), "run", "--", built / "by_device")
    assert (done.returncode, done.stdout, done.stderr) == (0, story, "")


@pytest.mark.skipif(Path("/dev/ummunotify").exists(), reason="needs a kernel without the device")
def test_by_device_alone_says_what_to_do(built: Path) -> None:
    done = run(built / "by_device")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == blocks(EXAMPLE / "README.md", "")[1]


def test_the_device_s_program_needs_no_library_of_ours(built: Path) -> None:
    assert "usermm" in run("ldd", built / "by_library").stdout
    assert "usermm" not in run("ldd", built / "by_device").stdout


@needs_userfaultfd
@needs_pkg_config
def test_pkg_config_finds_the_same(tmp_path: Path, story: str) -> None:
    sources = " ".join(str(EXAMPLE / name) for name in ("main.c", "cache.c", "by_library.c"))
    command = f"gcc -std=c11 $(pkg-config --cflags usermm) {sources} $(pkg-config --libs usermm) -o {tmp_path}/program"
    where = str(installation.pkgconfig_directory())
    done = run("sh", "-ec", command, PKG_CONFIG_PATH=where)
    assert (done.returncode, done.stderr) == (0, "")
    assert run(tmp_path / "program").stdout == story
    version = run("pkg-config", "--modversion", "usermm", PKG_CONFIG_PATH=where).stdout
    assert f"usermm {version}" == run(*USERMM.split(), "--version").stdout


def test_what_is_installed_is_what_the_sources_are() -> None:
    """A header or a page that was added, or changed, without building anew would mislead."""
    native = ROOT / "libusermm"
    stale = "run `make build`"
    assert texts(installation.header_directory(), "**/*.h") == texts(native / "include", "**/*.h"), stale
    installed, pages = texts(installation.man_directory(), "man*/*"), texts(native, "man/*")
    assert by_name(installed) == by_name(pages), stale
    assert PRELOAD.exists() or not list(native.glob("preload/*.c")), stale


def by_name(found: dict[Path, str]) -> dict[str, str]:
    return {path.name: text for path, text in found.items()}


def texts(folder: Path, pattern: str) -> dict[Path, str]:
    return {path.relative_to(folder): path.read_text() for path in folder.glob(pattern)}


def test_only_the_public_names_are_exported() -> None:
    lines = run("nm", "-D", "--defined-only", installation.library()).stdout.splitlines()
    names = {line.split()[-1] for line in lines}
    assert "usermm_open" in names and "usermm_cache_get" in names
    assert all(name.startswith("usermm_") for name in names)
