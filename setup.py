"""Builds the one extension module; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(HERE)) for path in (HERE / "libusermm").glob(pattern))



setup(
    ext_modules=[
        Extension(
            "usermm._core",
            sources=files("src/*.c") + files("python/*.c"),
            depends=files("**/*.h"),
            include_dirs=["libusermm/include"],
            extra_compile_args=[
                "-std=c11",
                "-O2",
                "-flto",
                "-fno-plt",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                "-pthread",
            ],
            extra_link_args=["-pthread", "-O2", "-flto"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
