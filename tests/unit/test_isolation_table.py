"""docs/isolation.md says which test tries what: each of them is there, and each that tries something is in it."""

from __future__ import annotations

import re
from pathlib import Path

from support.processes import TESTS

TEXT = (TESTS.parent / "docs" / "isolation.md").read_text(encoding="utf-8")
FILES = [*TESTS.glob("integration/test_isolation_*.py"), TESTS / "stress" / "test_hypervisor_fuzz.py"]
# Of these the table names some.
OTHERS = [
    *(TESTS / "unit" / f"{name}.py" for name in ("test_channel_rings", "test_chores", "test_reference_tables")),
    *(TESTS / "integration" / f"{name}.py" for name in ("test_channel_hostile", "test_grant_leftovers")),
]
# They say something about a protection or about the words, not about an attack of their own.
NOT_ATTACKS = re.compile(r"test_(without_|what_\w+_worth|different_users_are_said|a_mistake_in_a_handler)")


def test_each_test_of_the_table_is_there_and_the_other_way_round() -> None:
    defined = {name for path in FILES for name in names_in(path)}
    named = set(re.findall(r"`(test_[a-z_]+)`", TEXT))
    assert named <= defined | {name for path in OTHERS for name in names_in(path)}
    assert {name for name in defined - named if not NOT_ATTACKS.match(name)} == set()


def names_in(path: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
