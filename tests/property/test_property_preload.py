"""Random ABI calls and changes of memory by a C program under the preload library, against the model.

USERMM_CALLS sets how many; a million with USERMM_STRESS=1. A failure names its seed; USERMM_SEED runs one again.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from property import preload_script
from support import compiled
from support.preload import needs_preload, run_well

STRESS = os.environ.get("USERMM_STRESS") == "1"
CALLS = int(os.environ.get("USERMM_CALLS", "1000000" if STRESS else "60000"))
CALLS_A_SCRIPT = 2000
TRACED_SCRIPTS = 5
SEEDS = [int(os.environ["USERMM_SEED"])] if "USERMM_SEED" in os.environ else range(CALLS // CALLS_A_SCRIPT)

pytestmark = [needs_preload, pytest.mark.timeout(100 + CALLS // 100)]


@pytest.fixture(scope="module")
def player(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.program("preload/player", tmp_path_factory.mktemp("player"))


def played(player: Path, folder: Path, script: preload_script.Script, **variables: str) -> bytes:
    (folder / "script").write_bytes(b"".join(script.steps))
    run_well([player, folder / "script", folder / "results"], **variables)
    return (folder / "results").read_bytes()


def test_the_model_says_the_same(player: Path, tmp_path: Path) -> None:
    for seed in SEEDS:
        script = preload_script.make(seed, CALLS_A_SCRIPT)
        difference = script.first_difference(played(player, tmp_path, script))
        assert not difference, difference


def test_the_model_says_the_same_while_it_is_traced(player: Path, tmp_path: Path) -> None:
    for seed in SEEDS[:TRACED_SCRIPTS]:
        script = preload_script.make(seed, CALLS_A_SCRIPT)
        results = played(player, tmp_path, script, USERMM_TRACE=str(tmp_path / "trace"))
        difference = script.first_difference(results)
        assert not difference, difference
    assert (tmp_path / "trace").stat().st_size > CALLS_A_SCRIPT


def test_a_planted_difference_is_found(player: Path, tmp_path: Path) -> None:
    """The comparison sees what it should: one bit of the results turned."""
    script = preload_script.make(0, 500)
    results = bytearray(played(player, tmp_path, script))
    for place in range(0, len(results), 997):
        results[place] ^= 1
        assert script.first_difference(bytes(results))
        results[place] ^= 1
    assert not script.first_difference(bytes(results))
