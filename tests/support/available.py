"""Whether there can be a device here at all."""

from __future__ import annotations

import pytest

from usermm import Ummunotify, UnavailableError


def why_not() -> str:
    """Why userfaultfd cannot be had here; empty when it can."""
    try:
        Ummunotify().close()
    except UnavailableError as error:
        return str(error)
    return ""


needs_userfaultfd = pytest.mark.skipif(bool(why_not()), reason=f"needs userfaultfd: {why_not()}")
