"""The extension's C under the sanitizers: the tests of memory and channels once more, with a copy built for each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import compiled
from support.processes import TESTS

WHAT = (
    "unit/test_channel_rings.py",
    "integration/test_granted_memory.py",
    "integration/test_channel.py",
    "integration/test_channel_last_words.py",
    "integration/test_channel_asyncio.py",
    "stress/test_channel_threads.py",
)
# Of the interpreter nothing is freed at exit; some tests want the SIGSEGV and SIGBUS themselves.
ASAN = "detect_leaks=0:handle_segv=0:handle_sigbus=0"
PROGRAM = """
import sys
import pytest
import usermm._core
assert usermm._core.__file__.startswith(sys.argv[1]), usermm._core.__file__
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""

pytestmark = pytest.mark.skipif(compiled.MISSING is not None, reason=str(compiled.MISSING))


@pytest.mark.parametrize("sanitizer", ["address", "undefined"])
def test_nothing_is_found(sanitizer: str, tmp_path: Path) -> None:
    run_time = compiled.run_time(sanitizer)
    if run_time is None:
        pytest.skip(f"needs the run time of gcc's -fsanitize={sanitizer}")
    options = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
    source = compiled.package_with(tmp_path / "sanitized", *options)
    environment = {**os.environ, "PYTHONPATH": str(source), "LD_PRELOAD": str(run_time), "ASAN_OPTIONS": ASAN}
    command = [sys.executable, "-c", PROGRAM, str(source), *(str(TESTS / name) for name in WHAT)]
    done = subprocess.run(
        command, cwd=TESTS.parent, capture_output=True, text=True, env=environment, timeout=250, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
