"""Which memory can be watched: the rules, on made-up mappings."""

from __future__ import annotations

import fcntl
from typing import Final

import pytest

from usermm.uapi import procfs
from usermm.uapi.procfs import Mapping
from usermm.ummunotify.memory import Kind, Verdict, judge_mappings
from usermm.ummunotify.seals import F_SEAL_FUTURE_WRITE

START: Final = 0x7F0000000000
END: Final = START + 0x4000


def _judge(line: str, flags: str = "", seals: int | None = None) -> Verdict:
    text = f"{START:x}-{END:x} {line}\n" + (f"VmFlags: {flags}\n" if flags else "")
    return judge_mappings(START, END, procfs.mappings(text), lambda _: seals)


@pytest.mark.parametrize(
    "line",
    [
        "rw-p 00000000 00:00 0 ",
        "---p 00000000 00:00 0 ",
        "rw-p 00000000 00:00 0   [heap]",
        "rw-p 00000000 00:00 0   [stack]",
        "rw-p 00000000 00:00 0   [anon: arena]",
        "rw-s 00000000 00:01 9   /dev/zero (deleted)",
        "rw-s 00000000 00:01 9   [anon_shmem:pool]",
        "rw-p 00000000 00:06 4   /dev/zero",
        "rw-p 00000000 00:0f 8   /anon_hugepage (deleted)",
    ],
)
def test_anonymous_memory_is_watchable(line: str) -> None:
    verdict = _judge(line)
    assert (verdict.kind, verdict.cure) == (Kind.WATCHABLE, "")


@pytest.mark.parametrize(
    ("line", "flags", "words"),
    [
        ("rw-s 00000000 00:01 0   /SYSV00000000 (deleted)", "", "System V segment"),
        ("rw-s 00000000 00:01 65  /SYSV0000beef (deleted)", "rd wr sh mr mw", "System V segment"),
        ("r-xp 00000000 00:00 0   [vdso]", "", "kernel's own page"),
        ("r--p 00000000 00:00 0   [vvar]", "rd mr pf io de dd", "kernel's own page"),
        ("rw-s 00000000 00:10 57  anon_inode:[io_uring]", "", "ring of io_uring"),
        ("rw-s 00000000 00:0e 57  /secretmem (deleted)", "", "memfd_secret"),
        ("rw-s 00000000 00:06 57  /dev/nvidia0", "rd wr sh mr mw pf io", "device memory"),
        ("rw-p 00000000 00:00 0 ", "rd wr mr mw me wf dp", "MAP_DROPPABLE"),
        ("rw-s 00000000 00:10 57  anon_inode:[perf_event]", "", "kernel object"),
        ("rw-s 00000000 00:08 57  socket:[57]", "", "kernel object"),
        ("r--s 00000000 fe:00 57  /data/file", "rd mr me ms", "without write permission"),
    ],
)
def test_refused_memory_is_named_with_a_way_out(line: str, flags: str, words: str) -> None:
    verdict = _judge(line, flags)
    assert verdict.kind is Kind.REFUSED
    assert words in verdict.reason
    assert f"{START:#x}-{END:#x}" in verdict.reason
    assert verdict.cure
    assert "\n" not in str(verdict)


MEMFD: Final = "rw-s 00000000 00:01 9   /memfd:pool (deleted)"
ALL: Final = fcntl.F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE


@pytest.mark.parametrize(
    ("line", "seals", "words"),
    [
        (MEMFD, 0, "F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE"),
        (MEMFD, fcntl.F_SEAL_SHRINK, "F_ADD_SEALS, F_SEAL_FUTURE_WRITE)"),
        (MEMFD, F_SEAL_FUTURE_WRITE, "F_ADD_SEALS, F_SEAL_SHRINK)"),
        (MEMFD, fcntl.F_SEAL_GROW, "F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE"),
        (MEMFD, fcntl.F_SEAL_SEAL, "MFD_ALLOW_SEALING"),
        (MEMFD, None, "keep a descriptor"),
        ("rw-p 00000000 fe:00 9   /data/file", None, "copy it to anonymous memory"),
        ("rw-s 00000000 00:1b 9   /dev/shm/file (deleted)", fcntl.F_SEAL_SEAL, "MFD_ALLOW_SEALING"),
    ],
)
def test_file_memory_is_a_blind_spot(line: str, seals: int | None, words: str) -> None:
    verdict = _judge(line, seals=seals)
    assert verdict.kind is Kind.BLIND_SPOT
    assert line.split(maxsplit=4)[4] in verdict.reason
    assert words in verdict.cure
    assert "accept_file_memory=True" in verdict.cure


@pytest.mark.parametrize("seals", [ALL, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE, ALL | fcntl.F_SEAL_SEAL])
def test_a_sealed_memfd_is_watchable(seals: int) -> None:
    assert _judge(MEMFD, seals=seals).kind is Kind.WATCHABLE


def test_a_shared_mapping_without_write_permission_is_refused_even_when_sealed() -> None:
    assert _judge("r--s 00000000 00:01 9   /memfd:pool (deleted)", "rd sh mr me ms", ALL).kind is Kind.REFUSED
    assert _judge("r--s 00000000 00:01 9   /memfd:pool (deleted)", "rd sh mr mw me ms", ALL).kind is Kind.WATCHABLE


def _anonymous(start: int, end: int) -> Mapping:
    return Mapping(start, end, "rw-p", 0, (0, 0), 0, "")


@pytest.mark.parametrize(
    ("mapped", "hole"),
    [
        ([], (START, END)),
        ([(START + 0x1000, END)], (START, START + 0x1000)),
        ([(START, END - 0x1000)], (END - 0x1000, END)),
        ([(START, START + 0x1000), (START + 0x2000, END)], (START + 0x1000, START + 0x2000)),
        ([(START - 0x1000, START), (END, END + 0x1000)], (START, END)),
    ],
)
def test_a_hole_is_named_by_its_own_addresses(mapped: list[tuple[int, int]], hole: tuple[int, int]) -> None:
    verdict = judge_mappings(START, END, [_anonymous(*range_) for range_ in mapped], lambda _: None)
    assert (verdict.kind, verdict.mapping) == (Kind.REFUSED, None)
    assert f"{hole[0]:#x}-{hole[1]:#x}" in verdict.reason


def test_the_worst_mapping_decides() -> None:
    text = (
        f"{START:x}-{START + 0x1000:x} rw-p 00000000 00:00 0 \n"
        f"{START + 0x1000:x}-{START + 0x2000:x} rw-p 00000000 fe:00 9  /data/file\n"
        f"{START + 0x2000:x}-{END:x} rw-s 00000000 00:01 0  /SYSV00000000 (deleted)\n"
    )
    mappings = procfs.mappings(text)
    assert judge_mappings(START, END, mappings, lambda _: None).kind is Kind.REFUSED
    assert judge_mappings(START, START + 0x2000, mappings, lambda _: None).kind is Kind.BLIND_SPOT
    assert judge_mappings(START, START + 1, mappings, lambda _: None).kind is Kind.WATCHABLE


@pytest.mark.parametrize(("start", "end"), [(START, START), (END, START)])
def test_an_empty_range_is_refused(start: int, end: int) -> None:
    assert "is empty" in judge_mappings(start, end, [], lambda _: None).reason


def test_a_hostile_file_name_stays_one_line() -> None:
    verdict = _judge("rw-p 00000000 fe:00 9   /a\\012b\x1b[31m\udcff")
    assert str(verdict).isprintable()
