"""One tree of exceptions: everything usermm raises on purpose is a `UsermmError`.

Each class also inherits from the built-in exception that Python programmers expect there, so that
``except OSError`` and ``except ValueError`` go on working. Messages are one line: the call, the object, the next step.
The C part raises through the same classes (`refused` and the tables below it).
"""

from __future__ import annotations

import errno


class UsermmError(Exception):
    """Base of everything that usermm raises on purpose. Its message is one line, whatever it quotes."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(" ".join(part.split("\n")) if isinstance(part, str) else part for part in args))


class ArgumentError(UsermmError, ValueError):
    """A value that no device accepts: a cookie outside u64, an empty range, a buffer with holes between its items."""


class ArgumentTypeError(UsermmError, TypeError):
    """An object of the wrong kind: not a buffer, not an integer."""


class DeviceError(UsermmError, OSError):
    """A call that the device refused; `errno` is what the system call of the device would have set."""


class ClosedError(DeviceError):
    """The device is closed (EBADF), maybe by another thread while this call waited."""


class ForkedError(DeviceError):
    """The device belongs to the parent process (ECHILD): a forked child opens its own."""


class MonitorFailedError(DeviceError):
    """The monitor met something it does not understand and failed closed (EIO): trust no cached registration."""


class CookieError(DeviceError):
    """The cookie is registered already, or not at all (EINVAL)."""


class UnwatchableError(DeviceError):
    """The memory can change without a notification (EOPNOTSUPP); the message names the mapping and the way out."""


class WatchedElsewhereError(DeviceError):
    """Another userfaultfd owns the memory (EBUSY): a second monitor, CRIU, a virtual machine monitor, a debugger."""


class LimitError(DeviceError):
    """Memory, descriptors or mappings ran out (ENOMEM, EMFILE, ENFILE); nothing was changed."""


class OverlapError(DeviceError):
    """Part of this memory is in a registration that somebody holds, and the device refuses overlaps (EADDRINUSE)."""


class RegistrationError(DeviceError):
    """A registration could not be completed: the memory kept changing (EAGAIN), or the registrar re-entered the cache
    for the same memory (EDEADLK)."""


class UnavailableError(DeviceError):
    """This kernel, user or container allows no userfaultfd (EPERM, ENOSYS): ``usermm doctor`` names the cure. Or there
    is no such device of a real Xen, or it has no such call (ENOENT, EACCES, EOPNOTSUPP)."""


class NotInstalledError(UsermmError, FileNotFoundError):
    """A C library, header or man page of usermm is not where it is installed, or NumPy is not; the message says how to
    get it."""


class WouldBlockError(DeviceError, BlockingIOError):
    """Nothing to read, and the device was opened with O_NONBLOCK (EAGAIN)."""


class HypervisorGoneError(DeviceError, ConnectionError):
    """The hypervisor ended, restarted, or dropped this domain (ECONNRESET), or none listens (ECONNREFUSED, ENOENT).

    Mappings and bound event channels go on working; whatever asks the hypervisor needs a new `Domain`.
    """


class GrantError(DeviceError):
    """A grant, an event channel or the store refused a call; the subclasses say what the caller can do about it."""


class BadReferenceError(GrantError):
    """There is no such grant, or it is not for this domain, or the index names no allocation (EINVAL, ENOENT)."""


class PermissionDeniedError(GrantError, PermissionError):
    """The grant is read-only, the policy or the store's permissions say no (EACCES, EPERM)."""


class QuotaError(GrantError):
    """A quota of the domain or a limit of the device is used up (ENOSPC, EDQUOT, ENOMEM); nothing was changed."""


class PeerGoneError(GrantError, BrokenPipeError):
    """The other domain ended or closed its side (EPIPE)."""


class ProtocolError(GrantError):
    """The other side wrote what no honest side writes (EPROTO); the channel is of no use any more."""


