"""Each mistake is found in a trace written by hand, and nothing is found in the traces of right clients."""

from __future__ import annotations

import io

import pytest
from support.written import PAGE, Trace, opened

from usermm.reporters import trace as reporter
from usermm.traces import parse
from usermm.traces.findings import INSTEAD, LEADS_TO, Finding, Kind
from usermm.traces.mistakes import Finder

EINVAL, EAGAIN, EFAULT, ENOTTY, ECHILD, EOPNOTSUPP = -22, -11, -14, -25, -10, -95
EXCHANGE, REGISTER_V2, REGISTER_V1 = 0xC0045501, 0x40205502, 0xC0205501


def found(trace: Trace) -> list[Finding]:
    finder = Finder()
    lines = parse.Lines(io.BytesIO("\n".join(trace.lines).encode()))
    for record in lines:
        finder.feed(record)
    assert lines.garbage == 0
    return finder.finish()


def kinds(trace: Trace) -> list[Kind]:
    return [finding.kind for finding in found(trace)]


def one(trace: Trace, kind: Kind) -> Finding:
    findings = found(trace)
    assert [finding.kind for finding in findings] == [kind], findings
    text = reporter.finding_line(findings[0])
    assert "\n" not in text
    assert LEADS_TO[kind] in text
    return findings[0]


