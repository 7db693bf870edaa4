"""The documentation's pages: the programs in them, and what they say that these print."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOW_TO = ROOT / "docs" / "how-to"


def blocks(page: Path, kind: str) -> list[str]:
    """The text of the fenced blocks of one kind, "" for those without; in the page's order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == kind]


def program(page: Path) -> tuple[str, str]:
    """All Python of a page as one program, in which a warning is an error, and all its output."""
    strict = "import warnings\nwarnings.simplefilter('error')\n"
    return strict + "\n\n".join(blocks(page, "python")), "".join(blocks(page, ""))
