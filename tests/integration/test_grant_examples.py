"""The examples of channels run, and print what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_camera() -> None:
    command = [sys.executable, str(EXAMPLES / "camera.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"viewer {number} saw 50 frames, sum 1225" for number in range(3)]
