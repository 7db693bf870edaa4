"""`usermm hypervisor` as a process: serving, its signals, its questions, and what systemd gives it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import TIMEOUT_S, command, environment, usermm
from support.users import NOBODY, public_python, root_only

from usermm.errors import HypervisorGoneError, PermissionDeniedError
from usermm.grants.domain import Domain
from usermm.hypervisor.listener import Listener

UNITS = Path(__file__).parents[2] / "share" / "systemd"
LISTENING = "usermm hypervisor: listening on"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, for a socket's path, and open to other users."""
    path = Path(tempfile.mkdtemp(prefix="usermm-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


class Running:
    """A hypervisor that listens, with what it has said."""

    def __init__(self, *arguments: str | Path, **options: Any) -> None:
        words = command("hypervisor", *arguments, python=options.pop("python", sys.executable))
        settings: dict[str, Any] = {"env": environment(), "stderr": subprocess.PIPE, "text": True, **options}
        self.process = subprocess.Popen(words, **settings)
        assert self.process.stderr is not None
        self.stderr = self.process.stderr
        line = self.stderr.readline()
        if not line.startswith(LISTENING):
            rest = self.stderr.read()
            self.end(signal.SIGKILL)
            pytest.fail(f"it does not listen: {line}{rest}")

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        status = self.process.wait(TIMEOUT_S)
        self.stderr.close()
        return status


@pytest.fixture
def start(directory: Path) -> Iterator[Callable[..., Running]]:
    """Starts hypervisors on the socket "s"; what still runs at the end is killed."""
    started: list[Running] = []

    def running(*arguments: str | Path, **options: Any) -> Running:
        started.append(Running("--socket", directory / "s", *arguments, **options))
        return started[-1]

    yield running
    for hypervisor in started:
        if hypervisor.process.poll() is None:
            hypervisor.end(signal.SIGKILL)
        hypervisor.stderr.close()


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(path: Path, event: str, count: int = 1) -> list[dict[str, Any]]:
    end = time.monotonic() + TIMEOUT_S
    while True:
        found = [record for record in records(path) if record["event"] == event]
        if len(found) >= count:
            return found
        assert time.monotonic() < end, f"no {event} in the audit"
        time.sleep(0.01)


def status(directory: Path) -> dict[str, Any]:
    done = usermm("hypervisor", "status", "--json", "--socket", directory / "s")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_and_removes_its_socket(
    start: Callable[..., Running], directory: Path, number: signal.Signals
) -> None:
    hypervisor = start()
    assert stat.S_IMODE((directory / "s").stat().st_mode) == 0o666
    domain = Domain(str(directory / "s"))
    assert hypervisor.end(number) == 0
    assert sorted(path.name for path in directory.iterdir()) == ["s.lock"]
    with pytest.raises(HypervisorGoneError):
        domain.store.read("name")
    domain.close()


def test_the_socket_has_the_mode_that_was_asked_for(start: Callable[..., Running], directory: Path) -> None:
    start("--mode", "0600")
    assert stat.S_IMODE((directory / "s").stat().st_mode) == 0o600


def test_its_directory_is_made(directory: Path) -> None:
    hypervisor = Running("--socket", directory / "a" / "b" / "s")
    assert stat.S_IMODE((directory / "a" / "b").stat().st_mode) == 0o755
    assert hypervisor.end() == 0


def test_after_a_kill_the_next_one_takes_over_with_another_incarnation(
    start: Callable[..., Running], directory: Path
) -> None:
    start().end(signal.SIGKILL)
    assert (directory / "s").exists()
    first = int((directory / "s.lock").read_text().split()[0])
    start()
    assert status(directory)["hypervisor"]["incarnation"] & 0xFFF == (first + 1) % 4096


def test_a_second_one_is_refused_and_the_first_goes_on(start: Callable[..., Running], directory: Path) -> None:
    hypervisor = start()
    done = usermm("hypervisor", "--socket", directory / "s")
    assert done.returncode == 2
    assert f"the hypervisor of process {hypervisor.process.pid} has this socket" in done.stderr
    assert done.stderr.count("\n") == 1
    with Domain(str(directory / "s")) as domain:
        assert domain.domid == 1


def as_nobody() -> dict[str, Any]:
    return {"python": public_python(), "user": NOBODY, "group": NOBODY, "extra_groups": [], "cwd": "/"}


def test_its_memory_is_closed_to_its_own_user(start: Callable[..., Running], directory: Path) -> None:
    """PR_SET_DUMPABLE 0: its files below /proc belong to root."""
    directory.chmod(0o777)
    hypervisor = start(**as_nobody() if os.geteuid() == 0 else {})
    assert os.stat(f"/proc/{hypervisor.process.pid}/status").st_uid == 0


@root_only
def test_it_serves_as_a_user_of_its_own(start: Callable[..., Running], directory: Path) -> None:
    """Not dumpable, it still has to reach its own /proc/self/fd, which is root's then."""
    directory.chmod(0o777)
    start(**as_nobody())
    with Domain(str(directory / "s")) as one, Domain(str(directory / "s")) as other:
        pages = one.gntalloc.allocate(other.domid, 2, writable=True)
        mapping = other.gntdev.map(one.domid, pages.references, writable=True)
        memoryview(mapping)[:5] = b"hello"
        assert bytes(memoryview(pages)[:5]) == b"hello"
        assert status(directory)["hypervisor"]["uid"] == NOBODY
        mapping.close()
        pages.close()


@root_only
def test_the_status_is_not_for_everybody(start: Callable[..., Running], directory: Path) -> None:
    policy = directory / "policy.toml"
    policy.write_text("")
    hypervisor = start("--policy", policy)
    ask = ("hypervisor", "status", "--socket", directory / "s")
    done = usermm(*ask, **as_nobody())
    assert done.returncode == 2
    assert "status" in done.stderr
    assert done.stderr.count("\n") == 1
    policy.write_text(f"[[rule]]\nuser = {NOBODY}\nstatus = true\n")
    hypervisor.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + TIMEOUT_S
    while usermm(*ask, **as_nobody()).returncode != 0:
        assert time.monotonic() < end, "the policy is not reloaded"


def test_the_policy_is_reloaded_and_a_wrong_one_changes_nothing(start: Callable[..., Running], directory: Path) -> None:
    policy, audit, path = directory / "policy.toml", directory / "audit", str(directory / "s")
    policy.write_text("domains_per_user = 1\n")
    hypervisor = start("--policy", policy, "--audit", audit)
    Domain(path).close()
    wait_for(audit, "leave")
    with Domain(path, name="first") as first:
        with pytest.raises(OSError, match="domains_per_user 1"):
            Domain(path)
        policy.write_text("domains_per_user = 2\n")
        hypervisor.process.send_signal(signal.SIGHUP)
        assert wait_for(audit, "policy")[0]["loaded"]
        with Domain(path) as second:
            assert (first.domid, second.domid) == (2, 3), "numbers go on, and who is connected stays"
            policy.write_text("domains_per_user = many\n")
            hypervisor.process.send_signal(signal.SIGHUP)
            refused = wait_for(audit, "policy", 2)[1]
            assert not refused["loaded"]
            said = [hypervisor.stderr.readline() for _ in range(2)]
            assert "loaded anew" in said[0] and "(the policy stays as it was)" in said[1]
            with pytest.raises(OSError, match="domains_per_user 2"):
                Domain(path)
            assert first.store.read("name") == b"first"


def test_a_pool_grants_nothing_that_the_new_policy_forbids(start: Callable[..., Running], directory: Path) -> None:
    """Single pages come from pools, for which the hypervisor is not asked; what is granted stays granted."""
    policy, audit, path = directory / "policy.toml", directory / "audit", str(directory / "s")
    policy.write_text("")
    hypervisor = start("--policy", policy, "--audit", audit)
    with Domain(path) as one, Domain(path) as other, Domain(path) as third:
        for peer in (other, third):
            one.gntalloc.allocate(peer.domid).close()
        before = [one.gntalloc.allocate(peer.domid) for peer in (other, third)]
        policy.write_text(f"[[rule]]\nuser = {os.getuid()}\nmay_grant_to = [{third.domid}]\n")
        hypervisor.process.send_signal(signal.SIGHUP)
        assert wait_for(audit, "policy")[0]["loaded"]
        with pytest.raises(PermissionDeniedError, match="the policy does not let"):
            one.gntalloc.allocate(other.domid)
        one.gntalloc.allocate(third.domid).close()
        with other.gntdev.map(one.domid, before[0].references) as mapping:
            before[0].write(0, b"x")
            assert mapping.read(0, 1) == b"x"
        for page in before:
            page.close()
        one.is_isolated_from(other.domid)
        grants = status(directory)["grants"]
        assert [grant["grantee"] for grant in grants] == [third.domid], grants


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--policy", "/none"], "policy(/none): No such file or directory"),
        (["--audit", "/none/audit"], "audit(/none/audit): No such file or directory"),
        (["--mode", "999"], "'999' is no mode from 0 to 0777"),
        (["--mode", "01000"], "is no mode"),
        (["--socket", "/tmp/" + "x" * 120], "longer than 107 bytes"),
        (["--socket", "/etc/passwd"], "it is no socket and is kept"),
        (["what"], "invalid choice: 'what'"),
        (["status", "--socket", "/none"], "none listens there: start `usermm hypervisor --socket /none`"),
        (["graph", "--mode", "600"], "unrecognized arguments: --mode 600"),
        (["--mode", "600", "graph"], "--mode is for serving: leave it out to ask"),
        (["--policy", "/none", "status"], "--policy is for serving: leave it out to ask"),
    ],
)
def test_what_cannot_be_done_is_one_line(directory: Path, arguments: list[str], reason: str) -> None:
    words = arguments if "--socket" in arguments else ["--socket", str(directory / "s"), *arguments]
    done = usermm("hypervisor", *words)
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert not (directory / "s").exists()
    assert not any(Path(word + ".lock").exists() for word in words if word.startswith(("/tmp/x", "/etc")))


