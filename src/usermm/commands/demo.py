"""``usermm demo``: the hazard of a registration cache and its cure, on this machine's own io_uring.

Exit status: 0 when usermm's cache never read wrong, 1 when it did, 2 when this kernel, user or
container forbids io_uring or userfaultfd, or the file cannot be written (one line on stderr names the cure),
130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from usermm.demonstration import slow_motion
from usermm.demonstration.caches import ByHandCache, Cache, ExactCache
from usermm.demonstration.churn import churn, steps
from usermm.demonstration.record import Outcome
from usermm.demonstration.workbench import KnownFile, largest_buffer
from usermm.reporters.demo import BY_HAND, USERMM, JsonReport, Report, TextReport
from usermm.uring import Ring

HELP = "Show a registration cache that reads into dead pages, and usermm's in its place"

READS = 1500
SLOTS = 64  # registrations that a cache keeps at most


def prepare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the demo."""
    parser.add_argument(
        "--reads", type=_positive, default=READS, metavar="N", help=f"reads of each half ({READS})"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="choose another random sequence (1)")
    parser.add_argument(
        "--directory", metavar="PATH", help="where the file to read goes (a temporary directory)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with the figures and nothing else"
    )


def run(args: argparse.Namespace) -> int:
    """Run both halves and report."""
    report: Report = JsonReport(sys.stdout) if args.json else TextReport(sys.stdout, live=sys.stdout.isatty())
    with opened(USERMM):  # before anything is shown: what is forbidden here is one line
        largest_bytes = largest_buffer(SLOTS)
    with KnownFile(args.directory, args.seed) as file:
        report.begin(args.reads, args.seed, largest_bytes)
        outcomes: dict[str, Outcome] = {}
        if not args.json:
            narrate(report, file, largest_bytes)
        for name in (BY_HAND, USERMM):
            outcomes[name] = measure(name, report, file, args, largest_bytes)
    report.table(outcomes)
    return 1 if outcomes[USERMM].wrong_reads else 0


def narrate(report: Report, file: KnownFile, length: int) -> None:
    """The single case, first by hand, then with usermm."""
    for name in (BY_HAND, USERMM):
        report.chapter(name)
        with opened(name) as cache:
            for moment in slow_motion.play(cache, file, length):
                report.moment(moment)


def measure(
    name: str, report: Report, file: KnownFile, args: argparse.Namespace, largest_bytes: int
) -> Outcome:
    """The loop with one of the caches; the random sequence is the same for both."""
    with opened(name) as cache:
        sequence = steps(args.seed, args.reads, largest_bytes)
        return churn(cache, file, sequence, largest_bytes, lambda outcome: report.progress(name, outcome))


@contextlib.contextmanager
def opened(name: str) -> Iterator[Cache]:
    """One of the caches on a ring of its own."""
    with Ring(SLOTS) as ring:
        if name == BY_HAND:
            yield ByHandCache(ring)
        else:
            with contextlib.closing(ExactCache(ring)) as cache:
                yield cache


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number
