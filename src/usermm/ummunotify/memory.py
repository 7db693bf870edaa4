"""Why memory cannot be watched without blind spots, and the way out, in one line.

This is the slow path: it reads /proc/self and is asked when the monitor has refused a range. What is on which
side was tried on Linux 6.18; see userfaultfd(2) for what can be registered and memfd_create(2) for seals.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from usermm.errors import DeviceError, refused
from usermm.uapi import procfs
from usermm.uapi.procfs import Mapping
from usermm.ummunotify.seals import NO_PUNCH, NO_TRUNCATE, sealed_for_good, seals_of

SealsOf = Callable[[Mapping], int | None]


class Kind(enum.IntEnum):
    """Ordered: the worst mapping decides for a range."""

    WATCHABLE = 0
    """Every way to take the memory away is notified."""
    BLIND_SPOT = 1
    """Others can take pages away without a notification; ``accept_file_memory=True`` accepts that."""
    REFUSED = 2
    """Cannot be watched at all."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` names the memory, `cure` is the way out ("" for watchable memory); `mapping` is None for a
    hole."""

    kind: Kind
    mapping: Mapping | None
    reason: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; {self.cure}" if self.cure else self.reason


def judge(start: int, end: int) -> Verdict:
    """What is mapped at [start, end) of this process, and whether it can be watched.

    Another thread that maps or unmaps meanwhile can make the answer one about a moment in between.
    """
    found = _read("/proc/self/maps", start, end)
    verdict = judge_mappings(start, end, found, seals_of)
    # smaps walks the page tables of everything before the range: it is read only for what maps cannot tell.
    unexplained = verdict.kind is Kind.WATCHABLE and all(mapping.inode == 0 for mapping in found)
    if unexplained or any(mapping.shared and not mapping.writable for mapping in found):
        verdict = judge_mappings(start, end, _read("/proc/self/smaps", start, end), seals_of)
    return verdict


def explain(start: int, end: int) -> str | None:
    """One line that names the memory of [start, end) and the way out; None when it can be watched."""
    verdict = judge(start, end)
    return None if verdict.kind is Kind.WATCHABLE else str(verdict)


def refusal(call: str, number: int, start: int, end: int, *, strict: bool) -> DeviceError | None:
    """What to raise when `call` was refused with errno `number` (EOPNOTSUPP, EFAULT) for [start, end) of this process.

    None: the memory can be watched after all, as sealed files can, which the C core does not look at; only if `strict`,
    that is, if file memory was not to be accepted.
    """
    try:
        verdict = judge(start, end)
    except OSError:  # no descriptor left to look with: the refusal stands, less well explained
        return refused(number, call)
    if verdict.kind is Kind.WATCHABLE and strict:
        return None
    reason = str(verdict)
    if verdict.kind is Kind.BLIND_SPOT and not strict:
        reason = f"{verdict.reason}; this kernel watches no such files (6.7 does): register a copy"
    return refused(errno.EFAULT if verdict.mapping is None else number, call, reason)  # None: nothing is mapped there


def unwatchable(start: int, end: int, *, refuse_holes: bool, refuse_files: bool) -> int:
    """The errno for memory that a userfaultfd watches not at all, or not without blind spots; else 0."""
    try:
        verdict = judge(start, end)
    except OSError as error:  # no descriptor left to look with
        return error.errno or errno.EIO
    if verdict.kind is Kind.WATCHABLE:
        return 0
    if verdict.mapping is None:
        return errno.EFAULT if refuse_holes else 0
    return errno.EOPNOTSUPP if refuse_files or verdict.kind is Kind.REFUSED else 0


def _read(path: str, start: int, end: int) -> list[Mapping]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        return procfs.overlapping(lines, start, end)


def judge_mappings(start: int, end: int, mappings: Iterable[Mapping], seals: SealsOf) -> Verdict:
    """As `judge`, for these mappings (in address order) and this way to ask for the seals of a file."""
    if start >= end:
        return Verdict(Kind.REFUSED, None, f"the range {start:#x}-{end:#x} is empty", "give an end beyond the start")
    worst: Verdict | None = None
    mapped_to = start
    for mapping in mappings:
        if mapping.end <= start or mapping.start >= end:
            continue
        if mapping.start > mapped_to:
            return _hole(mapped_to, mapping.start)
        mapped_to = mapping.end
        verdict = _judge_mapping(mapping, seals)
        if worst is None or verdict.kind > worst.kind:
            worst = verdict
    return _hole(mapped_to, end) if worst is None or mapped_to < end else worst


def _hole(start: int, end: int) -> Verdict:
    cure = "map the memory first, then register it"
    return Verdict(Kind.REFUSED, None, f"nothing is mapped at {start:#x}-{end:#x}", cure)


def _judge_mapping(mapping: Mapping, seals: SealsOf) -> Verdict:
    for applies, what, cure in _REFUSALS:
        if applies(mapping):
            return Verdict(Kind.REFUSED, mapping, f"{_where(mapping)} is {what}", cure)
    if _anonymous(mapping):
        return Verdict(Kind.WATCHABLE, mapping, f"{_where(mapping)} is anonymous memory")
    return _judge_file(mapping, seals(mapping))


def _where(mapping: Mapping) -> str:
    place = f"the mapping {mapping.start:#x}-{mapping.end:#x}"
    # A file name may hold anything, and a message is one line of valid text.
    name = mapping.path if mapping.path.isprintable() else ascii(mapping.path)[1:-1]
    return f"{place} ({name})" if name else place


def _anonymous(mapping: Mapping) -> bool:
    # A private mapping of /dev/zero is anonymous memory with a name; shared anonymous memory is shown as the
    # deleted /dev/zero, or [anon_shmem:...] after prctl(PR_SET_VMA), with the inode of an internal tmpfs that
    # nobody can open.
    named = mapping.path in _ANONYMOUS_PATHS or mapping.path.startswith(("[anon_shmem:", "/anon_hugepage"))
    return mapping.inode == 0 or named


_ANONYMOUS_PATHS: Final = frozenset({"/dev/zero", "/dev/zero (deleted)"})
_KERNEL_NAMES: Final = re.compile(r"\[(vdso|vvar|vvar_vclock|vsyscall|vectors|sigpage|uprobes)\]\Z")


def _judge_file(mapping: Mapping, seals: int | None) -> Verdict:
    where = _where(mapping)
    if sealed_for_good(seals):
        return Verdict(Kind.WATCHABLE, mapping, f"{where} is a memfd that its seals protect from truncation and holes")
    reason = f"{where} is file memory that others can truncate or punch holes in without a notification"
    accept = "accept_file_memory=True accepts that"
    if seals is None and mapping.path.startswith("/memfd:"):
        cure = f"keep a descriptor of the sealed memfd open so that its seals can be read, or {accept}"
    elif seals is None:
        cure = f"copy it to anonymous memory, or {accept}"
    elif seals & fcntl.F_SEAL_SEAL:
        cure = f"make a memfd with MFD_ALLOW_SEALING and seal it, or {accept}"
    else:
        missing = " | ".join(_missing_seals(seals))
        cure = f"fcntl(fd, F_ADD_SEALS, {missing}) closes the gap, or {accept}"
    return Verdict(Kind.BLIND_SPOT, mapping, reason, cure)


def _missing_seals(seals: int) -> list[str]:
    missing = [] if seals & NO_TRUNCATE else ["F_SEAL_SHRINK"]
    # F_SEAL_WRITE would also do, but cannot be added while the memory is mapped writable.
    return missing if seals & NO_PUNCH else [*missing, "F_SEAL_FUTURE_WRITE"]


def _read_only_descriptor(mapping: Mapping) -> bool:
    return mapping.shared and bool(mapping.vm_flags) and "mw" not in mapping.vm_flags and mapping.inode != 0


_REFUSALS: Final[tuple[tuple[Callable[[Mapping], bool], str, str], ...]] = (
    (
        lambda mapping: _KERNEL_NAMES.match(mapping.path) is not None,
        "the kernel's own page",
        "it stays until the process ends: it needs no watching",
    ),
    (
        lambda mapping: mapping.path.startswith("/SYSV"),
        "a System V segment, which shmdt(2) removes without a notification",
        "use a sealed memfd or shared anonymous memory instead",
    ),
    (
        lambda mapping: mapping.path == "anon_inode:[io_uring]",
        "a ring of io_uring, which userfaultfd cannot watch",
        "tie its life to the ring: it goes when your program unmaps it",
    ),
    (
        lambda mapping: mapping.path.startswith("/secretmem"),
        "memory of memfd_secret(2), which no device can pin",
        "use other memory",
    ),
    (
        lambda mapping: not mapping.vm_flags.isdisjoint({"pf", "io"}),
        "device memory of a driver",
        "ask the driver: such pages go only when your program unmaps them or closes the device",
    ),
    (
        lambda mapping: "dp" in mapping.vm_flags,
        "droppable memory (MAP_DROPPABLE), which the kernel may discard at any time",
        "use plain anonymous memory instead",
    ),
    (
        lambda mapping: mapping.inode != 0 and not mapping.path.startswith(("/", "[")),
        "memory of a kernel object, which userfaultfd cannot watch",
        "use anonymous memory instead",
    ),
    (
        _read_only_descriptor,
        "a shared mapping of a descriptor without write permission, which userfaultfd refuses",
        "map it MAP_PRIVATE, or map it from a descriptor opened O_RDWR before any write seal is added",
    ),
)
