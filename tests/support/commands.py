"""`usermm VERB` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from support.processes import SOURCE
from usermm import installation
from usermm.errors import UsermmError

TIMEOUT_S = 60


def _why_not() -> str:
    try:
        installation.preload_library()
    except UsermmError as error:
        return str(error)
    return ""


needs_preload = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


def command(*arguments: str | Path, python: str = sys.executable) -> list[str]:
    return [python, "-m", "usermm", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """Ours, without what an outer `usermm run` may have set."""
    outer = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "USERMM_TRACE")}
    return {**outer, "PYTHONPATH": str(SOURCE), **more}


def usermm(*arguments: str | Path, python: str = sys.executable, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Runs it to its end; `options` are subprocess.run's. Without bytes as input and text=False the output is text."""
    settings: dict[str, Any] = {"env": environment(), "capture_output": True, "timeout": TIMEOUT_S}
    if "input" not in options or isinstance(options["input"], str):
        settings["text"] = True
    return subprocess.run(command(*arguments, python=python), check=False, **{**settings, **options})


def library() -> str:
    return str(installation.preload_library())


def script(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    path.chmod(0o755)
    return path
