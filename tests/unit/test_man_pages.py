"""Each public function has a manual page that declares it as the header does and explains every errno named there."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from support.headers import HEADERS, INCLUDE, Function, errors, functions, normal

from usermm import commands

MAN = INCLUDE.parent / "man"
FUNCTIONS = [function for header in HEADERS for function in functions(header)]
PAGES = sorted(path for path in MAN.iterdir() if not path.read_text().startswith(".so"))
LINKS = sorted(path for path in MAN.iterdir() if path.read_text().startswith(".so"))
SECTIONS = ("NAME", "SYNOPSIS", "DESCRIPTION", "RETURN VALUE", "ERRORS", "SEE ALSO")

needs_man = pytest.mark.skipif(shutil.which("man") is None, reason="needs man (apt install man-db)")


def target_of(link: Path) -> Path:
    return MAN / Path(link.read_text().split()[1]).name


def page_of(function: Function) -> Path:
    path = MAN / f"{function.name}.3"
    return target_of(path) if path in LINKS else path


@cache
def plain(page: Path) -> str:
    """Without the formatter: every escape and font request undone, a space between what stands on lines of its own."""
    text = re.sub(r"\\f[BIRP]", "", page.read_text()).replace("\\-", "-")
    lines = []
    for line in text.splitlines():
        request, _, rest = line.partition(" ")
        if request in (".BI", ".BR", ".IR", ".RB"):  # alternating: arguments are joined
            rest = "".join(a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', rest))
        lines.append(rest if request in (".B", ".I", ".BI", ".BR", ".IR", ".RB") else line)
    return "\n".join(lines)


def section(page: Path, name: str) -> str:
    found = re.search(rf"^\.SH {name}\n(.*?)(?=^\.SH|\Z)", plain(page), re.DOTALL | re.MULTILINE)
    assert found, f"{page.name} has no section {name}"
    return found[1]


def common_errors(function: Function) -> frozenset[str]:
    """Those that the header's first comment names for every call on a device."""
    on_a_device = "(usermm_device*device" in function.text and function.text.startswith(("int ", "ssize_t "))
    return errors(HEADERS[0].read_text().split("*/")[0]) if on_a_device else frozenset()


def test_the_headers_are_understood() -> None:
    """As many declarations as there are names followed by a parenthesis at the beginning of a line."""
    text = "".join(header.read_text() for header in HEADERS)
    assert len(FUNCTIONS) == len(re.findall(r"^\w[\w *]*usermm_\w+\(", text, re.MULTILINE)) > 30
    by_name = {function.name: function for function in FUNCTIONS}
    assert by_name["usermm_unregister"].errors == {"EINVAL"}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_a_function_has_a_page_that_knows_it(function: Function) -> None:
    page = page_of(function)
    assert function.name in re.split(r"[, \n]+", section(page, "NAME").split(" - ")[0])
    declared = [normal(line) for line in section(page, "SYNOPSIS").splitlines()]
    assert function.text in declared
    if not function.text.startswith("void "):
        assert function.errors | common_errors(function) <= errors(section(page, "ERRORS"))


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".3"], ids=lambda page: page.name)
def test_a_page_has_its_sections_in_order_and_declares_nothing_else(page: Path) -> None:
    found = re.findall(r"^\.SH (.+)$", page.read_text(), re.MULTILINE)
    assert [name for name in found if name in SECTIONS] == list(SECTIONS)
    declared = set(re.findall(r"(usermm_\w+)\(", section(page, "SYNOPSIS")))
    assert declared == {function.name for function in FUNCTIONS if page_of(function) == page}


def test_the_command_s_page_has_every_verb_and_option() -> None:
    page = MAN / "usermm.1"
    for verb in commands.names():
        assert re.search(rf"^{verb}$", section(page, "DESCRIPTION"), re.MULTILINE)
        parser = argparse.ArgumentParser(add_help=False)
        commands.load(verb).prepare(parser)
        known = {option for action in parser._actions for option in action.option_strings}
        (line,) = re.findall(rf"^usermm {verb}\b.*$", section(page, "SYNOPSIS"), re.MULTILINE)
        assert known == set(re.findall(r"--\w+", line))


def test_no_link_leads_nowhere() -> None:
    assert all(target_of(link) in PAGES for link in LINKS)
    named = {function.name for function in FUNCTIONS} | {"ummunot"}
    assert {link.stem for link in LINKS} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_see_also_names_pages_that_exist(page: Path) -> None:
    for name, number in re.findall(r"^(\w+)\((\d)\)", section(page, "SEE ALSO"), re.MULTILINE):
        assert (MAN / f"{name}.{number}").exists() or name in ("userfaultfd",)


@needs_man
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_formatter_has_nothing_to_complain_about(page: Path) -> None:
    done = subprocess.run(
        ["man", "--warnings", "-l", str(page)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "usermm" in done.stdout


@needs_man
def test_man_finds_an_installed_page_by_each_name(tmp_path: Path) -> None:
    for path in MAN.iterdir():
        place = tmp_path / f"man{path.suffix[1:]}" / path.name
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    for name, number in (("usermm_close", "3"), ("usermm_cache_wait", "3"), ("ummunot", "4"), ("usermm", "7")):
        command = ["man", "-M", str(tmp_path), number, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert name in done.stdout
