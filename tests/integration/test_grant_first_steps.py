"""What somebody meets who begins: where a hypervisor is found, what is missing, what is left behind, what is said."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import closing
from pathlib import Path

import pytest
from support.channels import WAIT_S, joined
from support.hypervisors import socket_folder
from support.processes import run_program, run_quietly
from support.threads import running

import usermm
from usermm.errors import (
    ArgumentTypeError,
    ClosedError,
    HypervisorGoneError,
    PeerGoneError,
    UnavailableError,
)
from usermm.grants import session, xen
from usermm.hypercalls import addresses
from usermm.hypervisor.embedded import Hypervisor
from usermm.hypervisor.policy import Policy


def test_the_users_own_is_found_behind_a_systems_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed one leaves its socket's file; clients went there and nowhere else."""
    with socket_folder() as folder:
        system, own = folder / "system", folder / "usermm" / "hypervisor.sock"
        monkeypatch.setattr(addresses, "SYSTEM_SOCKET", str(system))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        monkeypatch.delenv(addresses.ENVIRONMENT, raising=False)
        with pytest.raises(HypervisorGoneError, match=str(own)):
            usermm.Domain()
        with Hypervisor(str(own)):
            with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as left:
                left.bind(str(system))
            with usermm.Domain() as domain:
                assert session.status(None)["domains"][0]["domid"] == domain.domid
            system.unlink()
            with Hypervisor(str(system)) as first, usermm.Domain() as domain:
                assert session.status(None)["hypervisor"]["socket"] == first.socket
            monkeypatch.setenv(addresses.ENVIRONMENT, str(folder / "named"))
            with pytest.raises(HypervisorGoneError, match="named"):
                usermm.Domain()


def test_a_path_is_one_in_any_form() -> None:
    with socket_folder() as folder, Hypervisor(str(folder / "s")), usermm.Domain(Path(folder / "s")) as domain:
        assert "closed" not in repr(domain)
        domain.close()
        assert "closed" in repr(domain)
        with pytest.raises(ClosedError):
            domain.store.list("/")
    with pytest.raises(ArgumentTypeError):
        usermm.Domain(3)  # type: ignore[arg-type]


def test_nothing_is_left_when_a_program_ends(tmp_path: Path) -> None:
    """Also without close(), and when a forked child ends first."""
    text = """
    import os, sys
    import usermm
    hypervisor = usermm.Hypervisor()
    domain = usermm.Domain(hypervisor.socket)
    if os.fork() == 0:
        sys.exit()
    os.wait()
    assert os.path.exists(hypervisor.socket)
    print(hypervisor.socket)
    """
    path = Path(run_quietly(text, tmp_path).strip())
    assert not path.parent.exists()


def test_without_numpy_no_array_is_taken(tmp_path: Path) -> None:
    """The message would have been lost."""
    done = run_program(
        """
        import sys
        sys.modules["numpy"] = None
        from support.channels import joined
        import usermm
        from usermm.errors import NotInstalledError
        with usermm.Hypervisor() as hypervisor:
            with usermm.Domain(hypervisor.socket) as one, usermm.Domain(hypervisor.socket) as two:
                here, there = joined(one, two)
                here.send_message(b"kept")
                for call in (lambda: there.receive_array(timeout=5), lambda: there.loan((2, 2), "u1", timeout=5)):
                    try:
                        call()
                    except NotInstalledError as error:
                        print("pip install numpy" in str(error))
                print(there.receive_message(timeout=5))
                here.close()
                there.close()
        """,
        tmp_path,
    )
    assert done.stdout == "True\nTrue\nb'kept'\n", done.stderr


def test_what_times_out_says_what_it_waited_for(one: usermm.Domain, two: usermm.Domain) -> None:
    here, there = joined(one, two, slots=2)
    with here, there:
        held = []
        for _ in range(2):
            here.send_message(b"x")
            held.append(there.receive_array(timeout=WAIT_S))
        with pytest.raises(TimeoutError, match="send_message: all slots are out: the peer has to receive"):
            here.send_message(b"x", timeout=0)
        with pytest.raises(TimeoutError, match="receive_message: the peer has sent no message"):
            there.receive_message(timeout=0)
        with pytest.raises(TimeoutError, match="receive: the peer has sent nothing"):
            there.receive_exactly(3, timeout=0.01)
        with pytest.raises(TimeoutError, match="send: the stream is full"):
            here.send(bytes(1 << 20), timeout=0.01)
        with pytest.raises(ArgumentTypeError, match="pass bytes"):
            here.send("text")
        del held
    with pytest.raises(TimeoutError, match="domain nobody is not there, or does not listen"):
        usermm.Channel.connect(one, "nobody", "x", 0)


def test_a_listener_hears_why_it_refused() -> None:
    """Its own quota, for example: nobody came, as far as it could tell."""
    with socket_folder() as folder:
        (folder / "policy").write_text(f"[[domain]]\ndomid = 9\nuser = {os.getuid()}\nmax_grant_frames = 0\n")
        with (
            Hypervisor(str(folder / "s"), policy=Policy.load(folder / "policy")) as poor,
            usermm.Domain(poor.socket, domid=9) as owner,
            usermm.Domain(poor.socket, name="asker") as asker,
            usermm.Channel.listen(owner, "door", asker.name) as listener,
        ):

            def accept() -> None:
                with pytest.raises(TimeoutError, match=r"a request was refused: .*max_grant_frames"):
                    listener.accept(0.5)

            with running(accept), pytest.raises(PeerGoneError, match="max_grant_frames"):
                usermm.Channel.connect(asker, 9, "door", WAIT_S)


@pytest.mark.skipif(xen.is_usable(), reason="this is a Xen")
def test_a_xen_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(UnavailableError) as caught:
        usermm.Domain(backend="xen")
    assert caught.value.errno == errno.ENOENT


def test_all_that_the_documents_name_is_there() -> None:
    for name in usermm.__all__:
        assert getattr(usermm, name) is not None
    assert issubclass(usermm.PolicyError, usermm.ArgumentError)
