"""The protocols in docs/models hold as they are, and fail without each of their protections."""

import shutil
import subprocess
from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parents[2] / "docs" / "models"
MISSING = [tool for tool in ("spin", "gcc", "make") if shutil.which(tool) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian packages of the same names)")
def test_each_model_holds_and_needs_each_protection() -> None:
    """Spin searches all interleavings: make fails when a model does not hold, or holds without a protection."""
    done = subprocess.run(["make", "-C", str(MODELS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = {path.stem for path in MODELS.glob("*.pml")}
    held = {line.split()[0] for line in done.stdout.splitlines() if " holds " in line}
    assert held == listed, "a model without a run"
