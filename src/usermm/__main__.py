"""The command line: ``usermm VERB`` or ``python -m usermm VERB``.

Exit status: 0 and 1 are the verb's answer; 2 means that it could not be done (one line on stderr says why and
what helps, also for wrong arguments); 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from usermm import commands
from usermm.errors import UsermmError
from usermm.version import __version__

CANNOT = 2
INTERRUPTED = 128 + 2  # as a shell reports SIGINT
READER_GONE = 128 + 13  # as a shell reports SIGPIPE


class _Parser(argparse.ArgumentParser):
    """One line on stderr where argparse prints two or more."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        text = " ".join(f"{message}; {self.format_usage()}; `{self.prog} --help` says more".split())
        self.exit(CANNOT, f"{self.prog}: {text}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; `argv` is without the program's name. Wrong arguments raise `SystemExit` (argparse)."""
    words = sys.argv[1:] if argv is None else list(argv)
    # Not parse_args: that lets the parser of all verbs complain, whose usage does not help.
    args, unknown = _parser(words).parse_known_args(words)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
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


def _parser(words: Sequence[str]) -> _Parser:
    """It knows its verbs; only the module of the verb that was asked for is imported, all of them for help."""
    parser = _Parser(prog="usermm", description="Exact memory notifications on a stock kernel.")
    parser.add_argument("--version", action="version", version=f"usermm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    known = commands.names()
    for name in words[:1] if words[:1] and words[0] in known else known:
        command = commands.load(name)
        of_verb = verbs.add_parser(name, help=command.HELP, description=f"{command.HELP}.")
        of_verb.set_defaults(parser=of_verb)
        command.prepare(of_verb)
    return parser


def _one_line(error: UsermmError) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