def test_status_and_graph_show_what_is_shared(start: Callable[..., Running], directory: Path) -> None:
    start("--audit", directory / "audit")
    path = str(directory / "s")
    with Domain(path, name="producer") as producer, Domain(path, name="consumer") as consumer:
        pages = producer.gntalloc.allocate(consumer.domid, 3)
        mapping = consumer.gntdev.map(producer.domid, pages.references)
        port = producer.evtchn.bind_unbound_port(consumer.domid)
        consumer.evtchn.bind_interdomain(producer.domid, port)
        data = status(directory)
        (grant,) = data["grants"]
        assert (grant["grantor"], grant["grantee"], grant["count"], grant["writable"]) == (1, 2, 3, False)
        assert not grant["isolated"], "one user"
        assert sum(held["pages"] for held in grant["mapped_by"]) == 3
        assert [domain["name"] for domain in data["domains"]] == ["producer", "consumer"]
        assert data["domains"][0]["usage"]["grants"] == 3
        assert data["domains"][1]["usage"]["mapped"] == 3
        text = usermm("hypervisor", "--socket", path, "status").stdout
        assert "producer (1)  consumer (2)" in text
        assert "granted, not isolated" in text
        assert "producer (1) port 1  <->  consumer (2) port 1" in text
        picture = usermm("hypervisor", "graph", "--socket", path).stdout
        assert "domain 1 grants domain 2 3 pages ro, not isolated" in picture
        ET.fromstring(picture)
        assert usermm("hypervisor", "graph", "--socket", path, "--output", directory / "g.svg").returncode == 0
        assert (directory / "g.svg").read_text() == picture
        refused = usermm("hypervisor", "graph", "--socket", path, "--output", directory / "none" / "g")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        mapping.close()
        pages.close()
    events = [record["event"] for record in wait_for(directory / "audit", "leave", 2) and records(directory / "audit")]
    assert events[0] == "start"
    assert [event for event in events if event in ("arrive", "grant", "map")] == ["arrive", "arrive", "grant", "map"]
    assert stat.S_IMODE((directory / "audit").stat().st_mode) == 0o600


