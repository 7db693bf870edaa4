"""`usermm.RegistrationCache` on real memory against `ModelCache` on a model of it, the same random steps for both."""

from __future__ import annotations

import pytest
from property.cache_side_by_side import CacheSideBySide

import usermm


@pytest.fixture(autouse=True, scope="module")
def _userfaultfd() -> None:
    try:
        usermm.Ummunotify().close()
    except usermm.UnavailableError as error:
        pytest.skip(f"no userfaultfd for the real one: {error}")


TestCacheSideBySide = CacheSideBySide.TestCase
