"""Programs in processes of their own, with a limit of time, and forked children that answer their parent."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[2] / "src"
TESTS = Path(__file__).resolve().parents[1]


def run_program(
    text: str, path: Path, *, timeout_s: float = 30, python: str = sys.executable, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs `text` as a program kept in the directory `path`. Raises subprocess.TimeoutExpired, having killed it."""
    program = path / "program.py"
    program.write_text(textwrap.dedent(text))
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{TESTS}", "PYTHONFAULTHANDLER": "1"}
    command = [python, *options, str(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)


def run_quietly(text: str, path: Path, *, status: int = 0, **options: Any) -> str:
    """As run_program; the program must end with `status` and an empty stderr. Returns its output."""
    done = run_program(text, path, **options)
    assert (done.returncode, done.stderr) == (status, ""), f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def fork() -> int:
    """os.fork() without 3.12's warning about threads: forking beside the reader thread is what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


@contextlib.contextmanager
def beside(function: Callable[[], Any]) -> Iterator[None]:
    """`function` runs in a forked child until the block ends, if it does not end before."""
    child = fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def in_child(function: Callable[[], Any], *, timeout_s: float = 20) -> Any:
    """What `function` returns in a forked child. Raises AssertionError with the child's traceback, or when it hangs."""
    read_end, write_end = os.pipe()
    child = fork()
    if child == 0:
        _answer(function, write_end)
    os.close(write_end)
    try:
        ready = select.select([read_end], [], [], timeout_s)[0]
        if not ready:
            os.kill(child, signal.SIGKILL)
        with open(read_end, "rb", closefd=False) as stream:
            text = stream.read()
    finally:
        os.close(read_end)
        _, status = os.waitpid(child, 0)
    assert ready, f"the child gave no answer in {timeout_s} s"
    assert status == 0, f"the child ended with status {status}"
    answer, failure = pickle.loads(text)
    assert failure is None, failure
    return answer


def _answer(function: Callable[[], Any], write_end: int) -> None:
    failure = answer = None
    try:
        answer = function()
    except BaseException:
        failure = traceback.format_exc()
    with open(write_end, "wb") as stream:
        pickle.dump((answer, failure), stream)
    os._exit(0)
