"""The picture of who shares what with whom."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from usermm.reporters import sharing_layout
from usermm.reporters.sharing import picture
from usermm.reporters.sharing_layout import BOX_HEIGHT, BOX_WIDTH, arrange, place

SVG = "{http://www.w3.org/2000/svg}"


def grant(grantor: int, grantee: int, count: int, **more: Any) -> dict[str, Any]:
    state = {"writable": False, "isolated": True, "released": False, "revoked": False, "mapped_by": []}
    return {"grantor": grantor, "grantee": grantee, "first_reference": 8, "count": count, **state, **more}


def mapped(pages: int) -> list[dict[str, int]]:
    return [{"domid": 1, "handle": 1, "pages": pages}]


def status(
    count: int, grants: list[dict[str, Any]] | None = None, channels: list[tuple[int, int]] | None = None
) -> dict[str, Any]:
    ports = []
    for number, (one, other) in enumerate(channels or [], 1):
        for mine, theirs in ((one, other), (other, one)):
            end = {"kind": "interdomain", "remote_domid": theirs, "remote_port": number}
            ports.append({"domid": mine, "port": number, **end})
    return {
        "hypervisor": {"socket": "/run/x.sock"},
        "domains": [
            {"domid": domid, "name": f"domain-{domid}", "uid": 1000 + domid, "control": domid == 0}
            for domid in range(count)
        ],
        "grants": grants or [],
        "ports": ports,
    }


def drawn(data: dict[str, Any]) -> ET.Element:
    return ET.fromstring(picture(data))


def arrows(root: ET.Element) -> dict[str, str]:
    """Class by title."""
    found = {}
    for path in root.findall(f"{SVG}path"):
        found[path.findtext(f"{SVG}title") or ""] = path.attrib["class"]
    return found


def texts(root: ET.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_an_arrow_says_who_grants_how_much_and_how() -> None:
    root = drawn(
        status(
            3,
            [
                grant(0, 1, 16, writable=True, mapped_by=mapped(16)),
                grant(0, 1, 200, mapped_by=mapped(100)),
                grant(0, 1, 56),
                grant(1, 0, 1, isolated=False),
                grant(1, 2, 1024, writable=True, isolated=False, mapped_by=mapped(1024)),
            ],
        )
    )
    assert arrows(root) == {
        "domain 0 grants domain 1 16 pages rw": "rw",
        "domain 0 grants domain 1 256 pages ro, 100 mapped": "ro",
        "domain 1 grants domain 0 1 page ro, not mapped, not isolated": "ro u n",
        "domain 1 grants domain 2 1,024 pages rw, not isolated": "rw n",
    }
    assert {"16 pages rw", "256 pages ro, 100 mapped", "1 page ro", "1,024 pages rw"} <= set(texts(root))


def test_what_is_over_is_not_drawn_unless_it_is_mapped() -> None:
    root = drawn(
        status(
            3,
            [
                grant(0, 1, 1, revoked=True, mapped_by=mapped(1)),
                grant(1, 2, 1, released=True),
                grant(2, 0, 1, released=True, mapped_by=mapped(1)),
            ],
        )
    )
    assert list(arrows(root)) == ["domain 2 grants domain 0 1 page ro"]


def test_a_domain_that_is_gone_has_a_box_as_long_as_its_pages_are_mapped() -> None:
    root = drawn(status(2, [grant(7, 1, 4, mapped_by=mapped(4))]))
    assert root.find(f"{SVG}g[@class='x']") is not None
    assert "domid 7" in texts(root)


def test_event_channels_are_lines() -> None:
    root = drawn(status(3, channels=[(0, 1), (1, 0), (1, 2), (2, 2)]))
    titles = [line.findtext(f"{SVG}title") for line in root.findall(f"{SVG}line[@class='e']")]
    assert [title for title in titles if title] == [
        "2 event channels, domain 0 and domain 1",
        "1 event channel, domain 1 and domain 2",
    ]


def test_names_are_escaped_and_shortened() -> None:
    data = status(2)
    data["domains"][0]["name"] = "<b>&\"'"
    data["domains"][1]["name"] = "a\x1b\0" + "x" * 40
    data["hypervisor"]["socket"] = "/tmp/<&>"
    root = drawn(data)
    assert "<b>&\"'" in texts(root)
    assert f"a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}{'x' * 14}…" in texts(root)
    assert texts(root)[0] == "2 domains of the hypervisor /tmp/<&>"


def test_no_domain_is_a_picture_too() -> None:
    assert texts(drawn(status(0)))[0] == "0 domains of the hypervisor /run/x.sock"


def test_a_grant_to_oneself_is_a_loop() -> None:
    assert list(arrows(drawn(status(1, [grant(0, 0, 2)])))) == ["domain 0 grants domain 0 2 pages ro, not mapped"]


def test_twenty_domains_that_all_share_with_all_are_less_than_30_kb() -> None:
    pairs = list(itertools.permutations(range(20), 2))
    data = status(20, [grant(*pair, 16, writable=writable) for pair in pairs for writable in (True, False)], pairs)
    text = picture(data)
    assert len(text.encode()) < 30_000
    left_out = re.search(r"(\d+) arrows of fewer pages left out. (\d+) pairs with event channels left out", text)
    assert left_out
    assert (int(left_out[1]) + len(arrows(ET.fromstring(text))), int(left_out[2])) == (760, 190 - 50)


def test_light_and_dark_are_in_one_file() -> None:
    text = picture(status(1))
    assert "prefers-color-scheme:dark" in text
    assert not re.findall(r'(?:fill|stroke)="#', text), "every colour comes from the style"


@pytest.mark.parametrize("count", range(1, 41))
@pytest.mark.parametrize("shape", ["none", "ring", "star"])
def test_no_box_covers_another_or_leaves_the_picture(count: int, shape: str) -> None:
    pairs = {
        "none": [],
        "ring": [(domid, (domid + 1) % count) for domid in range(count)],
        "star": [(0, domid) for domid in range(1, count)],
    }[shape]
    layout = place(*arrange(range(count), pairs))
    assert layout.has_hub == (shape == "star" and count >= 4)
    assert sorted(layout.places) == list(range(count))
    for centre in layout.places.values():
        assert BOX_WIDTH / 2 <= centre.x <= layout.width - BOX_WIDTH / 2
        assert BOX_HEIGHT / 2 <= centre.y <= layout.height - BOX_HEIGHT / 2 - sharing_layout.LEGEND_HEIGHT
    for one, other in itertools.combinations(layout.places.values(), 2):
        assert abs(one.x - other.x) >= BOX_WIDTH or abs(one.y - other.y) >= BOX_HEIGHT, (one, other)


def test_those_who_share_are_neighbours() -> None:
    order, hub = arrange(range(6), [(0, 3), (3, 5), (5, 1), (1, 4), (4, 2)])
    assert hub is None
    chain = [0, 3, 5, 1, 4, 2]
    near = [abs(chain.index(one) - chain.index(other)) for one, other in itertools.pairwise(order)]
    assert near.count(1) >= 4