RIGHT = {
    "nothing but open": opened(),
    "one change": opened().mmap().register(1).notify(1).read(1, last=1).unregister(1).close(),
    "exchange first": opened().add("exchange", result=0).register(1).unregister(1).close(),
    "one event at a time": opened().register(1).register(2).notify(1).read(1).read(2).read(last=1)
    .unregister(1).unregister(2).close(),
    "one at a time, trusting EAGAIN": opened().register(1).notify(1).read(1).read(last=1).nothing().unregister(1)
    .close(),
    "a queued region is unregistered": opened().register(1).register(2).notify(1).read(1).unregister(2).nothing()
    .unregister(1).close(),
    "unregisters while it drains": opened().mmap().register(1).register(2).notify(1).read(1).unregister(1).read(2)
    .unregister(2).read(last=1).register(1).unregister(1).close(),
    "the cookie is used again": opened().register(1).unregister(1).register(1).unregister(1).close(),
    "memory that is freed at the end": opened().mmap().register(1).notify(1).read(1, last=1).unregister(1).register(2)
    .notify(2).unregister(2).close(),
    "another thread registers meanwhile": opened().register(1).notify(1).read(1).register(2, tid=12)
    .register(3, tid=12).read(last=1).unregister(1).unregister(2).unregister(3).close(),
    "registers once between two reads": opened().register(1).register(2).notify(1).read(1).unregister(1).register(3)
    .read(2).unregister(2).register(4).read(last=1).unregister(3).unregister(4).close(),
    "version 1, one event at a time": opened(1).register(1).notify(1).read(1, size=32).nothing().unregister(1).close(),
    "version 1, a full buffer": opened(1).mmap().register(1).notify(1).read(1, size=32).nothing().unregister(1).close(),
    "two processes": opened().open(pid=20).register(1).register(1, pid=20).unregister(1, pid=20).unregister(1),
    "a child opens its own": opened().register(1).open(pid=20, device=2).close(pid=20, device=2).unregister(1).close(),
    "a refusal that the client respects": opened().register(1, result=EOPNOTSUPP).close(),
    "the register of one thread is written after the unregister of another": opened().unregister(1).register(1).close(),
    "the LAST is written before its notification": opened().mmap().register(1).read(1, last=1).notify(1).unregister(1)
    .register(2).unregister(2).close(),
    "a registration that comes before the drain": opened().mmap().register(1).notify(1).register(2).read(1, last=1)
    .unregister(1).notify(2).unregister(2).close(),
    "the probe of a refused open": Trace().refused_open(1),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_found_in_a_right_client(name: str) -> None:
    assert found(RIGHT[name]) == []


def test_every_kind_says_what_it_leads_to_and_what_to_do() -> None:
    assert set(LEADS_TO) == set(INSTEAD) == set(Kind)


def test_last_is_not_reached_before_the_close() -> None:
    finding = one(opened().register(1).notify(1).read(1).unregister(1).close(), Kind.LAST_NOT_REACHED)
    assert finding.lines == [4, 6]
    assert finding.site == "client+0x4 (main)"


def test_last_is_not_reached_before_the_trace_ends() -> None:
    assert one(opened().register(1).notify(1).read(1).unregister(1), Kind.LAST_NOT_REACHED).lines == [4]


def test_events_are_read_one_by_one_and_the_client_goes_on() -> None:
    trace = opened().register(1).register(2).notify(1).read(1).unregister(1).register(3).register(4)
    trace.read(2, last=1).unregister(2).unregister(3).unregister(4).close()
    finding = one(trace, Kind.LAST_NOT_REACHED)
    assert "before it went on to REGISTER, at line 8" in finding.what
    assert finding.lines == [5, 8]


def test_a_loop_that_does_so_is_one_finding() -> None:
    trace = opened()
    for round_ in range(100):
        trace.register(2 * round_).register(2 * round_ + 1).notify(round_ + 1)
        trace.read(2 * round_, site="client+0x99 (loop)").unregister(2 * round_).unregister(2 * round_ + 1)
    finding = one(trace, Kind.LAST_NOT_REACHED)
    assert finding.count == 100
    assert len(finding.lines) <= 6


def test_the_lines_of_what_repeats_are_in_order() -> None:
    """Each region's register and the read that reported it: the second register stands before the first read."""
    trace = opened().register(1, site="a+0x1 (add)").register(2, site="a+0x1 (add)").notify(1).read(1)
    trace.notify(2).read(2, last=2).close()
    assert one(trace, Kind.COOKIE_LEAKED).lines == [2, 3, 5, 7]


def test_version_1_gives_no_last_without_room() -> None:
    finding = one(opened(1).register(1).notify(1).read(1, size=32).unregister(1).close(), Kind.LAST_NOT_REACHED)
    assert finding.advice == "read until EAGAIN, or give read more than 32 bytes"


def test_a_generation_that_moved_and_was_never_read_about() -> None:
    finding = one(opened().mmap().register(1).notify(1).unregister(1).close(), Kind.NOT_DRAINED)
    assert "nothing was ever read" in finding.what
    assert finding.lines == [4]


def test_without_the_page_nobody_can_have_seen_the_generation() -> None:
    assert kinds(opened().register(1).notify(1).unregister(1).close()) == []


def test_a_client_that_drains_once_and_then_no_more() -> None:
    trace = opened().mmap().register(1).notify(1).read(1, last=1).unregister(1)
    trace.register(2).notify(2).register(3).unregister(2).unregister(3).close()
    finding = one(trace, Kind.NOT_DRAINED)
    assert "moved to 2" in finding.what
    assert "events were read only up to 1" in finding.what
    assert finding.lines == [8, 9]
    assert finding.site == ""  # that of another line would stand beside these


def test_events_without_any_last_and_then_no_more() -> None:
    trace = opened().mmap().register(1).notify(1).register(2).read(1).unregister(1).unregister(2).close()
    findings = {finding.kind: finding for finding in found(trace)}
    assert set(findings) == {Kind.NOT_DRAINED, Kind.LAST_NOT_REACHED}
    assert findings[Kind.NOT_DRAINED].what.endswith("no LAST was read")


def test_the_first_last_may_confirm_nothing() -> None:
    trace = opened().mmap().register(1).read(last=0).notify(1).register(2).unregister(1).unregister(2).close()
    assert one(trace, Kind.NOT_DRAINED).what.endswith("events were read only up to 0")


def test_a_stale_region_that_is_still_registered_at_the_end() -> None:
    trace = opened().mmap().register(1).notify(1).read(1, last=1).unregister(1).register(2).notify(2)
    assert kinds(trace) == [Kind.NEVER_UNREGISTERED, Kind.NOT_DRAINED]


@pytest.mark.parametrize("start", [0, 2 * PAGE, 9 * PAGE])
def test_a_region_that_was_not_hit_is_not_stale(start: int) -> None:
    trace = opened().mmap().register(1).notify(1).read(1, last=1).unregister(1)
    trace.register(2).register(3, start, start + PAGE).notify(2).unregister(2)
    assert kinds(trace) == [Kind.NEVER_UNREGISTERED]


def test_a_cookie_that_is_used_again_has_no_past() -> None:
    trace = opened().register(1).notify(1).read(1, last=1).unregister(1).register(1)
    assert one(trace, Kind.NEVER_UNREGISTERED).lines == [6]


def test_a_region_that_is_never_unregistered() -> None:
    finding = one(opened().register(0xAB).close(), Kind.NEVER_UNREGISTERED)
    assert "cookie 0xab" in finding.what
    assert "its close at line 3" in finding.what
    assert finding.site == "client+0x2 (main)"


def test_many_of_one_place_are_one_finding() -> None:
    trace = opened()
    for cookie in range(1000):
        trace.register(cookie, site="client+0x5 (add)")
    assert one(trace, Kind.NEVER_UNREGISTERED).count == 1000


def test_a_region_that_stays_registered_after_its_event() -> None:
    finding = one(opened().register(1).notify(1).read(1, last=1).close(), Kind.COOKIE_LEAKED)
    assert finding.lines == [2, 4]


def test_a_cookie_that_is_in_use() -> None:
    trace = opened().register(7).register(7, PAGE * 4, PAGE * 5, result=EINVAL).unregister(7).close()
    finding = one(trace, Kind.COOKIE_IN_USE)
    assert finding.lines == [2, 3]
    assert "line 2 (client+0x2 (main))" in finding.what


def test_unregistering_twice() -> None:
    finding = one(opened().register(7).unregister(7).unregister(7, result=EINVAL).close(), Kind.COOKIE_UNKNOWN)
    assert "was unregistered at line 3" in finding.what


def test_unregistering_what_was_refused() -> None:
    trace = opened().register(7, result=EOPNOTSUPP).unregister(7, result=EINVAL).close()
    assert "was refused at line 2 (EOPNOTSUPP)" in one(trace, Kind.COOKIE_UNKNOWN).what


def test_unregistering_what_never_was() -> None:
    finding = one(opened().unregister(7, result=EINVAL).close(), Kind.COOKIE_UNKNOWN)
    assert "never registered" in finding.what


def test_exchange_after_the_first_use() -> None:
    trace = opened().register(1).add("exchange", result=EINVAL).unregister(1).close()
    assert one(trace, Kind.EXCHANGE_LATE).lines == [2, 3]


def test_exchange_that_faulted_was_the_first_use() -> None:
    trace = opened().add("ioctl", request=EXCHANGE, result=EFAULT).add("exchange", result=EINVAL)
    fault, late = found(trace)
    assert (fault.kind, late.kind) == (Kind.BAD_POINTER, Kind.EXCHANGE_LATE)
    assert late.lines == [2, 3]


@pytest.mark.parametrize(("start", "end"), [(PAGE, PAGE), (2 * PAGE, PAGE), (0, 0), (2**64 - 1, 0)])
def test_regions_that_hold_nothing(start: int, end: int) -> None:
    finding = one(opened().register(1, start, end).unregister(1).close(), Kind.EMPTY_REGION)
    assert finding.is_warning


@pytest.mark.parametrize("size", [0, 1, 31])
def test_a_read_that_is_too_short(size: int) -> None:
    assert one(opened().read(size=size, result=0).close(), Kind.SHORT_READ).what == f"read of {size} bytes"


def test_a_read_into_bad_memory() -> None:
    assert "events of that read are lost" in one(opened().read(result=EFAULT).close(), Kind.BAD_BUFFER).leads_to


def test_an_argument_in_bad_memory() -> None:
    finding = one(opened().add("ioctl", request=REGISTER_V2, result=EFAULT).close(), Kind.BAD_POINTER)
    assert finding.leads_to == "nothing was done"


def test_the_other_versions_request() -> None:
    finding = one(opened().add("ioctl", request=REGISTER_V1, result=ENOTTY), Kind.WRONG_REQUEST)
    assert "/dev/ummunot " in finding.advice
    one(opened(1).add("ioctl", request=REGISTER_V2, result=ENOTTY), Kind.WRONG_REQUEST)
    assert "0x1234" in one(opened().add("ioctl", request=0x1234, result=ENOTTY), Kind.WRONG_REQUEST).what


def test_the_interface_version_of_version_1() -> None:
    one(opened(1).register(1, result=EINVAL), Kind.INTERFACE_VERSION)


def test_an_open_for_writing() -> None:
    one(Trace().refused_open(22, flags=2), Kind.OPEN_FOR_WRITING)


def test_a_mapping_that_is_refused() -> None:
    one(opened().mmap(length=8192, result=EINVAL, address=0), Kind.MMAP_REFUSED)


def test_a_child_that_goes_on_with_its_parents_device() -> None:
    trace = opened().register(1).unregister(1)
    trace.register(2, pid=20, result=ECHILD).read(pid=20, result=ECHILD).close(pid=20).close()
    assert kinds(trace) == [Kind.PARENTS_DEVICE, Kind.PARENTS_DEVICE]


def test_exec_begins_to_count_anew() -> None:
    """The regions of the program before are not those of the one after."""
    findings = found(opened().register(1).open().register(2).unregister(2).close())
    assert [finding.kind for finding in findings] == [Kind.NEVER_UNREGISTERED]
    assert "another program at line 3" in findings[0].what


def test_a_trace_that_begins_in_the_middle() -> None:
    assert kinds(Trace().unregister(1).read(5, last=3).close()) == []


def test_the_relation_of_many_regions_and_changes_is_quick() -> None:
    trace = opened().mmap()
    for index in range(20_000):
        trace.register(index, index * PAGE * 2, index * PAGE * 2 + PAGE, site="s")
    for index in range(5000):
        trace.notify(index + 1, index * PAGE * 2 + PAGE, index * PAGE * 2 + 2 * PAGE)
    findings = found(trace)
    assert [finding.kind for finding in findings] == [Kind.NEVER_UNREGISTERED, Kind.NOT_DRAINED]
    assert "nothing was ever read" in findings[1].what
