"""What a conformance list is run against."""

from __future__ import annotations

import abc
from typing import ClassVar

import pytest


class Subject(abc.ABC):
    """An implementation that may lack something by its nature, or be unable to run here."""

    name: ClassVar[str]
    cannot: ClassVar[dict[str, str]] = {}
    """What it lacks by its nature: the words that a test gives to `needs`, and the reason for people."""

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot run on this machine at all, or None."""
        return None

    def needs(self, ability: str) -> None:
        """Skips the test that calls it if the implementation cannot do this by its nature."""
        if ability in self.cannot:
            pytest.skip(f"{self.name}: {self.cannot[ability]}")
