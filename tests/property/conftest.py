"""How hard Hypothesis works: a minute at most by default, far longer with USERMM_STRESS=1."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}

settings.register_profile("usermm", max_examples=400, stateful_step_count=60, print_blob=True, **_COMMON)
settings.register_profile("usermm-stress", max_examples=3000, stateful_step_count=120, print_blob=True, **_COMMON)
# For machines that must fail (test_property_planted_bugs.py): finding is enough, no shrinking, no memory of it. They
# end with the first failure; the rarest mistakes take several hundred examples on average, and fewer would miss them
# now and then.
settings.register_profile(
    "usermm-planted",
    max_examples=20_000,
    stateful_step_count=40,
    phases=[Phase.generate],
    database=None,
    report_multiple_bugs=False,
    **_COMMON,
)
settings.load_profile("usermm-stress" if os.environ.get("USERMM_STRESS") == "1" else "usermm")
