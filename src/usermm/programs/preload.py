"""The environment in which a program finds the devices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from usermm.errors import UsermmError

PRELOAD: Final = "LD_PRELOAD"
TRACE: Final = "USERMM_TRACE"

_SPLITS: Final = re.compile("[: ]")  # what ld.so(8) splits the list at; neither can be escaped
_UNFIT: Final = re.compile("[: $]")  # and $ORIGIN, $LIB, $PLATFORM are expanded
_FIRST: Final = re.compile(r"(?:^|/)lib(?:clang_rt\.)?(?:a|hwa|l|m|t)san[.-][^/]*$")


def prepare(environment: Mapping[str, str], library: str, trace: str | None) -> dict[str, str]:
    """`environment` with `library` preloaded in front of what was there, and the calls written to `trace`.

    Raises UsermmError when the library lies where LD_PRELOAD cannot name it.
    """
    if _UNFIT.search(library):
        raise UsermmError(f"LD_PRELOAD cannot name {library!r}: install usermm in a path without spaces, ':' and '$'")
    prepared = {**environment, PRELOAD: _in_front(library, environment.get(PRELOAD, ""))}
    if trace is not None:
        prepared[TRACE] = trace
    return prepared


def has_sanitizer(environment: Mapping[str, str]) -> bool:
    """True when the runtime of a sanitizer is preloaded already."""
    return any(_FIRST.search(name) for name in _SPLITS.split(environment.get(PRELOAD, "")))


def leave_out(environment: Mapping[str, str], library: str) -> dict[str, str]:
    """`environment` for a program that `library` would end (`inspection.is_ended_by_preload`)."""
    others = [name for name in _SPLITS.split(environment.get(PRELOAD, "")) if name not in ("", library)]
    left = {name: value for name, value in environment.items() if name != PRELOAD}
    return {**left, PRELOAD: ":".join(others)} if others else left


def _in_front(library: str, before: str) -> str:
    """A sanitizer's runtime stays first: it ends the program when it is not."""
    others = [name for name in _SPLITS.split(before) if name and name != library]
    first = [name for name in others if _FIRST.search(name)]
    return ":".join([*first, library, *(name for name in others if name not in first)])
