"""The socket that domains connect to."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from usermm.errors import UsermmError
from usermm.hypercalls.addresses import ENVIRONMENT, SYSTEM_SOCKET, user_socket

MODE = 0o666
"""Everybody may connect: who may be a domain is the policy's to say."""

_LONGEST_BYTES = 107  # sun_path (unix(7)), without its final null
_DIRECTORY_MODE = 0o755


def default_path() -> str:
    """$USERMM_HYPERVISOR; else /run/usermm/hypervisor.sock for root, and below $XDG_RUNTIME_DIR for others.

    Raises `UsermmError` where none of them is there.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        return named
    if os.geteuid() == 0 or os.access(os.path.dirname(SYSTEM_SOCKET), os.W_OK, effective_ids=True):
        return SYSTEM_SOCKET
    path = user_socket()
    if path is None:
        raise UsermmError("hypervisor: no XDG_RUNTIME_DIR is set: give --socket PATH")
    return path


def make_directory(path: str) -> None:
    """The directory of the socket `path`, which everybody can look into.

    Raises `UsermmError`, also for a path where no socket can be: nothing is made beside what is not ours.
    """
    directory = os.path.dirname(os.path.abspath(path))
    try:
        _check(path)
        os.makedirs(os.path.dirname(directory), exist_ok=True)
        os.mkdir(directory)
        os.chmod(directory, _DIRECTORY_MODE)  # whatever the umask
    except FileExistsError:
        if not os.path.isdir(directory):
            raise UsermmError(f"hypervisor({path}): {directory} is no directory: give another socket") from None
    except (OSError, ValueError) as error:
        raise _refused(path, error) from None


class Listener:
    """A listening socket at `path`; its file is removed when it is closed. Raises `UsermmError`.

    What is in the way is replaced only when it is a socket that nobody listens on, and the caller has `locked` the
    name (`Incarnation`).
    """

    def __init__(self, path: str, *, mode: int = MODE, locked: bool) -> None:
        self.path = os.path.abspath(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._remove_stale(locked)
            self.socket.setblocking(False)
            self.socket.bind(self.path)
            # Until listen() every connect is refused: nobody comes in before the mode is right.
            os.chmod(self.path, mode)
            self.socket.listen(socket.SOMAXCONN)
            self._file = _identity(self.path)
        except (OSError, ValueError) as error:
            self.socket.close()
            raise _refused(path, error) from None
        except UsermmError:
            self.socket.close()
            raise

    def close(self) -> None:
        """Removes the file, unless another one has taken its place. May be called twice."""
        if self.socket.fileno() >= 0:
            with contextlib.suppress(OSError):
                if _identity(self.path) == self._file:
                    os.unlink(self.path)
            self.socket.close()

    def _remove_stale(self, locked: bool) -> None:
        if not _check(self.path):
            return
        if not locked or _is_listening(self.path):
            raise UsermmError(f"hypervisor({self.path}): somebody may be using it: end that, or give another path")
        os.unlink(self.path)


def _check(path: str) -> bool:
    """Whether a socket is there already. Raises `UsermmError` where none can be, and OSError."""
    if len(os.fsencode(path)) > _LONGEST_BYTES:
        raise UsermmError(f"hypervisor({path}): longer than {_LONGEST_BYTES} bytes: give a shorter path")
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise UsermmError(f"hypervisor({path}): it is no socket and is kept: give another path")
    return True


def _is_listening(path: str) -> bool:
    """A socket of another type is somebody's as well (EPROTOTYPE), as is a full queue (EAGAIN)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT)


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _refused(path: str, error: OSError | ValueError) -> UsermmError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return UsermmError(f"hypervisor({path}): {reason}: give a path that can be written")
