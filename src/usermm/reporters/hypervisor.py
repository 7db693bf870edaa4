"""The status of a hypervisor as text: what it is, its domains, who shares what with whom, and what happened last."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

Data = Mapping[str, Any]

_MOST_ROWS: Final = 40
_LAST_RECORDS: Final = 10
_NEARLY: Final = 0.9
_QUOTA_OF: Final = {
    "grant_frames": "max_grant_frames",
    "event_channels": "max_event_channels",
    "memkb": "max_memkb",
    "store_entries": "quota_entries",
    "watches": "quota_maxwatch",
    "transactions": "quota_transaction",
}


def text(status: Data) -> str:
    """The whole report, each line ended by a newline."""
    names = {domain["domid"]: domain["name"] for domain in status["domains"]}
    parts = [
        _hypervisor(status["hypervisor"]),
        _domains(status["domains"]),
        _warnings(status["domains"]),
        _grants(status["grants"], names),
        _ports(status["ports"], names),
        _records(status["audit"]),
    ]
    blocks = ["".join(f"{clean(line)}\n" for line in part) for part in parts]
    return "\n".join(block for block in blocks if block)


def clean(line: str) -> str:
    """Without control characters, which a name or a reason could bring to the terminal."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in line)


def _hypervisor(about: Data) -> Iterator[str]:
    socket = about["socket"] or "a socket of systemd's"
    yield f"hypervisor {about['version']} on {socket}"
    process = f"process {about['pid']}, user {about['uid']}, incarnation {about['incarnation']}"
    yield f"{process}, since {_time(about['started'])}"
    parts = [_count(about[key], key[:-1]) for key in ("requests", "domains", "extents", "descriptors")]
    yield ", ".join(parts)


def _domains(domains: Sequence[Data]) -> Iterator[str]:
    if not domains:
        yield "no domain is connected"
        return
    head = ["DOMID", "NAME", "USER", "PROCESS", "GRANTS", "MAPPED", "PORTS", "KIB", "NODES", "WATCHES"]
    rows = []
    for domain in domains:
        usage = domain["usage"]
        columns = ("grants", "mapped", "event_channels", "memkb", "store_entries", "watches")
        name = domain["name"] + (" (control)" if domain["control"] else "")
        rows.append([str(domain["domid"]), name, str(domain["uid"]), str(domain["pid"])])
        rows[-1] += [f"{usage[column]:,}" for column in columns]
    yield from _table(head, rows, left={1})


def _warnings(domains: Sequence[Data]) -> Iterator[str]:
    """A quota that is nearly used up is worth a line."""
    for domain in domains:
        for used, quota in _QUOTA_OF.items():
            limit, now = domain["quotas"][quota], domain["usage"][used]
            if now and now >= _NEARLY * limit:
                yield f"domain {domain['domid']} ({domain['name']}) has used {now:,} of {quota} {limit:,}"


def _grants(grants: Sequence[Data], names: Mapping[int, str]) -> Iterator[str]:
    if not grants:
        yield "nothing is granted"
        return
    head = ["GRANTOR", "GRANTEE", "REFERENCES", "PAGES", "MODE", "STATE", "MAPPED"]
    rows = []
    for grant in grants[:_MOST_ROWS]:
        first, count = grant["first_reference"], grant["count"]
        references = f"{first}" if count == 1 else f"{first}-{first + count - 1}"
        mode = "rw" if grant["writable"] else "ro"
        pages = sum(mapping["pages"] for mapping in grant["mapped_by"])
        parties = [_name(grant["grantor"], names), _name(grant["grantee"], names)]
        rows.append([*parties, references, str(count), mode, _state(grant), str(pages) if pages else "no"])
    yield from _table(head, rows, left={0, 1, 2, 4, 5})
    yield from _rest(len(grants))


def _state(grant: Data) -> str:
    state = "revoked" if grant["revoked"] else "released, still mapped" if grant["released"] else "granted"
    return state if grant["isolated"] else f"{state}, not isolated"


def _ports(ports: Sequence[Data], names: Mapping[int, str]) -> Iterator[str]:
    if not ports:
        yield "no event channel is bound"
        return
    rows = []
    for port in ports:
        mine = f"{_name(port['domid'], names)} port {port['port']}"
        if port["kind"] == "interdomain":
            if (port["remote_domid"], port["remote_port"]) < (port["domid"], port["port"]):
                continue  # its other end has the line
            rows.append([mine, "<->", f"{_name(port['remote_domid'], names)} port {port['remote_port']}"])
        elif port["kind"] == "unbound":
            rows.append([mine, "...", f"waits for {_name(port['remote_domid'], names)}"])
        else:
            rows.append([mine, "<--", "the hypervisor (virq)"])
    yield from _table(["EVENT CHANNEL", "", "OTHER END"], rows[:_MOST_ROWS], left={0, 1, 2})
    yield from _rest(len(rows))


def _records(records: Sequence[Data]) -> Iterator[str]:
    if records:
        yield "last in the audit"
    for record in records[-_LAST_RECORDS:]:
        fields = (f"{key} {_plain(value)}" for key, value in record.items() if key not in ("time", "event"))
        yield f"  {_time(record['time'])}  {record['event']:<8} {', '.join(fields)}".rstrip()


def _plain(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _name(domid: int, names: Mapping[int, str]) -> str:
    return f"{names[domid]} ({domid})" if domid in names else f"({domid}, gone)"


def _rest(count: int) -> Iterator[str]:
    if count > _MOST_ROWS:
        yield f"  and {count - _MOST_ROWS:,} more: --json has them all"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Iterable[int]) -> Iterator[str]:
    """Columns as wide as their longest cell; those not in `left` hold numbers and end at the right."""
    cells = [head, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        line = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(line).rstrip()


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
