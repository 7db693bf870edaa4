"""The status of a hypervisor as text."""

from __future__ import annotations

from typing import Any

import pytest

from usermm.hypervisor.quotas import Quotas
from usermm.reporters import hypervisor as reporter


def domain(domid: int, name: str, **usage: int) -> dict[str, Any]:
    zero = dict.fromkeys(
        ("grants", "grant_frames", "mapped", "event_channels", "memkb", "store_entries", "watches", "transactions"), 0
    )
    return {
        "domid": domid,
        "name": name,
        "uid": 1000 + domid,
        "pid": 4000 + domid,
        "control": domid == 0,
        "quotas": Quotas().as_data(),
        "usage": {**zero, "store_entries": 3, **usage},
    }


def grant(grantor: int, grantee: int, first: int, count: int, **more: Any) -> dict[str, Any]:
    return {
        "grantor": grantor,
        "grantee": grantee,
        "first_reference": first,
        "count": count,
        "writable": False,
        "isolated": True,
        "released": False,
        "revoked": False,
        "mapped_by": [],
        **more,
    }


@pytest.fixture
def status() -> dict[str, Any]:
    return {
        "hypervisor": {
            "version": "1.0.0",
            "pid": 812,
            "uid": 0,
            "socket": "/run/usermm/hypervisor.sock",
            "incarnation": 17,
            "started": 1_790_000_000.5,
            "requests": 18231,
            "domains": 3,
            "extents": 1,
            "descriptors": 19,
        },
        "domains": [
            domain(0, "domain-0"),
            domain(5, "database", grants=1300, grant_frames=3, memkb=1_048_000, event_channels=1),
            domain(6, "web", mapped=4, event_channels=2, watches=12),
        ],
        "grants": [
            grant(5, 6, 0x1100008, 4, writable=True, mapped_by=[{"domid": 6, "handle": 9, "pages": 4}]),
            grant(5, 6, 0x110000C, 1, isolated=False),
            grant(5, 9, 0x110000D, 1024, released=True, mapped_by=[{"domid": 9, "handle": 10, "pages": 1000}]),
            grant(6, 0, 0x1100009, 1, revoked=True),
        ],
        "ports": [
            {"domid": 5, "port": 1, "kind": "interdomain", "remote_domid": 6, "remote_port": 2},
            {"domid": 6, "port": 1, "kind": "unbound", "remote_domid": 0, "remote_port": 0},
            {"domid": 6, "port": 2, "kind": "interdomain", "remote_domid": 5, "remote_port": 1},
            {"domid": 0, "port": 1, "kind": "virq", "remote_domid": 0, "remote_port": 0},
        ],
        "audit": [
            {"time": 1_790_000_001.25, "event": "arrive", "domid": 5, "name": "database", "uid": 1005, "pid": 4005},
            {"time": 1_790_000_002.0, "event": "grant", "domid": 5, "peer": 6, "count": 4, "writable": True},
            {"time": 1_790_000_003.0, "event": "fault"},
        ],
    }


EXPECTED = """\
hypervisor 1.0.0 on /run/usermm/hypervisor.sock
process 812, user 0, incarnation 17, since 2026-09-21 14:13:20 UTC
18,231 requests, 3 domains, 1 extent, 19 descriptors

DOMID  NAME                USER  PROCESS  GRANTS  MAPPED  PORTS        KIB  NODES  WATCHES
    0  domain-0 (control)  1000     4000       0       0      0          0      3        0
    5  database            1005     4005   1,300       0      1  1,048,000      3        0
    6  web                 1006     4006       0       4      2          0      3       12

domain 5 (database) has used 1,048,000 of max_memkb 1,048,576

GRANTOR       GRANTEE       REFERENCES         PAGES  MODE  STATE                   MAPPED
database (5)  web (6)       17825800-17825803      4  rw    granted                      4
database (5)  web (6)       17825804               1  ro    granted, not isolated       no
database (5)  (9, gone)     17825805-17826828   1024  ro    released, still mapped    1000
web (6)       domain-0 (0)  17825801               1  ro    revoked                     no

EVENT CHANNEL             OTHER END
database (5) port 1  <->  web (6) port 2
web (6) port 1       ...  waits for domain-0 (0)
domain-0 (0) port 1  <--  the hypervisor (virq)

last in the audit
  2026-09-21 14:13:21 UTC  arrive   domid 5, name database, uid 1005, pid 4005
  2026-09-21 14:13:22 UTC  grant    domid 5, peer 6, count 4, writable yes
  2026-09-21 14:13:23 UTC  fault
"""


def test_the_whole_status(status: dict[str, Any]) -> None:
    assert reporter.text(status) == EXPECTED


def test_a_hypervisor_without_domains(status: dict[str, Any]) -> None:
    status["hypervisor"].update(domains=0, requests=1, extents=0, socket="")
    status.update(domains=[], grants=[], ports=[], audit=[])
    assert reporter.text(status).splitlines() == [
        "hypervisor 1.0.0 on a socket of systemd's",
        "process 812, user 0, incarnation 17, since 2026-09-21 14:13:20 UTC",
        "1 request, 0 domains, 0 extents, 19 descriptors",
        "",
        "no domain is connected",
        "",
        "nothing is granted",
        "",
        "no event channel is bound",
    ]


def test_long_lists_end_with_how_much_more_there_is(status: dict[str, Any]) -> None:
    status["grants"] = [grant(5, 6, number, 1) for number in range(1040)]
    text = reporter.text(status)
    assert "  and 1,000 more: --json has them all" in text
    assert text.count("database (5)  web (6)") == 40


def test_no_name_and_no_reason_writes_to_the_terminal(status: dict[str, Any]) -> None:
    status["domains"][1]["name"] = "a\x1b[2Jb"
    status["audit"][0]["name"] = "c\rd\ne"
    text = reporter.text(status)
    assert "\x1b" not in text
    assert "a\\x1b[2Jb" in text
    assert "name c\\x0dd\\x0ae" in text


def test_a_quota_of_nothing_that_is_not_used_is_no_warning(status: dict[str, Any]) -> None:
    status["domains"][1]["usage"]["memkb"] = 0
    status["domains"][1]["quotas"]["max_memkb"] = 0
    assert "has used" not in reporter.text(status)
