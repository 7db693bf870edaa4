"""`usermm.RegistrationCache` on real memory against `ModelCache` on a model of it, the same random steps for both."""

from __future__ import annotations

from property.cache_side_by_side import CacheSideBySide
from support.available import needs_userfaultfd

pytestmark = needs_userfaultfd

TestCacheSideBySide = CacheSideBySide.TestCase
