"""``usermm bench``: that it runs, what it prints, its exit status. No figure is held against anything here."""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import signal
import subprocess
import sys
from typing import Any

import pytest
from support.available import needs_userfaultfd

TABLES = ["hit_1", "hit_1000", "hit_100000", "miss", "after_unmap", "registering"]
MACHINE = {"cpu", "cores", "virtual", "kernel", "python", "usermm", "load"}

# Change something, then run the command line in that process: python -c PATCHED CHANGE ARGUMENTS...
PATCHED = "import sys; exec(sys.argv[1]); from usermm.__main__ import main; sys.exit(main(sys.argv[2:]))"
FEW = "from usermm.measurement import bench; bench.COUNTS = (1, 10); "


pytestmark = needs_userfaultfd


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=240, check=False)


def patched(change: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-c", PATCHED, change, "bench", "--quick", *arguments)


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    """What a quick run says."""
    done = python("-m", "usermm", "bench", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    data: dict[str, Any] = json.loads(done.stdout)
    return data


def rows(data: dict[str, Any]) -> list[str]:
    return [figure["name"] for table in data["benchmarks"] for figure in table["measured"]]


def test_every_table_is_there(quick: dict[str, Any]) -> None:
    assert set(quick) == {"machine", "effort", "benchmarks"}
    assert [table["name"] for table in quick["benchmarks"]] == TABLES
    for table in quick["benchmarks"]:
        for figure in (*table["measured"], *table["compared"]):
            values = [figure["minimum"], figure["median"], figure["maximum"]]
            assert values == sorted(values) and all(map(math.isfinite, values))
            assert figure["at_most"] is None  # bars are for this project's own benchmarks


def test_each_name_is_measured_once(quick: dict[str, Any]) -> None:
    for table in quick["benchmarks"]:
        names = [figure["name"] for figure in (*table["measured"], *table["compared"])]
        assert len(names) == len(set(names))


def test_machine_and_kernel_are_named(quick: dict[str, Any]) -> None:
    assert set(quick["machine"]) == MACHINE
    assert quick["machine"]["kernel"] == platform.release()
    assert all(quick["machine"].values())


def test_peers_by_hand_are_in_every_table_of_hits(quick: dict[str, Any]) -> None:
    for table in quick["benchmarks"][:3]:
        names = {figure["name"] for figure in table["measured"]}
        assert {"dict, key ready made", "dict, key made of the buffer", "weakref.finalize"} <= names


def test_the_text_is_the_same_figures_and_fits() -> None:
    done = patched(FEW)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert platform.release() in done.stdout
    for words in ("cache.get(buffer), the same object", "weakref.finalize", "mlock and munlock, 64 KiB", "NumPy"):
        assert words in done.stdout
    assert all(len(line) <= 120 and line.isprintable() for line in done.stdout.splitlines())


def test_without_numpy_and_ucx_there_are_fewer_rows_and_notes() -> None:
    done = patched(FEW + "sys.modules['numpy'] = sys.modules['libucx'] = None", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    notes = " ".join(data["benchmarks"][0]["notes"])
    assert "memoryviews (NumPy is not installed)" in notes
    assert "UCX is not installed" in notes and "pip install libucx-cu12==1.22.0" in notes
    assert not [row for row in rows(data) if "UCX" in row]


@pytest.mark.skipif(not importlib.util.find_spec("libucx"), reason="needs UCX: pip install libucx-cu12==1.22.0")
def test_ucx_is_beside_us_and_leaves_libc_alone() -> None:
    """UCX patches libc as soon as it is loaded, unless it is told not to."""
    look = (
        "import atexit, ctypes; libc = ctypes.CDLL(None); "
        "code = lambda: [ctypes.string_at(ctypes.cast(libc[name], ctypes.c_void_p).value, 16)"
        " for name in ('munmap', 'mmap', 'madvise', 'mremap')]; "
        "before = code(); atexit.register(lambda: print(code() == before)); "
    )
    done = patched(look + FEW, "--json")
    assert done.returncode == 0, done.stderr
    text, _, untouched = done.stdout.strip().rpartition("\n")
    assert untouched == "True"
    data = json.loads(text)
    assert len([row for row in rows(data) if row.startswith("UCX 1.22")]) == 2 + 1 + 2


def test_without_io_uring_its_rows_are_a_note() -> None:
    change = (
        "import errno, usermm; from usermm.measurement import registering\n"
        "def forbidden(slots): raise usermm.UnavailableError(errno.EPERM, 'io_uring_setup: the cure')\n"
        "registering.Ring = forbidden\n"
    )
    done = patched(change + FEW, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert not [row for row in rows(data) if "io_uring" in row]
    assert "io_uring, a fixed buffer is missing: io_uring_setup: the cure" in data["benchmarks"][-1]["notes"]


def test_without_userfaultfd_it_is_one_line_and_status_2() -> None:
    change = (
        "import errno, usermm; from usermm.measurement import hits\n"
        "class Forbidden:\n"
        "    def __init__(self, device): raise usermm.UnavailableError(errno.EPERM, 'open: see `usermm doctor`')\n"
        "hits.RegistrationCache = Forbidden\n"
    )
    done = patched(change, "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "usermm bench: open: see `usermm doctor`\n"


def test_too_little_address_space_is_one_line_and_status_2() -> None:
    change = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)); "
    done = patched(change, "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("usermm bench: mmap of ") and "ulimit -v" in line


def test_ctrl_c_is_one_line_and_status_130() -> None:
    command = [sys.executable, "-m", "usermm", "bench"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().startswith("cpu")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "\nusermm bench: interrupted\n"
