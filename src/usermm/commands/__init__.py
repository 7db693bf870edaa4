"""One module for each verb of the command line: its name is the verb. Only commands print or exit.

A module offers what `Command` says. Modules whose names start with an underscore are no commands.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from typing import Protocol, cast


class Command(Protocol):
    """What a command's module has."""

    HELP: str
    """One line for ``usermm --help``, without a full stop."""

    def prepare(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's own arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; return the exit status. A `UsermmError` becomes one line on stderr and status 2."""


def names() -> list[str]:
    """The verbs there are, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Command:
    """Import the verb's module."""
    return cast(Command, importlib.import_module(f"{__name__}.{name}"))
