"""The arrows between rooms, as ARCHITECTURE.md states them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "usermm"

# Room (first part below usermm) -> what of usermm it may import, by prefix.
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "version": (),
    "installation": ("usermm.errors",),
    "uapi": ("usermm.uapi",),
    "ummunotify": ("usermm._core", "usermm.errors", "usermm.uapi", "usermm.ummunotify"),
    "monitors": ("usermm.errors", "usermm.uapi", "usermm.monitors"),
    "registrars": ("usermm.errors", "usermm.uapi", "usermm._uring_calls", "usermm.registrars"),
    "rcache": ("usermm._core", "usermm.errors", "usermm.ummunotify.memory", "usermm.registrars.base", "usermm.rcache"),
    "testing": (
        "usermm.errors",
        "usermm.uapi",
        "usermm.ummunotify.events",
        "usermm.registrars.base",
        "usermm.testing",
    ),
    "hypercalls": ("usermm.errors", "usermm.uapi", "usermm.hypercalls"),
    "hypervisor": ("usermm.errors", "usermm.uapi", "usermm.version", "usermm.hypercalls", "usermm.hypervisor"),
    "grants": (
        "usermm._core",
        "usermm.errors",
        "usermm.uapi",
        "usermm.hypercalls",
        "usermm.ummunotify",
        "usermm.grants",
    ),
    "channels": (
        "usermm._core",
        "usermm.errors",
        "usermm.uapi",
        "usermm.hypercalls",
        "usermm.ummunotify",
        "usermm.grants",
        "usermm.channels",
    ),
    "uring": ("usermm.errors", "usermm.uapi", "usermm._uring_calls"),
    "_uring_calls": ("usermm.errors", "usermm.uapi"),
    "demonstration": (
        "usermm",
        "usermm.errors",
        "usermm.uring",
        "usermm.registrars",
        "usermm.demonstration",
        "usermm.uapi",
    ),
    "diagnosis": ("usermm", "usermm.monitors", "usermm.uapi", "usermm.uring", "usermm.diagnosis", "usermm.errors"),
    "measurement": (
        "usermm",
        "usermm.errors",
        "usermm.version",
        "usermm.uapi",
        "usermm.monitors",
        "usermm.registrars",
        "usermm.uring",
        "usermm.grants",
        "usermm.channels",
        "usermm.hypercalls",
        "usermm.hypervisor",
        "usermm.measurement",
    ),
    "programs": ("usermm.errors", "usermm.monitors", "usermm.programs"),
    "traces": ("usermm.errors", "usermm.uapi", "usermm.traces"),
    "reporters": (
        "usermm.demonstration.record",
        "usermm.diagnosis.report",
        "usermm.measurement.harness",
        "usermm.monitors.base",
        "usermm.traces",
        "usermm.reporters",
    ),
}
FREE = {"commands", "__init__", "__main__"}
SPEAKS = {"commands", "__main__"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = (PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").exists()
                package = (PACKAGE.parent / name.replace(".", "/")).is_dir() or name == "usermm._core"
                yield name if is_module or package else str(node.module)


def within(name: str, allowed: str) -> bool:
    """"usermm" alone allows the public names, not every room below."""
    return name == allowed or (allowed != "usermm" and name.startswith(allowed + "."))


def speaks(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            to_a_stream = any(keyword.arg == "file" for keyword in node.keywords)
            if node.func.id in ("print", "exit", "quit") and not to_a_stream:
                yield node.func.id


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_uses_only_what_it_may(path: Path) -> None:
    room = room_of(path)
    tree = ast.parse(path.read_text())
    if room not in FREE:
        ours = [name for name in imports(tree) if name.split(".")[0] == "usermm"]
        forbidden = [name for name in ours if not any(within(name, allowed) for allowed in ALLOWED[room])]
        assert not forbidden, f"{room} may not import {forbidden}"
    if room not in SPEAKS:
        assert not set(speaks(tree)), "only commands print or exit; reporters write to the stream they are given"


def test_every_room_is_listed() -> None:
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")}
    assert rooms == set(ALLOWED) | FREE


def test_only_one_folder_knows_python() -> None:
    users = {
        path.parent.name
        for path in (ROOT / "libusermm").rglob("*.[ch]")
        if "build" not in path.parts and "Python.h" in path.read_text()
    }
    assert users == {"python"}
