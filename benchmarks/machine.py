"""Where the figures come from, the C compiler included."""

from __future__ import annotations

import subprocess

from benchmarks.programs import COMPILER, FLAGS, BenchmarkError
from usermm.measurement import machine


def describe() -> dict[str, str]:
    """Words for the machine, its software, and how busy it is."""
    return {**machine.describe(), "compiler": f"{_compiler()} {' '.join(FLAGS)}"}


def _compiler() -> str:
    try:
        text = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise BenchmarkError(f"{COMPILER} is missing: apt install gcc libc6-dev") from None
    return text.splitlines()[0]
