"""Programs that find the devices' nodes, by the preload library."""

from __future__ import annotations

import pytest

from support.preload import LIBRARY


def show_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs started from now on find the nodes; this process does not."""
    monkeypatch.setenv("LD_PRELOAD", str(LIBRARY))
