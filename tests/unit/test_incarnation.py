"""Which hypervisor has a socket: its number, its lock, its listening socket, and what systemd gives and hears."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from usermm.errors import UsermmError
from usermm.hypervisor import incarnation, listener, service
from usermm.hypervisor.incarnation import Incarnation
from usermm.hypervisor.listener import Listener


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "hypervisor.sock")


@pytest.fixture
def descriptors() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)


pytestmark = pytest.mark.usefixtures("descriptors")


# ---- the number


def test_each_incarnation_has_the_next_number(path: str) -> None:
    tags = []
    for _ in range(4):
        with Incarnation(path) as claim:
            assert claim.locked
            tags.append(claim.tag)
    assert tags == [(tags[0] + step) % 4096 for step in range(4)]


def test_the_first_number_is_random(tmp_path: Path) -> None:
    tags = set()
    for number in range(40):
        with Incarnation(str(tmp_path / str(number))) as claim:
            tags.add(claim.tag)
            assert 0 <= claim.tag < 4096
    assert len(tags) > 10


def test_after_the_last_number_comes_the_first(path: str) -> None:
    Path(path + ".lock").write_text("4095 0000000001\n")
    with Incarnation(path) as claim:
        assert claim.tag == 0


@pytest.mark.parametrize("content", ["", "junk", "99", "\0" * 16])
def test_a_damaged_file_costs_the_count_and_nothing_else(path: str, content: str) -> None:
    Path(path + ".lock").write_text(content)
    with Incarnation(path) as claim:
        assert claim.locked
        first = claim.tag
    with Incarnation(path) as claim:
        assert claim.tag == (first + 1) % 4096


def test_a_second_hypervisor_is_refused_by_name(path: str) -> None:
    with Incarnation(path):
        message = rf"^hypervisor\({path}\): the hypervisor of process {os.getpid()} has this socket: end it, or give"
        with pytest.raises(UsermmError, match=message):
            Incarnation(path)
    with Incarnation(path) as claim:
        assert claim.locked
        claim.close()
        claim.close()


def test_a_killed_hypervisor_leaves_no_lock(path: str) -> None:
    code = "import os; from usermm.hypervisor.incarnation import Incarnation as I; "
    code += f"i = I({path!r}); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == -9
    with Incarnation(path) as claim:
        assert claim.locked


def test_a_forked_child_does_not_keep_the_name(path: str) -> None:
    claim = Incarnation(path)
    alive, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        os.read(alive, 1)
        os._exit(0)
    try:
        claim.close()
        with Incarnation(path) as second:
            assert second.locked
    finally:
        os.close(end)
        os.close(alive)
        os.waitpid(child, 0)


def test_without_a_directory_the_number_is_random_and_nothing_is_locked(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "none" / "socket")
    with Incarnation(nowhere) as first, Incarnation(nowhere) as second:
        assert not first.locked
        assert not second.locked


def test_a_link_in_its_place_is_not_followed(path: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    os.symlink(target, path + incarnation.SUFFIX)
    with Incarnation(path) as claim:
        assert not claim.locked
    assert not target.exists()


# ---- the socket


def test_a_listener_has_its_mode_and_leaves_nothing(path: str) -> None:
    before = os.umask(0o077)
    try:
        listening = Listener(path, locked=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(path)
    assert not listening.socket.getblocking()
    assert not os.get_inheritable(listening.socket.fileno())
    listening.close()
    listening.close()
    assert not os.path.lexists(path)


def test_another_mode(path: str) -> None:
    listening = Listener(path, mode=0o600, locked=True)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    listening.close()


def stale(path: str, kind: int = socket.SOCK_SEQPACKET) -> None:
    with socket.socket(socket.AF_UNIX, kind) as dead:
        dead.bind(path)


def test_a_dead_hypervisors_socket_is_replaced_once_the_name_is_locked(path: str) -> None:
    stale(path)
    with pytest.raises(UsermmError, match="somebody may be using it"):
        Listener(path, locked=False)
    Listener(path, locked=True).close()


def test_a_living_socket_is_kept_even_so(path: str) -> None:
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind) as living:
            living.bind(path)
            living.listen()
            with pytest.raises(UsermmError, match="somebody may be using it: end that, or give another path"):
                Listener(path, locked=True)
            with socket.socket(socket.AF_UNIX, kind) as client:
                client.connect(path)
        os.unlink(path)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_kept(path: str, kind: str, tmp_path: Path) -> None:
    if kind == "file":
        Path(path).write_text("mine")
    elif kind == "directory":
        os.mkdir(path)
    else:
        stale(str(tmp_path / "other"))
        os.symlink(tmp_path / "other", path)
    with pytest.raises(UsermmError, match="it is no socket and is kept: give another path"):
        Listener(path, locked=True)
    with pytest.raises(UsermmError, match="it is no socket and is kept"):
        listener.make_directory(path)
    assert os.path.lexists(path)


def test_the_file_of_a_successor_is_not_removed(path: str) -> None:
    first = Listener(path, locked=True)
    os.unlink(path)
    second = Listener(path, locked=True)
    first.close()
    assert os.path.exists(path)
    second.close()


@pytest.mark.parametrize("name", ["x" * 200, "none/socket", "a\0b"])
def test_a_path_that_does_not_do_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsermmError, match=r"^hypervisor\(.*\): .*: give a") as caught:
        Listener(str(tmp_path / name), locked=True)
    assert "\n" not in str(caught.value)


def test_the_directory_is_made_for_everybody_to_look_into(tmp_path: Path) -> None:
    path = tmp_path / "a" / "usermm" / "socket"
    before = os.umask(0o077)
    try:
        listener.make_directory(str(path))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    path.parent.chmod(0o700)
    listener.make_directory(str(path))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700, "what is there keeps its mode"
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file" / "socket", tmp_path / "file" / "deeper" / "socket"):
        with pytest.raises(UsermmError, match=r"^hypervisor\("):
            listener.make_directory(str(wrong))


def test_where_the_socket_is_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USERMM_HYPERVISOR", "/x/y")
    assert listener.default_path() == "/x/y"
    monkeypatch.delenv("USERMM_HYPERVISOR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert listener.default_path() == "/run/usermm/hypervisor.sock"
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert listener.default_path() == "/run/user/1/usermm/hypervisor.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(UsermmError, match="give --socket PATH"):
        listener.default_path()


# ---- systemd

INHERIT = """
import os, socket, sys
kind, listen = getattr(socket, sys.argv[1]), sys.argv[2] == "listen"
made = socket.socket(socket.AF_UNIX, kind)
made.bind(sys.argv[3])
if listen:
    made.listen()
