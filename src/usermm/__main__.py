"""The command line: ``usermm VERB`` or ``python -m usermm VERB``.

Exit status: 0 and 1 are the verb's answer; 2 means that it could not be done (one line on stderr says why and
what helps, also for wrong arguments); 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from usermm import commands
from usermm.errors import UsermmError
from usermm.version import __version__

CANNOT = 2
INTERRUPTED = 128 + 2  # as a shell reports SIGINT
READER_GONE = 128 + 13  # as a shell reports SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; `argv` is without the program's name. Wrong arguments raise `SystemExit` (argparse)."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = _parser(words).parse_args(words)
    try:
        status = commands.load(args.verb).run(args)
        sys.stdout.flush()
        return status
    except UsermmError as error:
        print(f"usermm {args.verb}: {_one_line(error)}", file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt:
        print(f"\nusermm {args.verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more (usermm demo | head): the interpreter's own flush at exit must not complain
        # either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the module of the verb that was asked for is imported, all of them for help."""
    parser = argparse.ArgumentParser(
        prog="usermm", description="Exact memory notifications on a stock kernel."
    )
    parser.add_argument("--version", action="version", version=f"usermm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    known = commands.names()
    for name in words[:1] if words[:1] and words[0] in known else known:
        command = commands.load(name)
        command.prepare(verbs.add_parser(name, help=command.HELP, description=f"{command.HELP}."))
    return parser


def _one_line(error: UsermmError) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
