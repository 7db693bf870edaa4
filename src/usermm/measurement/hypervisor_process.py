"""`usermm hypervisor` in a process of its own, as long as something is measured."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from usermm.errors import UsermmError


class HypervisorProcess(NamedTuple):
    """Where it listens, and its process id."""

    path: str
    pid: int


@contextlib.contextmanager
def hypervisor(policy: str = "") -> Iterator[HypervisorProcess]:
    """With the text of a policy file. Raises UsermmError when it does not start."""
    with tempfile.TemporaryDirectory(prefix="usermm-", dir="/tmp") as folder:
        path, policy_path = os.path.join(folder, "s"), os.path.join(folder, "policy.toml")
        with open(policy_path, "w", encoding="utf-8") as file:
            file.write(policy)
        command = [sys.executable, "-m", "usermm", "hypervisor", "--socket", path, "--policy", policy_path]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            try:
                said = process.stderr.readline()  # once it listens, or why it does not
                if process.poll() is not None or not os.path.exists(path):
                    raise UsermmError(f"usermm hypervisor --socket {path}: it did not start: {said.strip()}")
                yield HypervisorProcess(path, process.pid)
            finally:
                process.terminate()
