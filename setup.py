"""Builds the extension module and the C libraries beside it; everything else is in pyproject.toml.

In a wheel, and in src/usermm for a checkout (there ignored by git), the package has what C developers need:

    lib/libusermm.so, lib/libusermm-preload.so, lib/pkgconfig/usermm.pc, include/**.h, share/man/man*/*,
    share/systemd/*
"""

import os
import re
import shlex
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

HERE = Path(__file__).parent
NATIVE = Path("libusermm")  # relative, as setuptools wants it: builds run in HERE
COMPILE = ["-std=c11", "-O2", "-fno-plt", "-Wall", "-Wextra", "-pthread"]
PRELOAD = ["-DUSERMM_PRELOAD", "-U_FORTIFY_SOURCE"]


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(HERE)) for pattern in patterns for path in (HERE / NATIVE).glob(pattern))


class BuildAll(build_ext):
    """build_ext, and the C libraries and their files into the package's directory."""

    def run(self) -> None:
        super().run()
        package = Path(self.get_ext_fullpath("usermm._core")).parent  # in src for a build in place
        self.build_library(package)
        if files("preload/*.c"):
            self.build_preload(package)
        copy_files(package)

    def build_library(self, package: Path) -> None:
        """Only usermm_* is exported. The file's own name is its soname: a wheel has no symbolic links."""
        script = str(NATIVE / "libusermm.map")
        self.build_shared(
            package / "lib" / "libusermm.so",
            files("src/*.c"),
            [script],
            compile_flags=["-flto", "-fno-semantic-interposition"],
            link_flags=["-O2", "-flto", f"-Wl,--version-script={script}", "-Wl,-soname,libusermm.so"],
        )

    def build_preload(self, package: Path) -> None:
        """The core is inside, hidden, and does without malloc. Fortified headers would obstruct its own read()."""
        self.build_shared(
            package / "lib" / "libusermm-preload.so",
            files("src/*.c", "preload/*.c"),
            [],
            compile_flags=[*PRELOAD, "-fvisibility=hidden", "-ftls-model=initial-exec", "-fexceptions"],
            link_flags=["-lpthread", "-ldl"],
        )

    def build_shared(
        self, target: Path, sources: list[str], inputs: list[str], compile_flags: list[str], link_flags: list[str]
    ) -> None:
        """Compile `sources` for `target` alone; nothing if it is newer than them and all headers."""
        if not self.force and not newer_group([*sources, *inputs, *files("**/*.h"), "setup.py"], str(target)):
            return
        objects = self.compiler.compile(
            sources,
            output_dir=str(Path(self.build_temp) / target.stem),
            include_dirs=files("include", "src"),
            extra_postargs=[*COMPILE, *compile_flags],
        )
        # Not as an extension is linked: that has the interpreter's own folders in its search path.
        flags = ["-shared", "-pthread", *shlex.split(os.environ.get("LDFLAGS", ""))]
        unfinished = target.with_suffix(".new")  # a program may be running on the old one
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([*self.compiler.compiler_so, *flags, *objects, *link_flags, "-o", str(unfinished)])
        unfinished.rename(target)


def copy_files(package: Path) -> None:
    """Headers, man pages, systemd units and the pkg-config file. What a former build left is replaced, not added to."""
    for directory in ("include", "share"):
        shutil.rmtree(package / directory, ignore_errors=True)
    shutil.copytree(HERE / NATIVE / "include", package / "include")
    for page in files("man/*.[1-9]"):
        section = package / "share" / "man" / f"man{page[-1]}"
        section.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, section / Path(page).name)
    shutil.copytree(HERE / "share" / "systemd", package / "share" / "systemd")
    text = (HERE / NATIVE / "usermm.pc.in").read_text()
    pc = package / "lib" / "pkgconfig" / "usermm.pc"
    pc.parent.mkdir(parents=True, exist_ok=True)
    pc.write_text(text.replace("@VERSION@", version()).replace("@RPATH@", "-Wl,-rpath,${libdir}"))


def version() -> str:
    found = re.search(r'"(.+)"', (HERE / "src" / "usermm" / "version.py").read_text().split("__version__")[1])
    assert found, "src/usermm/version.py names no version"
    return found[1]


setup(
    cmdclass={"build_ext": BuildAll},
    ext_modules=[
        Extension(
            "usermm._core",
            sources=files("src/*.c", "python/*.c"),
            depends=files("**/*.h"),
            include_dirs=[str(NATIVE / "include")],
            extra_compile_args=[*COMPILE, "-flto", "-fvisibility=hidden"],
            extra_link_args=["-pthread", "-O2", "-flto"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
