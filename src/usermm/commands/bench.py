"""``usermm bench``: what a registration costs on this machine, from the cache, by hand, by UCX, and without any cache.

Exit status: 0 when it was measured, 2 when it cannot be (no userfaultfd; no address space), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json

from usermm.measurement import bench, machine
from usermm.reporters import bench as reporter

HELP = "Measure what a registration costs here, from the cache and from its peers"


def prepare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the benchmark."""
    parser.add_argument("--quick", action="store_true", help="some seconds, for a first impression")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Measure and report, table by table."""
    facts = machine.describe()
    results = []
    if not args.json:
        print("\n".join(reporter.machine_lines(facts)), flush=True)
    for result in bench.measure(bench.QUICK if args.quick else bench.FULL):
        results.append(result)
        if not args.json:
            print("\n".join(reporter.result_lines(result)), flush=True)
    if args.json:
        print(json.dumps(reporter.as_data(facts, "quick" if args.quick else "full", results), indent=2))
    return 0
