"""The source distribution has all that setup.py compiles and copies; what that makes of it, test_c_examples sees."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from support.pages import ROOT

NOT_SHIPPED = {"build", "__pycache__"}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in the archive, below its top folder."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools (`make build` brings it)")
    folder = tmp_path_factory.mktemp("sdist")
    metadata = ("egg_info", "--egg-base", folder)
    command = [sys.executable, "setup.py", "-q", *metadata, "sdist", "--formats=tar", "-d", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar")
    with tarfile.open(archive) as tar:
        return {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}


def sources(folder: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not NOT_SHIPPED & set(path.parts) and path.suffix not in (".so", ".o", ".a", ".pyc")
    }


def test_the_c_sources_are_all_there(shipped: set[str]) -> None:
    assert sources("libusermm") <= shipped
    assert {"setup.py", "pyproject.toml", "src/usermm/version.py", "libusermm/usermm.pc.in"} <= shipped


def test_nothing_that_was_built_is_there(shipped: set[str]) -> None:
    filled = tuple(f"src/usermm/{part}/" for part in ("lib", "include", "share"))
    assert not [name for name in shipped if name.startswith(filled)]
    assert not [name for name in shipped if Path(name).suffix in (".so", ".o", ".a")]


def test_every_package_is_there(shipped: set[str]) -> None:
    """None became a namespace by a forgotten __init__.py, which setuptools would leave out."""
    assert {name for name in sources("src/usermm") if name.endswith((".py", ".pyi", "py.typed"))} <= shipped