os.environ.update(LISTEN_FDS=sys.argv[4], LISTEN_PID=str(os.getpid()) if sys.argv[5] == "own" else "1")
if made.fileno() != 3:
    os.dup2(made.fileno(), 3)
    made.detach()
else:
    made.detach()
os.set_inheritable(3, True)
from usermm.errors import UsermmError
from usermm.hypervisor import service
try:
    found = service.inherited_socket()
except UsermmError as error:
    print(error)
else:
    print(found and (found.fileno(), found.getblocking(), os.get_inheritable(3)))
    print(sorted(name for name in os.environ if name.startswith("LISTEN_")))
"""


def inherited(
    path: str, kind: str = "SOCK_SEQPACKET", listen: str = "listen", count: str = "1", pid: str = "own"
) -> str:
    words = [sys.executable, "-c", INHERIT, kind, listen, path, count, pid]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


def test_the_inherited_socket_is_taken_over(path: str) -> None:
    assert inherited(path) == "(3, False, False)\n[]\n"


def test_a_socket_that_is_for_another_process_is_not_taken(path: str) -> None:
    assert inherited(path, pid="other") == "None\n[]\n"


def test_an_inherited_socket_that_does_not_do_is_refused(path: str) -> None:
    assert "it listens on no SEQPACKET: use ListenSequentialPacket=" in inherited(path, kind="SOCK_STREAM")
    os.unlink(path)
    assert "it listens on no SEQPACKET" in inherited(path, listen="no")
    os.unlink(path)
    assert "LISTEN_FDS=2" in inherited(path, count="2")


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_is_told(path: str, abstract: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"@usermm-test-{os.getpid()}" if abstract else path
        manager.bind(f"\0{name[1:]}" if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        service.notify("READY=1")
        assert manager.recv(100) == b"READY=1"
        manager.setblocking(False)
        for _ in range(10_000):
            service.notify("STATUS=nobody reads")  # and nobody waits


@pytest.mark.parametrize("name", ["", "relative", "/nobody/there"])
def test_without_a_manager_nothing_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    service.notify("READY=1")
