"""``usermm trace``: what ``usermm run --trace`` wrote, for people, with the mistakes of the program that was traced.

Exit status: 0 when no mistake was found, warnings or not, 1 when one was, 2 when the file cannot be read or is no
trace, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import json
import sys

from usermm.errors import UsermmError
from usermm.reporters import trace as reporter
from usermm.traces.findings import Finding
from usermm.traces.mistakes import Finder
from usermm.traces.parse import Lines

HELP = "Print a trace of `usermm run --trace`, and the mistakes in it"


def prepare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of trace."""
    parser.add_argument("file", metavar="FILE", help="what `usermm run --trace FILE` wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the findings and nothing else")


def run(args: argparse.Namespace) -> int:
    """Print the calls as they are read, then the findings."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name in a trace need not fit the terminal's encoding
    try:
        with open(args.file, "rb") as stream:
            return 0 if all(finding.is_warning for finding in _report(Lines(stream), args.json)) else 1
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        # ValueError: a null byte in the name, or TraceError
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsermmError(f"{args.file}: {reason}") from None


def _report(lines: Lines, as_json: bool) -> list[Finding]:
    finder, start_ns = Finder(), None
    for record in lines:
        finder.feed(record)
        start_ns = record.time_ns if start_ns is None else start_ns
        if not as_json:
            print(reporter.record_line(record, start_ns))
    findings = finder.finish()
    if as_json:
        print(json.dumps(reporter.as_data(lines, findings, finder.devices), indent=2))
    else:
        print("\n".join(reporter.ending(lines, findings, finder.devices)))
    return findings
