"""Programs under the preload library."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support import available, compiled
from support.processes import SOURCE

LIBRARY = SOURCE / "usermm" / "lib" / "libusermm-preload.so"

MISSING = compiled.MISSING or (available.why_not() if LIBRARY.exists() else f"needs {LIBRARY.name}: run make build")
"""Why no program can be run under it here; empty when one can."""

needs_preload = pytest.mark.skipif(bool(MISSING), reason=MISSING)

Word = str | Path | int


def run(
    command: Sequence[Word],
    *,
    library: Path | str = LIBRARY,
    preloaded: bool = True,
    timeout_s: float = 60,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs a program under `library`, or several with colons. Raises subprocess.TimeoutExpired, having killed it."""
    inherited = {**os.environ, **environment, **({"LD_PRELOAD": str(library)} if preloaded else {})}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, env=inherited, check=False)


def run_well(command: Sequence[Word], **options: Any) -> str:
    """As run; the program must end with status 0 and an empty stderr. Returns its output."""
    done = run(command, **options)
    assert (done.returncode, done.stderr) == (0, ""), f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tool(name: str, package: str) -> str:
    """The path of a program, or a skip that says which package has it."""
    found = shutil.which(name)
    if not found:
        pytest.skip(f"needs {name}: apt install {package}")
    return found


def optional_library(name: str, package: str) -> str:
    """The path of a shared library, or a skip that says which package has it."""
    done = subprocess.run([tool("gcc", "gcc"), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    if not path.is_absolute() or not path.exists():
        pytest.skip(f"needs {name}: apt install {package}")
    return str(path.resolve())