def test_the_environment_names_the_socket(directory: Path) -> None:
    variables = environment(USERMM_HYPERVISOR=str(directory / "s"))
    hypervisor = Running(env=variables)
    done = usermm("hypervisor", "status", env=variables)
    assert done.stdout.startswith("hypervisor ")
    assert str(directory / "s") in done.stdout
    assert hypervisor.end() == 0


def test_it_has_as_many_descriptors_as_it_may(start: Callable[..., Running]) -> None:
    soft_before, hard_before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard_before))
    try:
        hypervisor = start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft_before, hard_before))
    with open(f"/proc/{hypervisor.process.pid}/limits", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith("Max open files"))
    soft, hard = line.split()[3:5]
    assert int(soft) == int(hard) >= hard_before


# ---- systemd

socket_activate = shutil.which("systemd-socket-activate") or ""
analyze = shutil.which("systemd-analyze") or ""


@pytest.mark.skipif(not socket_activate, reason="no systemd-socket-activate: install systemd")
def test_systemd_starts_it_on_the_first_connection(directory: Path) -> None:
    path = str(directory / "s")
    words = [socket_activate, "--seqpacket", "--listen", path, "-E", "PYTHONPATH", *command("hypervisor")]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        while path not in process.stderr.readline():  # "Listening on /tmp/... as 3."
            assert process.poll() is None
        with Domain(path, name="early") as domain:
            assert domain.store.read("name") == b"early"
            assert status(directory)["hypervisor"]["pid"] == process.pid, "it takes the place of who listened"
            second = usermm("hypervisor", "--socket", path)
            assert second.returncode == 2
            assert "has this socket" in second.stderr
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    assert (directory / "s").exists(), "systemd's socket is systemd's to remove"


