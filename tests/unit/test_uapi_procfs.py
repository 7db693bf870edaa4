"""Reading the text of /proc/PID/maps and smaps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usermm.uapi import procfs

MAPS = """\
55d0c0a00000-55d0c0a21000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000004000 rw-s 00001000 00:01 1047                       /memfd:a b (deleted)
7f0000004000-7f0000005000 r-xp 00000000 fe:02 2146423                    /usr/lib/libc.so.6
7f0000006000-7f0000007000 ---p 00000000 00:00 0 $
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
""".replace("$", "")
SMAPS = """\
7f0000000000-7f0000004000 rw-p 00000000 00:00 0 $
Size:                 16 kB
THPeligible:           0
VmFlags: rd wr mr mw me uw ac $
7f0000004000-7f0000008000 rw-p 00000000 00:00 0 $
Rss:                   0 kB
Pss_Dirty:             0 kB
VmFlags: rd wr um ui $
""".replace("$", "")  # the kernel ends these lines with a space


def test_each_field() -> None:
    heap, memfd, library, guard, vsyscall = procfs.mappings(MAPS)
    assert (heap.path, heap.inode, heap.shared, heap.writable) == ("[heap]", 0, False, True)
    assert (memfd.start, memfd.end, memfd.offset_bytes) == (0x7F0000000000, 0x7F0000004000, 4096)
    assert (memfd.device, memfd.inode, memfd.path) == ((0, 1), 1047, "/memfd:a b (deleted)")
    assert memfd.shared
    assert (library.device, library.permissions) == ((0xFE, 2), "r-xp")
    assert (guard.path, guard.vm_flags) == ("", frozenset())
    assert vsyscall.end == 0xFFFFFFFFFF601000


def test_smaps_adds_the_flags_and_who_watches() -> None:
    first, second = procfs.mappings(SMAPS)
    assert first.vm_flags == {"rd", "wr", "mr", "mw", "me", "uw", "ac"}
    assert first.userfaultfd_modes == ("write-protect",)
    assert second.userfaultfd_modes == ("missing", "minor")


def test_no_text_is_no_mapping() -> None:
    assert procfs.mappings("") == []


@pytest.mark.parametrize("line", ["nonsense", "7f00-7f01 rwxp", "7f00-7f01 rwzp 0 00:00 0 ", "7F00-7F01 rw-p 0 0:0 0"])
def test_a_line_of_another_format_is_an_error_that_shows_it(line: str) -> None:
    with pytest.raises(ValueError, match="neither a mapping nor a detail") as caught:
        procfs.mappings(line)
    assert repr(line) in str(caught.value)


def test_overlapping_stops_reading_beyond_the_range() -> None:
    """A process can have 65 530 mappings, and smaps walks the page tables of each that is read."""
    read = []

    def lines() -> Iterator[str]:
        for line in MAPS.splitlines(keepends=True):
            read.append(line)
            yield line

    found = procfs.overlapping(lines(), 0x7F0000003FFF, 0x7F0000004001)
    assert [mapping.inode for mapping in found] == [1047, 2146423]
    assert len(read) == 5  # one past the first that is beyond: where a mapping's details end is known by the next


@pytest.mark.parametrize(("start", "end"), [(0x7F0000005000, 0x7F0000006000), (0x1000, 0x2000)])
def test_a_hole_overlaps_nothing(start: int, end: int) -> None:
    assert procfs.overlapping(MAPS.splitlines(), start, end) == []


@given(
    st.text(st.characters(exclude_characters="\n\0"), min_size=1).filter(lambda name: "\\012" not in name),
    st.sampled_from(["", " (deleted)"]),
)
def test_any_file_name_survives(name: str, suffix: str) -> None:
    """Found while writing: str.splitlines takes U+2028, form feed and others in file names for line ends."""
    path = f"/{name}{suffix}"
    header = f"1000-2000 rw-p 00000000 00:1b 7                          {path}\n"
    (mapping,) = procfs.mappings(header)
    assert mapping.path == path


def test_a_newline_in_a_file_name_is_decoded() -> None:
    (mapping,) = procfs.mappings("1000-2000 rw-p 00000000 00:1b 7   /a\\012b\n")
    assert mapping.path == "/a\nb"


def test_the_maps_of_this_process_parse() -> None:
    for path in ("/proc/self/maps", "/proc/self/smaps"):
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            found = procfs.mappings(file.read())
        assert any(mapping.path == "[heap]" for mapping in found)
        assert all(before.end <= after.start for before, after in pairwise(found))


def test_status_fields() -> None:
    assert procfs.status("Name:\tpython: x\nSeccomp:\t2\n\n") == {"Name": "python: x", "Seccomp": "2"}
