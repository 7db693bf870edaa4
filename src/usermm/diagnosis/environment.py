"""Facts about kernel, user, container and limits, read from /proc; nothing here changes anything."""

from __future__ import annotations

import os
import resource
import stat
from dataclasses import dataclass
from typing import Final

from usermm.uapi import procfs, userfaultfd

_CAP_SYS_PTRACE: Final = 19


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit of setrlimit(2) in its own unit (bytes, descriptors); None is unlimited."""

    soft: int | None
    hard: int | None


@dataclass(frozen=True, slots=True)
class Watched:
    """A mapping of this process that a userfaultfd watched before usermm did."""

    start: int
    end: int
    path: str
    modes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Environment:
    """None stands for what this kernel does not have or does not let the process read."""

    kernel: str
    machine: str
    effective_user_id: int
    may_ptrace: bool
    """CAP_SYS_PTRACE: the system call without UFFD_USER_MODE_ONLY is allowed whatever the sysctl says."""
    container: str
    """The marks of a container runtime that were found, or ""."""
    seccomp_mode: int | None
    """0 none, 1 strict, 2 a filter; see the field Seccomp in proc_pid_status(5)."""
    unprivileged_userfaultfd: int | None
    device_node: str | None
    """Mode and owner of /dev/userfaultfd, such as "crw------- 0:0"."""
    io_uring_disabled: int | None
    """0 allowed, 1 only for kernel.io_uring_group and CAP_SYS_ADMIN, 2 for nobody (Linux 6.6)."""
    max_map_count: int | None
    mappings: int
    memlock_bytes: Limit
    descriptors: Limit
    descriptors_in_use: int
    watched: tuple[Watched, ...]


def look() -> Environment:
    """The environment of this process now."""
    fields = procfs.status(_text("/proc/self/status"))
    capabilities = int(fields.get("CapEff", "0"), 16)
    mappings = procfs.mappings(_text("/proc/self/smaps") or _text("/proc/self/maps"))
    name = os.uname()
    return Environment(
        kernel=name.release,
        machine=name.machine,
        effective_user_id=os.geteuid(),
        may_ptrace=bool(capabilities >> _CAP_SYS_PTRACE & 1),
        container=", ".join(_container_marks()),
        seccomp_mode=_integer(fields.get("Seccomp", "")),
        unprivileged_userfaultfd=_integer(_text(userfaultfd.UNPRIVILEGED_SYSCTL)),
        device_node=_device_node(),
        io_uring_disabled=_integer(_text("/proc/sys/kernel/io_uring_disabled")),
        max_map_count=_integer(_text("/proc/sys/vm/max_map_count")),
        mappings=len(mappings),
        memlock_bytes=_limit(resource.RLIMIT_MEMLOCK),
        descriptors=_limit(resource.RLIMIT_NOFILE),
        descriptors_in_use=len(os.listdir("/proc/self/fd")) - 1,  # one is listdir's own
        watched=tuple(
            Watched(mapping.start, mapping.end, mapping.path, mapping.userfaultfd_modes)
            for mapping in mappings
            if mapping.userfaultfd_modes
        ),
    )


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            return file.read()
    except OSError:
        return ""


def _integer(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _limit(which: int) -> Limit:
    soft, hard = (None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(which))
    return Limit(soft, hard)


def _device_node() -> str | None:
    try:
        status = os.stat(userfaultfd.DEVICE_NODE)
    except OSError:
        return None
    return f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}"


def _container_marks() -> list[str]:
    marks = {"docker": os.path.exists("/.dockerenv"), "podman": os.path.exists("/run/.containerenv")}
    found = [name for name, present in marks.items() if present]
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        found.append("kubernetes")
    runtime = os.environ.get("container", "")  # noqa: SIM112 - the name that systemd-nspawn, LXC and podman use
    return found if runtime in found or not runtime else [*found, runtime]
