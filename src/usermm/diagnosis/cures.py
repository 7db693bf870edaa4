"""For each thing that is missing here, the exact commands that get it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from usermm.diagnosis.environment import Environment
from usermm.diagnosis.io_uring import IoUring
from usermm.monitors import userfaultfd
from usermm.monitors.base import Availability
from usermm.uapi.userfaultfd import SINCE, Feature

NODE: Final = userfaultfd.NODE
_MIB: Final = 1 << 20
_SECCOMP: Final = (
    "docker run --security-opt seccomp=unconfined IMAGE",
    "podman run --security-opt seccomp=unconfined IMAGE",
    "kubectl patch deployment NAME --type merge -p"
    """ '{"spec":{"template":{"spec":{"securityContext":{"seccompProfile":{"type":"Unconfined"}}}}}}'""",
)


@dataclass(frozen=True, slots=True)
class Cure:
    """`problem` in one line; `commands`, for root, are alternatives, best first; `needed`: nothing exact without.

    Of several that are needed one is enough.
    """

    problem: str
    commands: tuple[str, ...]
    needed: bool


def prescribe(environment: Environment, availability: Availability, ring: IoUring) -> tuple[Cure, ...]:
    """What to do, the needed things first."""
    found = [
        *_userfaultfd(environment, availability),
        *_features(environment, availability),
        *_io_uring(environment, ring),
        *_limits(environment),
        *_watched(environment),
    ]
    return tuple(sorted(found, key=lambda cure: not cure.needed))


def _userfaultfd(environment: Environment, availability: Availability) -> Iterator[Cure]:
    numbers = {way.name: way.errno for way in availability.ways}
    needed = not any(way.works for way in availability.ways)
    full, user_mode = numbers[userfaultfd.FULL], numbers[userfaultfd.USER_MODE]
    if needed and user_mode in (errno.EMFILE, errno.ENFILE):
        yield Cure("no descriptor is left for a userfaultfd", ("ulimit -n 65536",), True)
        return
    if user_mode == errno.ENOSYS and numbers[NODE]:
        problem = "the kernel has no userfaultfd (CONFIG_USERFAULTFD), or a sandbox such as gVisor stands before it"
        yield Cure(problem, ("zgrep -h USERFAULTFD /proc/config.gz /boot/config-$(uname -r)",), needed)
    elif user_mode in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        # The kernel itself never answers this to UFFD_USER_MODE_ONLY.
        problem = f"{_guard(environment)} blocks the system call userfaultfd(2)"
        yield Cure(problem, (f"docker run --device {NODE} IMAGE", *_SECCOMP), needed)
    elif full == errno.EPERM:
        problem = f"this user gets a userfaultfd only with UFFD_USER_MODE_ONLY{_not_needed(needed)}"
        yield Cure(problem, ("sysctl -w vm.unprivileged_userfaultfd=1",), needed)
    yield from _node(environment, numbers[NODE], needed)


def _not_needed(needed: bool) -> str:
    return "" if needed else " (enough for every notification; the rest is fork events and kernel faults)"


def _guard(environment: Environment) -> str:
    where = f" of the container ({environment.container})" if environment.container else ""
    return f"a seccomp filter{where}" if environment.seccomp_mode else f"a security module (SELinux, AppArmor){where}"


def _node(environment: Environment, number: int, needed: bool) -> Iterator[Cure]:
    if number == errno.ENOENT:
        make = f"mknod {NODE} c 10 $(awk '$2 == \"userfaultfd\" {{print $1}}' /proc/misc)"
        commands = (f"docker run --device {NODE} IMAGE",) if environment.container else (make,)
        yield Cure(f"there is no {NODE} (Linux 6.1)", commands, needed)
    elif number in (errno.EACCES, errno.EPERM):
        group = f"groupadd -rf uffd && chgrp uffd {NODE} && chmod 660 {NODE} && usermod -aG uffd USER"
        rule = 'KERNEL=="userfaultfd", GROUP="uffd", MODE="0660"'
        keep = f"echo '{rule}' > /etc/udev/rules.d/60-uffd.rules  # after a reboot too"
        device = (f"docker run --device {NODE} IMAGE",) if environment.container else ()
        problem = f"this user may not open {NODE} ({environment.device_node or 'not visible'})"
        yield Cure(problem, (*device, group, keep), needed)


def _features(environment: Environment, availability: Availability) -> Iterator[Cure]:
    meaning = {
        Feature.WP_HUGETLBFS_SHMEM.name: "shared memory and huge pages cannot be watched",
        Feature.WP_ASYNC.name: "mappings of files cannot be watched, not even with accept_file_memory=True",
    }
    for name in (*availability.missing, *availability.lacking):
        version = SINCE[Feature[name]]
        problem = f"the kernel ({environment.kernel}) lacks {name}: {meaning.get(name, 'no exact notifications')}"
        yield Cure(problem, (f"boot Linux {version} or newer",), name in availability.missing)


def _io_uring(environment: Environment, ring: IoUring) -> Iterator[Cure]:
    if ring.works:
        return
    commands: tuple[str, ...] = ()
    if environment.io_uring_disabled:
        commands = ("sysctl -w kernel.io_uring_disabled=0",)
    elif ring.errno in (errno.EPERM, errno.EACCES):
        commands = _SECCOMP
    elif ring.errno == errno.ENOMEM:
        commands = ("prlimit --memlock=unlimited --pid $$", "docker run --ulimit memlock=-1 IMAGE")
    elif ring.errno in (errno.ENOSYS, errno.EINVAL):
        commands = ("boot Linux 5.19 or newer, with CONFIG_IO_URING",)
    yield Cure(
        f"no io_uring, which only `usermm demo` and the io_uring registrar need: {ring.problem}",
        commands,
        False,
    )


def _limits(environment: Environment) -> Iterator[Cure]:
    limit = environment.max_map_count
    if limit is not None and environment.mappings > limit // 2:
        problem = f"{environment.mappings} of vm.max_map_count={limit} mappings are in use: watched coarsely"
        yield Cure(problem, ("sysctl -w vm.max_map_count=1048576",), False)
    pinned = environment.memlock_bytes.soft
    if pinned is not None and environment.effective_user_id != 0:
        problem = f"this user may pin {pinned // _MIB} MiB (RLIMIT_MEMLOCK): larger fixed buffers and mlock fail"
        login = "echo '* - memlock unlimited' > /etc/security/limits.d/memlock.conf  # from the next login on"
        yield Cure(
            problem, ("prlimit --memlock=unlimited --pid $$", login, "docker run --ulimit memlock=-1 IMAGE"), False
        )


def _watched(environment: Environment) -> Iterator[Cure]:
    if environment.watched:
        first = environment.watched[0]
        count = len(environment.watched)
        where = f"{first.start:#x}-{first.end:#x}{f' ({first.path})' if first.path else ''}"
        problem = f"another userfaultfd watches {count} of our mappings (EBUSY), the first is {where}"
        commands = (
            "FI_MR_CACHE_MONITOR=memhooks PROGRAM  # where libfabric is the other",
            "env | grep LD_PRELOAD",
        )
        yield Cure(problem, commands, False)