@pytest.mark.skipif(not socket_activate, reason="no systemd-socket-activate: install systemd")
def test_with_systemds_socket_a_path_is_refused(directory: Path) -> None:
    path = str(directory / "s")
    words = [socket_activate, "--seqpacket", "--listen", path, "-E", "PYTHONPATH"]
    words += command("hypervisor", "--mode", "600")
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while path not in process.stderr.readline():
        assert process.poll() is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(path)
        _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert "--socket and --mode are systemd's to say here" in said


def test_the_manager_hears_when_it_is_ready_and_when_it_stops(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(TIMEOUT_S)
        manager.bind(str(directory / "notify"))
        variables = environment(NOTIFY_SOCKET=str(directory / "notify"))
        hypervisor = Running("--socket", directory / "s", env=variables)
        assert manager.recv(100) == b"READY=1"
        assert hypervisor.end() == 0
        assert manager.recv(100) == b"STOPPING=1"


@pytest.mark.skipif(not analyze, reason="no systemd-analyze: install systemd")
def test_systemd_accepts_the_units(directory: Path) -> None:
    """With an executable that is here, and without the man pages, which are not installed."""
    service = (UNITS / "usermm-hypervisor.service").read_text()
    assert "ExecStart=usermm hypervisor" in service
    (directory / "usermm-hypervisor.service").write_text(service.replace("ExecStart=usermm", "ExecStart=/bin/true"))
    shutil.copy(UNITS / "usermm-hypervisor.socket", directory)
    words = [analyze, "verify", "--man=no", str(directory / "usermm-hypervisor.service")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stranger_on_the_path_is_not_replaced(directory: Path) -> None:
    stranger = Listener(str(directory / "s"), locked=True)
    done = usermm("hypervisor", "--socket", directory / "s")
    assert done.returncode == 2
    assert "somebody may be using it" in done.stderr
    assert (directory / "s").exists()
    stranger.close()