class ConflictError(GrantError, BlockingIOError):
    """Another domain changed what this transaction read or wrote (EAGAIN): do it again."""


_CLASSES: dict[int, type[DeviceError]] = {
    errno.EBADF: ClosedError,
    errno.ECHILD: ForkedError,
    errno.EIO: MonitorFailedError,
    errno.EOPNOTSUPP: UnwatchableError,
    errno.EBUSY: WatchedElsewhereError,
    errno.ENOMEM: LimitError,
    errno.EMFILE: LimitError,
    errno.ENFILE: LimitError,
    errno.EPERM: UnavailableError,
    errno.ENOSYS: UnavailableError,
    errno.EAGAIN: WouldBlockError,
}


def from_errno(number: int, message: str) -> DeviceError:
    """The exception for `number` (a positive errno) with a message that names call, object and next step."""
    return _CLASSES.get(number, DeviceError)(number, message)


_GRANT_CLASSES: dict[int, type[DeviceError]] = {
    errno.EBADF: ClosedError,
    errno.ECHILD: ForkedError,
    errno.ECONNRESET: HypervisorGoneError,
    errno.ECONNREFUSED: HypervisorGoneError,
    errno.EINVAL: BadReferenceError,
    errno.ENOENT: BadReferenceError,
    errno.EACCES: PermissionDeniedError,
    errno.EPERM: PermissionDeniedError,
    errno.ENOSPC: QuotaError,
    errno.EDQUOT: QuotaError,
    errno.ENOMEM: QuotaError,
    errno.EMFILE: LimitError,
    errno.ENFILE: LimitError,
    errno.EPIPE: PeerGoneError,
    errno.EAGAIN: ConflictError,
}


def grant_refused(number: int, message: str) -> DeviceError:
    """The exception for a call of a grant device, an event channel or the store that was answered with errno `number`.

    `message` names call, object and next step.
    """
    return _GRANT_CLASSES.get(number, GrantError)(number, message)


def protocol_broken(what: str) -> ProtocolError:
    """The exception for a channel's peer that wrote nonsense."""
    return ProtocolError(errno.EPROTO, f"channel: the peer broke the protocol: {what}: close the channel")


# What a device's errno means where the call has nothing more exact to say, and what to do about it.
_REASONS: dict[int, str] = {
    errno.EBADF: "the device is closed: open a new one",
    errno.ECHILD: "the device belongs to the parent process: open a new one in this child",
    errno.EIO: "the monitor failed: forget every registration, close all devices and open new ones",
    errno.ENOMEM: "memory, mappings or threads ran out: free some, or raise vm.max_map_count or ulimit -u",
    errno.EMFILE: "no descriptor is free: close some, or raise the limit (ulimit -n)",
    errno.ENFILE: "the system has no descriptor left: close some, or raise fs.file-max",
    errno.EPERM: "this process may not use userfaultfd: `usermm doctor` names the cure",
    errno.ENOSYS: "this kernel has no userfaultfd with write-protect mode and events: `usermm doctor` says what it has",
    errno.EBUSY: "another userfaultfd watches part of this memory (a second monitor, CRIU, a debugger): end it first",
    errno.EOPNOTSUPP: "part of this memory can change without a notification: register other memory, or a copy",
    errno.EFAULT: "the address is not mapped, or not for this: pass memory of this process",
    errno.EAGAIN: "nothing to read: poll fileno(), or open without O_NONBLOCK",
    errno.ENOTTY: "this version of the device has no such request: see usermm.uapi",
    errno.EACCES: "the device is read-only: map it with PROT_READ",
    errno.EINVAL: "the device does not accept this argument here: see the rules of its version",
}


def refused(number: int, call: str, reason: str | None = None) -> DeviceError:
    """The exception for a `call` that the device answered with errno `number`."""
    return from_errno(number, f"{call}: {reason or _REASONS.get(number, 'the system call failed')}")
