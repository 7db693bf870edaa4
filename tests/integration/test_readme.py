"""README and tutorial print what they say they print, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.pages import HOW_TO, ROOT, blocks, program
from support.processes import run_quietly

from usermm.errors import UnavailableError
from usermm.uring import Ring


def test_the_program_of_the_readme_prints_its_output(tmp_path: Path) -> None:
    try:
        Ring(1).close()
    except UnavailableError as error:
        pytest.skip(f"needs io_uring: {error.strerror}")
    readme = ROOT / "README.md"
    (text,) = blocks(readme, "python")
    assert run_quietly(text, tmp_path) == blocks(readme, "")[0]


def test_the_program_of_the_tutorial_prints_its_output(tmp_path: Path) -> None:
    text, output = program(ROOT / "docs" / "tutorial.md")
    assert run_quietly(text, tmp_path) == output


def test_the_index_has_every_how_to_page() -> None:
    index = (HOW_TO / "README.md").read_text()
    pages = {page.name for page in HOW_TO.glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:)([^)]+)", page.read_text())
        if not leads_somewhere(page, target)
    ]
    assert not broken


def leads_somewhere(page: Path, target: str) -> bool:
    """The file is there, and the heading in it."""
    name, _, anchor = target.partition("#")
    path = page.parent / name if name else page
    return path.exists() and (not anchor or anchor in anchors(path))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
