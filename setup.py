"""Builds the one extension module; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(HERE)) for room in ("src", "python") for path in (HERE / "libusermm" / room).glob("*.c"))

setup(
    ext_modules=[
        Extension(
            "usermm._core",
            sources=SOURCES,
            depends=sorted(str(path.relative_to(HERE)) for path in (HERE / "libusermm").rglob("*.h")),
            include_dirs=["libusermm/include"],
            extra_compile_args=["-std=c11", "-O2", "-flto", "-fno-plt", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"],
            extra_link_args=["-pthread", "-O2", "-flto"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
