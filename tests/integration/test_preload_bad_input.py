"""Odd uses of the device by C programs under the preload library: an answer each time, never a crash or a hang."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support import compiled
from support.preload import needs_preload, run_well

# The cases of each program in tests/support/native/preload/, which says what each is about.
CASES = {
    "bad_calls": [
        "ioctl_pointers",
        "read_pointers",
        "read_sizes",
        "vectors",
        "request_numbers",
        "wide_request_numbers",
        "requests_of_all_files",
        "values",
        "writing",
        "odd_mappings",
        "mapping_outlives_the_device",
    ],
    "descriptors": [
        "copies",
        "copies_share_their_flags",
        "a_copy_over_a_device_ends_it",
        "reused_numbers",
        "open_and_close",
        "many_opens",
        "close_all_raw",
        "close_all_others_raw",
        "close_all_by_range",
        "close_all_by_closefrom",
        "close_all_by_libc",
        "forbidden_after_the_start",
        "forbidden_from_the_start",
    ],
    "readiness": ["level", "edge", "oneshot", "epoll_of_a_copy"],
    "waiting": [
        "a_blocking_read_is_woken",
        "only_one_reader_gets_it",
        "close_while_another_thread_reads",
        "cancelled_in_read",
        "restarted",
        "interrupted",
        "sigio",
        "a_signal_of_ones_own",
        "from_signal_handlers",
        "from_a_handler_on_a_small_stack",
    ],
    "paths": [
        "by_open",
        "flags_are_kept",
        "by_other_names",
        "names_that_are_others",
        "for_writing",
        "creating",
        "by_stat",
        "by_access",
        "bad_pointers",
        "by_stream",
        "buffered_stream_reads",
        "reads_of_any_size",
        "errno_is_untouched",
    ],
    "page": [
        "plain",
        "populated",
        "all_is_locked",
        "all_is_locked_later",
        "moved",
        "moved_meanwhile",
        "discarded",
        "by_system_calls",
        "many_mappings",
        "written",
        "little_memory",
    ],
    "processes": [
        "forked",
        "forked_by_the_system_call",
        "last_thread_ends",
        "forked_twice",
        "forked_under_load",
        "vforked",
        "vforked_and_ends",
        "spawned",
        "by_the_shell",
        "execed_without_cloexec",
        "execed_with_cloexec",
        "forked_and_execed",
    ],
}

pytestmark = needs_preload


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("preload")
    built = {name: compiled.program(f"preload/{name}", folder) for name in CASES}
    fortified = folder / "fortified"
    fortified.mkdir()
    return {**built, "fortified": compiled.program("preload/paths", fortified, "-D_FORTIFY_SOURCE=2")}


@pytest.mark.parametrize(("program", "case"), [(program, case) for program in CASES for case in CASES[program]])
def test_case(programs: dict[str, Path], program: str, case: str) -> None:
    run_well([programs[program], case])


@pytest.mark.parametrize("case", CASES["paths"])
def test_case_fortified(programs: dict[str, Path], case: str) -> None:
    """glibc's checked entry points, which a program gets with -D_FORTIFY_SOURCE: __open_2, __read_chk and others."""
    run_well([programs["fortified"], case])


@pytest.mark.parametrize("program", CASES)
def test_every_case_runs(programs: dict[str, Path], program: str) -> None:
    done = subprocess.run([programs[program], "list"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == CASES[program]


def test_numbers_go_round_between_threads(tmp_path: Path) -> None:
    """Devices, pipes and files, copied and closed with the library's knowledge and without: each finds its own."""
    program = compiled.program("preload/torture", tmp_path)
    assert int(run_well([program, 1000, 6])) > 1000
