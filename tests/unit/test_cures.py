"""For each thing that can be missing: the command that gets it, and whether exact notifications wait for it."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Final

import pytest

from usermm.diagnosis.cures import Cure, prescribe
from usermm.diagnosis.environment import Environment, Limit, Watched
from usermm.diagnosis.io_uring import IoUring
from usermm.monitors import userfaultfd
from usermm.monitors.base import Availability, Way

HEALTHY: Final = Environment(
    kernel="6.18.0",
    machine="x86_64",
    effective_user_id=0,
    may_ptrace=True,
    container="",
    seccomp_mode=0,
    unprivileged_userfaultfd=0,
    device_node="crw------- 0:0",
    io_uring_disabled=0,
    max_map_count=65530,
    mappings=200,
    memlock_bytes=Limit(None, None),
    descriptors=Limit(1024, 4096),
    descriptors_in_use=3,
    watched=(),
)
USER: Final = replace(HEALTHY, effective_user_id=1000, may_ptrace=False)
CONTAINER: Final = replace(USER, container="docker", seccomp_mode=2, device_node=None)
RING: Final = IoUring(True)
NAMES: Final = (userfaultfd.FULL, userfaultfd.USER_MODE, userfaultfd.NODE)


def _ways(*numbers: int, missing: tuple[str, ...] = (), lacking: tuple[str, ...] = ()) -> Availability:
    return Availability(tuple(map(Way, NAMES, numbers)), (), missing, lacking)


def _commands(cures: tuple[Cure, ...]) -> str:
    return "\n".join(command for cure in cures for command in cure.commands)


def test_nothing_missing_is_no_cure() -> None:
    assert prescribe(HEALTHY, _ways(0, 0, 0), RING) == ()


@pytest.mark.parametrize(
    ("environment", "numbers", "needed", "problem", "command"),
    [
        (USER, (errno.EPERM, 0, 0), False, "USER_MODE_ONLY", "sysctl -w vm.unprivileged_userfaultfd=1"),
        (USER, (errno.EPERM, errno.EINVAL, errno.ENOENT), True, "USER_MODE_ONLY", "sysctl -w vm.unprivileged"),
        (CONTAINER, (errno.EPERM, errno.EPERM, errno.ENOENT), True, "seccomp", "--security-opt seccomp=unconfined"),
        (CONTAINER, (errno.EPERM, errno.EPERM, errno.ENOENT), True, "(docker)", "--device /dev/userfaultfd"),
        (CONTAINER, (errno.EPERM, errno.EPERM, 0), False, "seccomp", "seccompProfile"),
        (HEALTHY, (errno.EACCES, errno.EACCES, errno.EACCES), True, "SELinux", "chgrp uffd /dev/userfaultfd"),
        (HEALTHY, (errno.ENOSYS, errno.ENOSYS, errno.ENOENT), True, "CONFIG_USERFAULTFD", "zgrep -h USERFAULTFD"),
        (HEALTHY, (errno.EMFILE, errno.EMFILE, errno.EMFILE), True, "descriptor", "ulimit -n"),
        (USER, (0, 0, errno.EACCES), False, "crw------- 0:0", "chmod 660 /dev/userfaultfd"),
        (USER, (0, 0, errno.ENOENT), False, "no /dev/userfaultfd", "mknod /dev/userfaultfd c 10 $(awk"),
    ],
)
def test_userfaultfd(
    environment: Environment, numbers: tuple[int, ...], needed: bool, problem: str, command: str
) -> None:
    cures = prescribe(environment, _ways(*numbers), RING)
    assert problem in cures[0].problem + cures[-1].problem
    assert command in _commands(cures)
    assert any(cure.needed for cure in cures) == needed


def test_the_mknod_command_is_what_a_shell_understands() -> None:
    """Found while writing: the braces of awk and those of an f-string."""
    (cure,) = prescribe(USER, _ways(0, 0, errno.ENOENT), RING)
    assert cure.commands == ("mknod /dev/userfaultfd c 10 $(awk '$2 == \"userfaultfd\" {print $1}' /proc/misc)",)


@pytest.mark.parametrize(
    ("name", "version", "needed"),
    [("EVENT_UNMAP", "4.11", True), ("WP_HUGETLBFS_SHMEM", "5.19", False), ("WP_ASYNC", "6.7", False)],
)
def test_a_missing_feature_names_the_kernel_that_has_it(name: str, version: str, needed: bool) -> None:
    found = _ways(0, 0, 0, missing=(name,)) if needed else _ways(0, 0, 0, lacking=(name,))
    (cure,) = prescribe(HEALTHY, found, RING)
    assert cure.needed == needed
    assert cure.commands == (f"boot Linux {version} or newer",)


@pytest.mark.parametrize(
    ("environment", "number", "command"),
    [
        (replace(HEALTHY, io_uring_disabled=2), errno.EPERM, "sysctl -w kernel.io_uring_disabled=0"),
        (HEALTHY, errno.EPERM, "--security-opt seccomp=unconfined"),
        (HEALTHY, errno.ENOMEM, "prlimit --memlock=unlimited"),
        (HEALTHY, errno.ENOSYS, "CONFIG_IO_URING"),
    ],
)
def test_io_uring(environment: Environment, number: int, command: str) -> None:
    (cure,) = prescribe(environment, _ways(0, 0, 0), IoUring(False, number, "io_uring_setup: no"))
    assert command in "\n".join(cure.commands)
    assert not cure.needed


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        (replace(HEALTHY, mappings=40_000), "sysctl -w vm.max_map_count=1048576"),
        (replace(USER, memlock_bytes=Limit(8 << 20, 8 << 20)), "prlimit --memlock=unlimited --pid $$"),
        (replace(HEALTHY, watched=(Watched(0x1000, 0x2000, "", ("missing",)),)), "FI_MR_CACHE_MONITOR=memhooks"),
    ],
)
def test_limits_and_neighbours(environment: Environment, command: str) -> None:
    (cure,) = prescribe(environment, _ways(0, 0, 0), RING)
    assert command in "\n".join(cure.commands)


def test_what_is_needed_comes_first() -> None:
    environment = replace(CONTAINER, mappings=40_000)
    cures = prescribe(environment, _ways(errno.EPERM, errno.EPERM, errno.ENOENT), RING)
    assert [cure.needed for cure in cures] == sorted((cure.needed for cure in cures), reverse=True)
