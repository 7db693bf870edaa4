"""Figures of usermm beside their floors, as ratios measured in one run: ``python -m benchmarks``."""
