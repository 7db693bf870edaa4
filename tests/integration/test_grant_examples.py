"""The examples of channels run, and print what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def lines_of(name: str) -> list[str]:
    """What the example prints; it must print no more than that, and end well."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_camera() -> None:
    assert lines_of("camera.py") == [f"viewer {number} saw 50 frames, sum 1225" for number in range(3)]


def test_sandboxed_decoder() -> None:
    isolated = os.geteuid() == 0  # then the three are of three users
    assert sorted(lines_of("sandboxed_decoder.py")) == [
        "caller: the picture is right: True",
        f"decoder: isolated from its caller: {isolated}",
        "decoder: may it write the input? the grant is read-only",
        "decoder: taken back, the picture reads b'\\x00\\x00\\x00\\x00'",
    ]


def test_worker_pool() -> None:
    """A worker that is killed before it has answered is replaced; one that was faster is replaced at its next task."""
    lines = lines_of("worker_pool.py")
    done = [line for line in lines if "right" in line]
    assert done == [f"task {task}: worker {task % 2} says {(task + 1) ** 2}, right: True" for task in range(8)]
    (gone,) = [line for line in lines if "gone" in line]
    assert "worker 1 is gone; another one does it again" in gone
