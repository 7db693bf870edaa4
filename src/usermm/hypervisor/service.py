"""What systemd gives a service and hears from it: the listening socket (sd_listen_fds(3)), its state (sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket

from usermm.errors import UsermmError

_FIRST = 3  # SD_LISTEN_FDS_START


def inherited_socket() -> socket.socket | None:
    """The socket that systemd listens on for this process, or None when it was not started so.

    The variables are removed: what this process starts has nothing to do with them. Raises `UsermmError` for a socket
    that is not `ListenSequentialPacket=`.
    """
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    os.environ.pop("LISTEN_PIDFDID", None)
    if not count or pid != str(os.getpid()):
        return None
    if count != "1":
        raise UsermmError(f"hypervisor(LISTEN_FDS={count}): it listens on one socket: give one in the .socket unit")
    try:
        listener = socket.socket(fileno=_FIRST)
    except OSError as error:
        raise UsermmError(f"hypervisor(descriptor {_FIRST}): {error.strerror}: start it by systemd's .socket") from None
    listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if (listener.family, listener.type, listens) != (socket.AF_UNIX, socket.SOCK_SEQPACKET, 1):
        listener.close()
        raise UsermmError(f"hypervisor(descriptor {_FIRST}): it listens on no SEQPACKET: use ListenSequentialPacket=")
    os.set_inheritable(_FIRST, False)
    listener.setblocking(False)
    return listener


def notify(state: str) -> None:
    """Tells who has started this as a service; silently nothing elsewhere. `state` such as "READY=1"."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name.startswith(("/", "@")):
        return
    address = f"\0{name[1:]}" if name.startswith("@") else name
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as messenger,
    ):
        messenger.setblocking(False)  # a manager that does not read must not stop us
        messenger.sendto(state.encode(), address)
