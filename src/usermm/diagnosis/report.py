"""Everything that `usermm doctor` finds out, as one value and as the plain data of its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from usermm.diagnosis import child, cures
from usermm.diagnosis.cures import Cure
from usermm.diagnosis.environment import Environment, look
from usermm.diagnosis.io_uring import IoUring, try_io_uring
from usermm.monitors import kernel, userfaultfd
from usermm.monitors.base import Availability, Exactness

_NO_NODE = "there is no such node: Ummunotify() makes its devices itself, by the monitor userfaultfd"


@dataclass(frozen=True, slots=True)
class Monitored:
    """One monitor: `trial` is what it did in a child process on this machine."""

    promise: Exactness
    availability: Availability
    trial: child.Trial


@dataclass(frozen=True, slots=True)
class Report:
    """`monitors` by name: "kernel" is what `Ummunotify()` takes where it is available, else "userfaultfd"."""

    environment: Environment
    monitors: dict[str, Monitored]
    io_uring: IoUring
    cures: tuple[Cure, ...]

    @property
    def exact(self) -> bool:
        """True when the monitor that a device has here kept its whole promise in the trial."""
        node = self.monitors[kernel.NAME]
        taken = node if node.availability.available else self.monitors[userfaultfd.NAME]
        return taken.trial.result is not None and taken.trial.result.exact


def examine(timeout_s: float = child.TIMEOUT_S) -> Report:
    """Looks, tries and prescribes; one to three seconds for a monitor, at most a little over `timeout_s`."""
    environment = look()
    availability = userfaultfd.probe_availability()
    ring = try_io_uring()
    monitors = {
        userfaultfd.NAME: Monitored(userfaultfd.PROMISE, availability, child.try_in_child(timeout_s)),
        kernel.NAME: _node(timeout_s),
    }
    return Report(environment, monitors, ring, cures.prescribe(environment, availability, ring))


def _node(timeout_s: float) -> Monitored:
    availability = kernel.probe_availability()
    if availability.available:
        trial = child.try_in_child(timeout_s, child.KERNEL_PROGRAM)
    else:
        trial = child.Trial(None, _NO_NODE)
    return Monitored(kernel.promise_here(), availability, trial)


def as_data(report: Report) -> dict[str, Any]:
    """Dictionaries, lists, strings, numbers: what reporters and JSON get."""
    return {
        "exact": report.exact,
        "environment": asdict(report.environment),
        "monitors": {name: _monitor_data(monitor) for name, monitor in report.monitors.items()},
        "io_uring": asdict(report.io_uring),
        "cures": [asdict(cure) for cure in report.cures],
    }


def _monitor_data(monitor: Monitored) -> dict[str, Any]:
    result = monitor.trial.result
    return {
        "availability": {**asdict(monitor.availability), "available": monitor.availability.available},
        "promise": asdict(monitor.promise),
        "problem": monitor.trial.problem,
        "tried": asdict(result.exactness) if result else None,
        "events": [asdict(event) for event in result.events] if result else [],
        "races": [asdict(race) for race in result.races] if result else [],
    }
