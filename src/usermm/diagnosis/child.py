"""The self-test in a process of its own: a broken monitor blocks it for ever, and it shrinks its own heap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from usermm.monitors.base import EventTrial, Monitor, Outcome, RaceTrial, SelfTest

TIMEOUT_S: Final = 60.0
"""A healthy self-test takes one to three seconds; a hung one is killed, which frees what it blocks."""

_PROGRAM: Final = "from usermm.diagnosis.child import main; main('userfaultfd')"
KERNEL_PROGRAM: Final = "from usermm.diagnosis.child import main; main('kernel')"


@dataclass(frozen=True, slots=True)
class Trial:
    """The result, or in `problem` why there is none."""

    result: SelfTest | None
    problem: str = ""


def try_in_child(timeout_s: float = TIMEOUT_S, program: str = _PROGRAM) -> Trial:
    """Runs the self-test of a monitor, of userfaultfd if no other `program` is given, in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # -P: what lies in the current directory is not imported.
    command = [sys.executable, "-P", "-c", program]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return Trial(None, f"the self-test hung and was killed after {timeout_s:g} s")
    except OSError as error:  # the interpreter may be another user's, or gone
        return Trial(None, f"the self-test did not start: {sys.executable}: {error.strerror}")
    if child.returncode != 0:
        last = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return Trial(None, last or f"the self-test ended with status {child.returncode}")
    return Trial(_from_dict(json.loads(child.stdout)))


def main(name: Literal["userfaultfd", "kernel"]) -> None:
    """The child: the result goes to standard output as JSON; an error ends it, the last line says which."""
    import usermm
    from usermm.monitors import kernel, userfaultfd

    monitor: Monitor = kernel if name == kernel.NAME else userfaultfd
    result = monitor.self_test(lambda: usermm.Ummunotify(monitor=name), owns_heap=True)
    json.dump(asdict(result), sys.stdout)


def _from_dict(found: Mapping[str, Any]) -> SelfTest:
    events = (EventTrial(**{**event, "outcome": Outcome(event["outcome"])}) for event in found["events"])
    return SelfTest(tuple(events), tuple(RaceTrial(**race) for race in found["races"]))
