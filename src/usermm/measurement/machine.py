"""Where the figures come from: without it they mean nothing to somebody else."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from usermm.version import __version__


def describe() -> dict[str, str]:
    """Words for the machine, its software, and how busy it is."""
    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "virtual": "yes" if " hypervisor " in f"{_cpu_line('flags')} " else "no",
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}, {platform.python_compiler()}",
        "usermm": __version__,
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _cpu_line(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _cpu_model() -> str:
    name = _cpu_line("model name") or platform.machine()
    numbers = [f"{key} {_cpu_line(key)}" for key in ("cpu family", "model") if _cpu_line(key)]
    return ", ".join([name, *numbers])
