"""``usermm doctor``: what this machine allows, tried, and the exact command that gets the rest.

Exit status: 0 when exact notifications are available here, 1 when they are not.
"""

from __future__ import annotations

import argparse
import json
import sys

from usermm.diagnosis import report
from usermm.reporters import doctor as reporter

HELP = "Try what this machine allows, and name the command that gets the rest"


def prepare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the doctor."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Examine and report."""
    found = report.examine()
    data = report.as_data(found)
    sys.stdout.write(json.dumps(data, indent=2) + "\n" if args.json else reporter.text(data))
    return 0 if found.exact else 1
