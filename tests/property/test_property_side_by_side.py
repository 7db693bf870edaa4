"""`usermm.Ummunotify` on real memory against `ModelDevice` on a model of it, the same random steps for both."""

from __future__ import annotations

import pytest
from property.side_by_side import SideBySide

import usermm


@pytest.fixture(autouse=True, scope="module")
def _userfaultfd() -> None:
    try:
        usermm.Ummunotify().close()
    except usermm.UnavailableError as error:
        pytest.skip(f"no userfaultfd to compare with: {error}")


TestSideBySide = SideBySide.TestCase
