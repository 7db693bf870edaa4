"""The reference model against two other formulations: a log that is asked questions, and a table of single pages."""

from __future__ import annotations

from property.model_machines import DeviceAgainstHistory, SpaceAgainstPages

TestDeviceAgainstHistory = DeviceAgainstHistory.TestCase
TestSpaceAgainstPages = SpaceAgainstPages.TestCase
