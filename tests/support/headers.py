"""What the public headers declare: functions, the comment above each, and the errno values named there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from support.processes import SOURCE

INCLUDE = SOURCE.parent / "libusermm" / "include"
HEADERS = (INCLUDE / "usermm.h", INCLUDE / "usermm_cache.h")

_COMMENT = r"/\*(?P<comment>.*?)\*/"
_FUNCTION = r"^(?P<text>\w[\w ]*[ *](?P<name>usermm_\w+)\(.*?\);)"
_COMMENT_OR_FUNCTION = re.compile(f"{_COMMENT}|{_FUNCTION}", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Function:
    """One declaration, with the errno values that the comment above it names."""

    name: str
    text: str
    errors: frozenset[str]


def functions(header: Path) -> list[Function]:
    """In the header's order; declarations that follow each other share a comment."""
    found, comment = [], ""
    for match in _COMMENT_OR_FUNCTION.finditer(header.read_text()):
        if match["name"] is None:
            comment = match["comment"]
        else:
            found.append(Function(match["name"], normal(match["text"]), errors(comment)))
    return found


def errors(text: str) -> frozenset[str]:
    """EINVAL and the like that are named in the text as -EINVAL."""
    return frozenset(re.findall(r"-(E[A-Z0-9]+)\b", text))


def normal(text: str) -> str:
    """A declaration with its white space made the same everywhere."""
    return re.sub(r"\s*([(),*])\s*", r"\1", " ".join(text.split()))
