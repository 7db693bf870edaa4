"""``python -m benchmarks``: everything, or the benchmarks that are named. Exit status 2: something is missing here."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    cache,
    check,
    fresh_grant,
    generation,
    handover,
    hypervisor,
    machine,
    munmap,
    notifications,
    preload,
    rcache,
    register,
)
from benchmarks.calls import Calls
from benchmarks.programs import BenchmarkError, Programs
from usermm import UsermmError
from usermm.measurement.harness import FULL, QUICK, Effort, Result
from usermm.reporters import bench as report

NAMES = (
    "generation",
    "check",
    "munmap",
    "register",
    "notifications",
    "rcache",
    "cache",
    "preload",
    "fresh_grant",
    "handover",
    "hypervisor",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints as it goes, and writes the data at the end."""
    args = _parser().parse_args(argv)
    effort = QUICK if args.quick else FULL
    try:
        facts = machine.describe()
        print("\n".join(report.machine_lines(facts)), flush=True)
        results = _run(args.names or NAMES, effort)
    except (BenchmarkError, UsermmError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if args.json:
        data = report.as_data(facts, "quick" if args.quick else "full", results)
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Figures of usermm beside their floors.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)}; all when left out")
    parser.add_argument("--quick", action="store_true", help="some seconds: does it run, rather than how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same data there")
    return parser


def _run(names: Sequence[str], effort: Effort) -> list[Result]:
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise BenchmarkError(f"no benchmark is called {unknown[0]}: choose from {', '.join(NAMES)}")
    results = []
    with tempfile.TemporaryDirectory(prefix="usermm-benchmarks-") as folder:
        programs = Programs(Path(folder))
        for name in names:
            results.append(_benchmarks(programs)[name](effort))
            print("\n".join(report.result_lines(results[-1])), flush=True)
    return results


def _benchmarks(programs: Programs) -> dict[str, Callable[[Effort], Result]]:
    return {
        "generation": lambda effort: generation.run(Calls(programs), effort),
        "check": lambda effort: check.run(Calls(programs), effort),
        "munmap": lambda effort: munmap.run(programs, effort),
        "register": lambda effort: register.run(programs, effort),
        "notifications": lambda effort: notifications.run(programs, effort),
        "rcache": lambda effort: rcache.run(programs, effort),
        "cache": lambda effort: cache.run(Calls(programs), effort),
        "preload": lambda effort: preload.run(programs, effort),
        "fresh_grant": fresh_grant.run,
        "handover": handover.run,
        "hypervisor": hypervisor.run,
    }


if __name__ == "__main__":
    sys.exit(main())
