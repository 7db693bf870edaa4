"""``usermm doctor`` for real: as root, as nobody, and behind a filter like that of a container."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Final

import pytest
from support.users import NOBODY, public_python, root_only

import usermm
from usermm.diagnosis import child, environment
from usermm.monitors import races, trials, userfaultfd
from usermm.monitors.base import Outcome
from usermm.uapi.userfaultfd import SYSTEM_CALL

SOURCE: Final = str(Path(usermm.__file__).parent.parent)
TIMEOUT_S: Final = 120

# As Docker's default profile does: EPERM for userfaultfd(2), everything else allowed. See seccomp(2).
_BLOCK: Final = """
    import ctypes, struct
    libc = ctypes.CDLL(None, use_errno=True)
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, {number}), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(Filter(len(code), ctypes.addressof(program)))) == 0
"""
_RUN: Final = """
    import os, sys
    os.execv(sys.executable, [sys.executable, "-m", "usermm", "doctor", *sys.argv[1:]])
"""

def _doctor(*arguments: str, user: int | None = None, block: bool = False) -> subprocess.CompletedProcess[str]:
    number = SYSTEM_CALL.get(os.uname().machine)
    if block and number is None:
        pytest.skip(f"no system call number known for {os.uname().machine}")
    program = textwrap.dedent(_BLOCK.replace("{number}", str(number)) if block else "") + textwrap.dedent(_RUN)
    python = sys.executable if user is None else public_python()
    return subprocess.run(
        [python, "-c", program, *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": SOURCE},
        cwd="/",
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def _examined(*arguments: str, user: int | None = None, block: bool = False) -> tuple[int, dict[str, Any]]:
    done = _doctor("--json", *arguments, user=user, block=block)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def _ways(data: dict[str, Any]) -> dict[str, bool]:
    return {way["name"]: way["errno"] == 0 for way in data["monitors"]["userfaultfd"]["availability"]["ways"]}


def _assert_exact(data: dict[str, Any]) -> None:
    monitor = data["monitors"]["userfaultfd"]
    assert data["exact"]
    assert monitor["problem"] == ""
    outcomes = {event["name"]: event["outcome"] for event in monitor["events"] if event["promised"]}
    assert {trial.name for trial in (*trials.PROMISED, trials.HEAP)} == set(outcomes)
    assert set(outcomes.values()) <= {"seen", "absent"}
    for race in monitor["races"]:
        assert race["wrong"] == 0
        assert 100 < race["trials"] <= races.TRIALS  # fewer on a busy machine


@root_only
def test_as_root_everything_works() -> None:
    status, data = _examined()
    assert status == 0
    assert _ways(data)[userfaultfd.USER_MODE]
    _assert_exact(data)
    assert not [cure for cure in data["cures"] if cure["needed"]]


@root_only
def test_nobody_gets_exact_notifications_too() -> None:
    """UFFD_USER_MODE_ONLY is for everybody, and nothing is ever protected: no privilege is needed."""
    status, data = _examined(user=NOBODY)
    assert status == 0
    _assert_exact(data)
    assert data["environment"]["effective_user_id"] == NOBODY
    if data["environment"]["unprivileged_userfaultfd"] == 0:
        assert not _ways(data)[userfaultfd.FULL]
        assert ["sysctl -w vm.unprivileged_userfaultfd=1"] in [cure["commands"] for cure in data["cures"]]


@root_only
def test_behind_a_filter_the_device_node_serves() -> None:
    if not os.path.exists(userfaultfd.NODE):
        pytest.skip(f"no {userfaultfd.NODE} here: Linux 6.1")
    status, data = _examined(block=True)
    assert _ways(data) == {userfaultfd.FULL: False, userfaultfd.USER_MODE: False, userfaultfd.NODE: True}
    assert status == 0
    _assert_exact(data)


@root_only
def test_behind_a_filter_without_the_node_there_is_nothing_and_the_cure_is_named() -> None:
    status, data = _examined(user=NOBODY, block=True)
    if _ways(data)[userfaultfd.NODE]:
        pytest.skip(f"{userfaultfd.NODE} is open to everybody here")
    assert status == 1
    assert not data["exact"]
    monitor = data["monitors"]["userfaultfd"]
    assert not monitor["availability"]["available"]
    assert "UnavailableError" in monitor["problem"]
    needed = [cure for cure in data["cures"] if cure["needed"]]
    assert "seccomp filter" in needed[0]["problem"]
    assert any(f"--device {userfaultfd.NODE}" in command for command in needed[0]["commands"])
    text = _doctor(user=NOBODY, block=True)
    assert text.returncode == 1
    assert text.stdout.startswith("exact notifications here: NO\n")


def test_as_text_the_answer_comes_first_and_every_line_is_valid_text() -> None:
    done = _doctor()
    assert done.stdout.startswith(f"exact notifications here: {'yes' if done.returncode == 0 else 'NO'}\n")
    assert all(line.isprintable() for line in done.stdout.splitlines())


def test_probing_leaves_no_descriptor() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    availability = userfaultfd.probe_availability()
    assert [way.name for way in availability.ways] == [userfaultfd.FULL, userfaultfd.USER_MODE, userfaultfd.NODE]
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_the_self_test_runs_in_a_busy_process_as_well() -> None:
    """Without the heap, which belongs to malloc here."""
    before = sorted(os.listdir("/proc/self/fd"))
    found = userfaultfd.self_test(usermm.Ummunotify)
    assert found.exact
    assert [event.name for event in found.events if event.outcome is Outcome.FAILED] == []
    assert trials.HEAP.name not in [event.name for event in found.events]
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 8  # the monitor's own stay, nothing of the trials does


def test_a_hung_self_test_is_killed_and_reported() -> None:
    trial = child.try_in_child(0.5, "import time; time.sleep(60)")
    assert trial.result is None
    assert "hung" in trial.problem


def test_a_crashed_self_test_is_reported() -> None:
    assert child.try_in_child(30, "raise SystemExit('no luck')").problem == "no luck"
    assert "status -" in child.try_in_child(30, "import os; os.abort()").problem


def test_an_interpreter_that_cannot_be_executed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/etc/passwd", "/no/such/python", ""):
        monkeypatch.setattr(sys, "executable", path)
        trial = child.try_in_child()
        assert trial.result is None
        assert trial.problem.startswith("the self-test did not start: ")


def test_another_userfaultfd_on_our_memory_is_seen() -> None:
    with usermm.Ummunotify() as device:
        buffer = bytearray(1 << 20)
        device.register(buffer)
        watched = environment.look().watched
        assert any(mapping.modes == ("write-protect",) for mapping in watched)
