"""Everything that `usermm doctor` finds out, as one value and as the plain data of its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from usermm.diagnosis import child, cures
from usermm.diagnosis.cures import Cure
from usermm.diagnosis.environment import Environment, look
from usermm.diagnosis.io_uring import IoUring, try_io_uring
from usermm.monitors import userfaultfd
from usermm.monitors.base import Availability


@dataclass(frozen=True, slots=True)
class Report:
    """`trial` is what the monitor did in a child process on this machine."""

    environment: Environment
    availability: Availability
    trial: child.Trial
    io_uring: IoUring
    cures: tuple[Cure, ...]

    @property
    def exact(self) -> bool:
        """True when the monitor kept its whole promise in the trial."""
        return self.trial.result is not None and self.trial.result.exact


def examine(timeout_s: float = child.TIMEOUT_S) -> Report:
    """Looks, tries and prescribes; one to three seconds, at most a little over `timeout_s`."""
    environment = look()
    availability = userfaultfd.probe_availability()
    ring = try_io_uring()
    prescribed = cures.prescribe(environment, availability, ring)
    return Report(environment, availability, child.try_in_child(timeout_s), ring, prescribed)


def as_data(report: Report) -> dict[str, Any]:
    """Dictionaries, lists, strings, numbers: what reporters and JSON get."""
    result = report.trial.result
    availability = {**asdict(report.availability), "available": report.availability.available}
    monitor = {
        "availability": availability,
        "promise": asdict(userfaultfd.PROMISE),
        "problem": report.trial.problem,
        "tried": asdict(result.exactness) if result else None,
        "events": [asdict(event) for event in result.events] if result else [],
        "races": [asdict(race) for race in result.races] if result else [],
    }
    return {
        "exact": report.exact,
        "environment": asdict(report.environment),
        "monitors": {userfaultfd.NAME: monitor},
        "io_uring": asdict(report.io_uring),
        "cures": [asdict(cure) for cure in report.cures],
    }
