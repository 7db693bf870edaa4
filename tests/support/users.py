"""Another user, for what root may do and others may not."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from support.processes import SOURCE

NOBODY = 65534

_PR_SET_DUMPABLE = 4  # linux/prctl.h

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root: run the tests as root")


@cache
def public_python() -> str:
    """An interpreter that nobody may execute and that can import this usermm."""
    for candidate in (sys.executable, "/usr/bin/python3", shutil.which("python3") or ""):
        try:
            command = [candidate, "-c", "import usermm"]
            where = {"PYTHONPATH": str(SOURCE)}
            subprocess.run(command, env=where, check=True, capture_output=True, user=NOBODY, group=NOBODY, cwd="/")
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    pytest.skip("no interpreter that an unprivileged user may run: apt install python3, and a readable checkout")


@contextmanager
def public_folder() -> Iterator[Path]:
    """One that everybody may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="usermm-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def become(uid: int) -> None:
    """This process, which is root's, is from now on the user's, with a group of the same number and no way back.

    As a program that this user started it can be looked into by others of its user: the kernel takes that away when
    the user changes.
    """
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
