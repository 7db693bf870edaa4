"""Ranks that read and write each other's arrays while these come and go, on one host and on two.

The program is examples/mpi_exchange: it knows what every byte has to be, and it asks the kernel what became of attached
memory, so that it can tell a stale attachment where MPI copies in software and no byte goes wrong.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hosts import Host, NoHostsError, two_hosts, write_launcher
from support.processes import SOURCE

PROGRAM = SOURCE.parent / "examples" / "mpi_exchange"
HOW_TO = SOURCE.parent / "docs" / "how-to" / "mpi.md"
MPIEXEC = Path(sys.executable).with_name("mpiexec")

FOUR_RANKS = [str(MPIEXEC), "-n", "4"]

# UCX takes processes of one kernel for neighbours, whatever their host names are, and shares memory with them.
NETWORK_ONLY = {"MPIR_CVAR_CH4_NETMOD": "ucx", "UCX_TLS": "tcp,self"}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or not MPIEXEC.exists(),
    reason="mpi4py and MPICH are not in this environment: pip install usermm[mpi]",
)


def run(launch: list[str], *words: str, path: Path = SOURCE, timeout_s: float = 60) -> tuple[int, str]:
    """Runs Python with `words` in several ranks; the status, and everything that they printed."""
    environment = {**os.environ, **NETWORK_ONLY, "PYTHONPATH": f"{SOURCE}{os.pathsep}{path}", "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        [*launch, sys.executable, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, text


def exchange(launch: list[str], *words: str) -> tuple[int, dict[str, int], str]:
    """Runs the program; its status, the numbers that it printed, and everything that it printed."""
    status, text = run(launch, str(PROGRAM), *words)
    lines = [line.split(": ") for line in text.splitlines()]
    return status, {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}, text


def on_two_hosts(hosts: tuple[Host, Host], path: Path) -> list[str]:
    """Two ranks on each. mpiexec itself is on the first host, and reaches the other as it would by rsh."""
    addresses = ",".join(host.address for host in hosts)
    options = ["-launcher", "rsh", "-launcher-exec", str(write_launcher(hosts, path)), "-localhost", hosts[0].address]
    return hosts[0].command(str(MPIEXEC), *options, "-hosts", addresses, "-ppn", "2", "-n", "4")


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with contextlib.ExitStack() as stack:
        try:
            both = stack.enter_context(two_hosts())
        except NoHostsError as reason:
            pytest.skip(f"no two hosts: {reason}")
        yield both


def test_four_ranks_on_one_host() -> None:
    status, facts, text = exchange(FOUR_RANKS)
    assert status == 0, text
    assert (facts["ranks"], facts["hosts"]) == (4, 1)
    assert facts["wrong bytes"] == facts["stale attachments handed out"] == facts["attached at the end"] == 0
    assert facts["attachments that went stale"] > 50, "the program did not do what it is for"
    assert facts["fetched bytes"] > 10_000_000 < facts["put bytes"]


def test_a_cache_that_is_told_of_nothing_is_found_out() -> None:
    """The same steps with a dictionary by address and length: the difference is what invalidations are for."""
    status, facts, text = exchange(FOUR_RANKS, "--no-invalidation")
    assert status == 1, text
    assert facts["stale attachments handed out"] > 20


def test_bytes_cross_a_cable_between_two_hosts(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    before = hosts[0].bytes_on_the_cable()
    status, facts, text = exchange(on_two_hosts(hosts, tmp_path))
    crossed = hosts[0].bytes_on_the_cable() - before
    assert status == 0, text
    assert (facts["ranks"], facts["hosts"]) == (4, 2)
    assert facts["wrong bytes"] == facts["stale attachments handed out"] == facts["attached at the end"] == 0
    assert facts["bytes across hosts"] > 10_000_000
    assert facts["bytes across hosts"] < crossed, "they went another way: shared memory?"
    assert crossed < 1.2 * facts["bytes across hosts"], "more than what went between the hosts"


def test_a_cache_that_is_told_of_nothing_is_found_out_on_two_hosts(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    status, facts, text = exchange(on_two_hosts(hosts, tmp_path), "--no-invalidation")
    assert status == 1, text
    assert facts["hosts"] == 2
    assert facts["stale attachments handed out"] > 20


def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    """Rank 1 gets no cache, and nobody may wait for it."""
    one_fails = "import os, usermm\nif os.environ.get('PMI_RANK') == '1': usermm.RegistrationCache = None\n"
    (tmp_path / "sitecustomize.py").write_text(one_fails)
    status, text = run(FOUR_RANKS, str(PROGRAM), path=tmp_path)
    assert status == 2, text
    assert "TypeError" in text


def test_one_rank_is_too_few() -> None:
    status, text = run([str(MPIEXEC), "-n", "1"], str(PROGRAM))
    assert (status, text.strip().count("\n")) == (2, 0), text
    assert "mpiexec -n 4" in text


def test_the_program_of_the_how_to(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(re.findall(r"```python\n(.*?)```", HOW_TO.read_text(), re.DOTALL)[0])
    assert run([str(MPIEXEC), "-n", "2"], str(program)) == (0, "")


def test_hosts_are_gone_afterwards_with_all_that_ran_on_them() -> None:
    """Also when the block raises."""
    try:
        with two_hosts() as both:
            command = both[1].command("sh", "-c", "echo; exec sleep 1000")
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert process.stdout and process.stdout.readline() == b"\n"
            raise ZeroDivisionError
    except NoHostsError as reason:
        pytest.skip(f"no two hosts: {reason}")
    except ZeroDivisionError:
        process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not [host for host in both if host.name in left]
