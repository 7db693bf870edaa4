"""``usermm run`` says in one line what will not work, before it starts the program, and is right about it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support import preload
from support.commands import TIMEOUT_S, command, environment, library, needs_preload, script, usermm
from support.elves import TRUE, compiled, elf32
from support.processes import TESTS
from support.users import NOBODY, public_folder, public_python, root_only

from usermm.monitors import userfaultfd
from usermm.programs import privileges
from usermm.uapi.userfaultfd import SYSTEM_CALL

pytestmark = needs_preload


def warned(*arguments: str | Path, env: dict[str, str] | None = None) -> str:
    done = usermm("run", *arguments, env=env or environment())
    assert done.returncode == 0, done
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("(it starts now, without the devices)\n")
    return str(done.stderr)


@pytest.mark.parametrize("option", ["-static", "-static-pie"])
def test_a_static_program(option: str, tmp_path: Path) -> None:
    path = compiled(tmp_path, option)
    assert f"{path} is statically linked" in warned(path)
    outer = script(tmp_path / "script", f"#!{path}\n")
    assert f"{path} is statically linked" in warned(outer)


def test_musl(tmp_path: Path) -> None:
    """musl's loader ends a program whose preloaded library lacks glibc's symbols: it starts without the library."""
    path = compiled(tmp_path, compiler="musl-gcc")
    assert f"{path} uses the C library musl" in warned(path)
    assert f"{path} uses the C library musl" in warned(path, env=environment(LD_PRELOAD=library()))


def test_address_sanitizer(tmp_path: Path) -> None:
    """Its runtime ends a program in which it is not the first library: it starts without ours."""
    runtime = preload.optional_library("libasan.so", "libgcc-12-dev")
    path = compiled(tmp_path, "-fsanitize=address")
    text = warned(path)
    assert f"{path} is built with AddressSanitizer" in text
    assert "LD_PRELOAD=$(gcc -print-file-name=libasan.so) usermm run -- PROGRAM" in text
    assert "AddressSanitizer" in warned(path, env=environment(LD_PRELOAD=library()))
    for cured in ({"LD_PRELOAD": runtime}, {"ASAN_OPTIONS": "verify_asan_link_order=0"}):
        done = usermm("run", path, env=environment(**cured))
        assert (done.returncode, done.stderr) == (0, "")


def test_address_sanitizer_is_why_the_library_is_left_out(tmp_path: Path) -> None:
    preload.optional_library("libasan.so", "libgcc-12-dev")
    path = compiled(tmp_path, "-fsanitize=address")
    done = preload.run([path], library=library())
    assert done.returncode != 0
    assert "come first" in done.stderr


def test_another_architecture_is_said_before_the_kernel_refuses(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_bytes(elf32(">", 8, b"/bin/true\0"))
    path.chmod(0o755)
    done = usermm("run", path)
    first, second = done.stderr.splitlines()
    assert "is 32-bit MIPS big-endian" in first
    assert second == f"usermm run: {path} cannot be executed: {os.strerror(errno.ENOEXEC)}"
    assert done.returncode == 126


def secure_program(folder: Path) -> Path:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("needs gcc: apt install gcc libc6-dev")
    target = folder / "secure"
    subprocess.run([gcc, str(TESTS / "support" / "native" / "secure.c"), "-o", str(target)], check=True)
    if os.statvfs(target).f_flag & os.ST_NOSUID:
        pytest.skip("the temporary folder is mounted nosuid: set TMPDIR to another")
    return target


def run_as(user: int | None, path: Path, *prefix: str) -> subprocess.CompletedProcess[Any]:
    other: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    words = [*prefix, *command("run", path, python=sys.executable if user is None else public_python())]
    settings: dict[str, Any] = {"env": environment(), "cwd": "/", "capture_output": True, "text": True, **other}
    return subprocess.run(words, check=False, timeout=TIMEOUT_S, **settings)


@root_only
@pytest.mark.parametrize(
    ("mode", "owner", "user", "secure"),
    [
        (0o755, 0, NOBODY, False),
        (0o4755, 0, NOBODY, True),
        (0o2755, 0, NOBODY, True),
        (0o2745, 0, NOBODY, False),
        (0o4755, 0, None, False),
        (0o2755, 0, None, False),
        (0o4755, NOBODY, None, True),
        (0o2755, NOBODY, None, True),
        (0o4755, NOBODY, NOBODY, False),
    ],
)
def test_other_privileges_are_judged_as_the_kernel_does(mode: int, owner: int, user: int | None, secure: bool) -> None:
    """A set-user-ID file of one's own is an ordinary file: the program itself says what the kernel made of it."""
    with public_folder() as folder:
        path = secure_program(folder)
        os.chown(path, owner, owner)
        path.chmod(mode)
        done = run_as(user, path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ("1 gone\n" if secure else "0 kept\n")
        assert ("other privileges" in done.stderr) == secure
        assert done.stderr.count("\n") == secure


@root_only
def test_file_capabilities_count_for_everybody_but_root() -> None:
    setcap = shutil.which("setcap", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    if setcap is None:
        pytest.skip("needs setcap: apt install libcap2-bin")
    with public_folder() as folder:
        path = secure_program(folder)
        done = subprocess.run([setcap, "cap_net_raw+ep", str(path)], capture_output=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"file capabilities cannot be set in {folder}: set TMPDIR to another file system")
        ran = run_as(NOBODY, path)
        assert ran.stdout == "1 gone\n"
        assert "the file has capabilities" in ran.stderr
        ran = run_as(None, path)
        assert (ran.stdout, ran.stderr) == ("0 kept\n", "")


@root_only
def test_without_new_privileges_the_bits_do_nothing() -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv: apt install util-linux")
    with public_folder() as folder:
        path = secure_program(folder)
        path.chmod(0o4755)
        done = run_as(NOBODY, path, "setpriv", "--no-new-privs")
        assert (done.stdout, done.stderr) == ("0 kept\n", "")


@root_only
def test_on_a_mount_without_set_user_id_the_bits_do_nothing() -> None:
    if shutil.which("setpriv") is None or shutil.which("unshare") is None:
        pytest.skip("needs setpriv and unshare: apt install util-linux")
    with public_folder() as folder:
        path = secure_program(folder)
        mounted = folder / "mounted"
        mounted.mkdir()
        # The mount is in a namespace of its own, and goes with the program.
        text = (
            f"mount -t tmpfs -o nosuid,mode=755 none {mounted} || exit 77; cp {path} {mounted}; "
            f"chmod 4755 {mounted / 'secure'}; exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups"
        )
        run = command("run", mounted / "secure", python=public_python())
        words = ["unshare", "-m", "sh", "-c", f'{text} "$@"', "sh", *run]
        done = subprocess.run(
            words, env=environment(), cwd="/", capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode == 77 or done.stderr.startswith("unshare: "):
            pytest.skip(f"needs a mount namespace: {done.stderr.strip()}")
        assert (done.stdout, done.stderr) == ("0 kept\n", "")


@root_only
def test_without_userfaultfd_the_doctor_is_named() -> None:
    number = SYSTEM_CALL.get(os.uname().machine)
    if number is None:
        pytest.skip(f"no system call number known for {os.uname().machine}")
    if os.path.exists(userfaultfd.NODE) and os.stat(userfaultfd.NODE).st_mode & 0o006:
        pytest.skip(f"{userfaultfd.NODE} is open to everybody here")
    # As Docker's default profile: EPERM for userfaultfd(2), everything else allowed. See seccomp(2).
    text = f"""
        import ctypes, os, struct, sys
        libc = ctypes.CDLL(None)
        code = [(0x20, 0, 0, 0), (0x15, 0, 1, {number}), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
        class Filter(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, ctypes.byref(Filter(len(code), ctypes.addressof(program)))) == 0
        os.execv(sys.executable, [sys.executable, "-m", "usermm", "run", "{TRUE}"])
    """
    python = public_python()
    done = subprocess.run(
        [python, "-c", textwrap.dedent(text)],
        env=environment(),
        cwd="/",
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "`usermm doctor` names the cure" in done.stderr
    assert done.stderr.count("\n") == 1


def test_this_process_is_ordinary() -> None:
    assert privileges.gained(str(TRUE)) == ""
