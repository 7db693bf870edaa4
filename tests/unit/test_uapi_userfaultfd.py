"""The numbers of uapi.userfaultfd are those of this system's header."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from usermm.uapi import userfaultfd
from usermm.uapi.userfaultfd import SINCE, Event, Feature

_NUMBERS = (
    "USERFAULTFD_IOC_NEW",
    "UFFDIO_API",
    "UFFDIO_REGISTER",
    "UFFDIO_UNREGISTER",
    "UFFDIO_WAKE",
    "UFFDIO_WRITEPROTECT",
    "UFFDIO_CONTINUE",
    "UFFDIO_REGISTER_MODE_MISSING",
    "UFFDIO_REGISTER_MODE_WP",
    "UFFDIO_REGISTER_MODE_MINOR",
    "UFFD_API",
    "UFFD_USER_MODE_ONLY",
)
_LAYOUTS = {
    "uffdio_api": userfaultfd.API,
    "uffdio_range": userfaultfd.RANGE,
    "uffdio_register": userfaultfd.REGISTER,
    "uffdio_writeprotect": userfaultfd.WRITEPROTECT,
    "uffdio_continue": userfaultfd.CONTINUE,
    "uffd_msg": userfaultfd.MESSAGE,
}


def _expected() -> dict[str, int]:
    wanted = {name: int(getattr(userfaultfd, name)) for name in _NUMBERS}
    wanted |= {f"UFFD_EVENT_{event.name}": int(event) for event in Event}
    wanted |= {f"UFFD_FEATURE_{feature.name}": int(feature) for feature in Feature}
    return wanted


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C program sees; names that an older header does not have are left out."""
    if shutil.which("gcc") is None or not Path("/usr/include/linux/userfaultfd.h").exists():
        pytest.skip("needs gcc and linux/userfaultfd.h (apt install gcc linux-libc-dev)")
    names = [
        f'#ifdef {name}\nprintf("{name} %llu\\n", (unsigned long long)({name}));\n#endif\n' for name in _expected()
    ]
    sizes = [f'printf("{name} %zu\\n", sizeof(struct {name}));\n' for name in _LAYOUTS]
    lines = ["#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/userfaultfd.h>\n", "int main(void) {\n"]
    source = tmp_path_factory.mktemp("header") / "numbers.c"
    source.write_text("".join([*lines, *names, *sizes, "return 0;\n}\n"]))
    program = source.with_suffix("")
    subprocess.run(["gcc", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


def test_numbers_are_those_of_the_header(header: dict[str, int]) -> None:
    expected = _expected()
    found = {name: value for name, value in header.items() if name in expected}
    assert len(found) > 20
    assert found == {name: expected[name] for name in found}


def test_layouts_have_the_sizes_of_the_header(header: dict[str, int]) -> None:
    assert {name: layout.size for name, layout in _LAYOUTS.items()} == {name: header[name] for name in _LAYOUTS}


def test_every_feature_says_since_when_it_exists() -> None:
    assert set(SINCE) == set(Feature)
