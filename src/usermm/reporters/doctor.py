"""The doctor's findings as text: the answer first, then what was tried, then what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from typing import Any

Data = Mapping[str, Any]

_SECCOMP = {0: "no seccomp filter", 1: "seccomp strict mode", 2: "a seccomp filter"}
_OUTCOME = {
    "seen": "seen",
    "missed": "MISSED",
    "absent": "not in this kernel",
    "failed": "could not be tried",
}
_CONTRACT = {
    "own_thread": "own thread: after a thread's own call returned, its check sees the change",
    "all_threads": "all threads: an address that was handed out again is never taken for the old one",
    "all_causes": "all causes: whoever makes the change, by libc or by raw system call",
}


def text(data: Data) -> str:
    """The whole report, each line ended by a newline."""
    parts = [_answer(data), _environment(data["environment"])]
    parts += [_monitor(name, monitor) for name, monitor in data["monitors"].items()]
    parts += [_io_uring(data), _limits(data["environment"]), _cures(data["cures"])]
    return "\n".join("".join(f"{line}\n" for line in part) for part in parts)


def _answer(data: Data) -> Iterator[str]:
    yield f"exact notifications here: {'yes' if data['exact'] else 'NO'}"


def _environment(environment: Data) -> Iterator[str]:
    seccomp = _SECCOMP.get(environment["seccomp_mode"], "seccomp unknown")
    container = f"marks of {environment['container']}" if environment["container"] else "no container seen"
    user = f"user {environment['effective_user_id']}"
    rights = "with CAP_SYS_PTRACE" if environment["may_ptrace"] else "without CAP_SYS_PTRACE"
    yield f"Linux {environment['kernel']} {environment['machine']}, {user} {rights}, {seccomp}, {container}"


def _monitor(name: str, monitor: Data) -> Iterator[str]:
    yield f"monitor {name}"
    for way in monitor["availability"]["ways"]:
        yield f"  {'yes' if way['errno'] == 0 else 'no '}  {way['name']}{_error(way['errno'])}"
    if monitor["availability"]["features"]:
        yield f"  features: {' '.join(monitor['availability']['features'])}"
    missing = [*monitor["availability"]["missing"], *monitor["availability"]["lacking"]]
    if missing:
        yield f"  missing:  {' '.join(missing)}"
    if monitor["problem"]:
        how = "not tried to the end" if monitor["availability"]["available"] else "not tried"
        yield f"  {how}: {monitor['problem']}"
        return
    yield "  each event, made on purpose:"
    for event in monitor["events"]:
        yield f"    {_event(event)}"
    yield "  both races, run for real:"
    for race in monitor["races"]:
        yield f"    {_race(race)}"
    yield "  how exact that is:"
    for key, sentence in _CONTRACT.items():
        yield f"    {'yes' if monitor['tried'][key] else 'NO '}  {sentence}"


def _error(number: int) -> str:
    return f": {errno.errorcode.get(number, number)} ({os.strerror(number)})" if number else ""


def _event(event: Data) -> str:
    outcome = _OUTCOME[event["outcome"]]
    if not event["promised"] and event["outcome"] == "missed":
        outcome = "not seen (known blind spot of userfaultfd)"
    problem = f" ({event['problem']})" if event["outcome"] == "failed" else ""
    return f"{event['name']:<52}{outcome}{problem}"


def _race(race: Data) -> str:
    line = f"{race['name']:<14}{race['wrong']} wrong answers in {race['trials']} trials"
    if not race["trials_unprotected"]:
        return line
    unprotected = f"{race['wrong_unprotected']} in {race['trials_unprotected']}"
    # Nothing wrong without the protection either: the threads never met, and the zero proves little.
    doubt = "" if race["wrong_unprotected"] else ": the race was not met"
    return f"{line} (unprotected {unprotected}{doubt})"


def _io_uring(data: Data) -> Iterator[str]:
    disabled = data["environment"]["io_uring_disabled"]
    sysctl = "" if disabled is None else f" (kernel.io_uring_disabled = {disabled})"
    ring = data["io_uring"]
    yield f"io_uring with fixed buffers: {'yes' if ring['works'] else 'no'}{sysctl}"
    if ring["problem"]:
        yield f"  {ring['problem']}"


def _limits(environment: Data) -> Iterator[str]:
    yield "limits"
    maps, limit = environment["mappings"], environment["max_map_count"]
    yield f"  mappings               {maps} of vm.max_map_count = {'unknown' if limit is None else limit}"
    used = environment["descriptors_in_use"]
    yield f"  descriptors            {used} of {_limit(environment['descriptors'])}"
    yield f"  pinned memory, bytes   {_limit(environment['memlock_bytes'])}"
    sysctl = environment["unprivileged_userfaultfd"]
    yield f"  vm.unprivileged_userfaultfd = {'unknown' if sysctl is None else sysctl}"
    yield f"  /dev/userfaultfd       {environment['device_node'] or 'none'}"
    count = len(environment["watched"])
    yield f"  other userfaultfd      {f'on {count} of our mappings' if count else 'none on our memory'}"


def _limit(limit: Data) -> str:
    soft, hard = ("unlimited" if limit[key] is None else str(limit[key]) for key in ("soft", "hard"))
    return soft if soft == hard else f"{soft} (may be raised to {hard})"


def _cures(cures: list[Data]) -> Iterator[str]:
    yield "to get the rest, as root" if cures else "nothing is missing"
    for cure in cures:
        yield f"  {'needed, this or another: ' if cure['needed'] else ''}{cure['problem']}"
        for command in cure["commands"]:
            yield f"    $ {command}"
