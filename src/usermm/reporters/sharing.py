"""A picture of who shares what with whom: SVG, drawn by hand from the status of a hypervisor.

Domains are boxes on an ellipse; the one that nearly all share with is in the middle. An arrow goes from who grants to
who may map, and bends to its own right, so that both directions of a pair are seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from usermm.reporters.sharing_layout import BOX_HEIGHT, BOX_WIDTH, MARGIN, Layout, Place, arrange, curve, place

Data = Mapping[str, Any]

_MOST_ARROWS: Final = 50  # more cannot be told apart, and the file stays small
_MOST_CHANNELS: Final = 50
_MOST_LABELS: Final = 24
_LABEL_HEIGHT: Final = 14
_LONGEST_NAME: Final = 18

_STYLE: Final = """
svg{--back:#fff;--ink:#1f2328;--soft:#656d76;--box:#f6f8fa;--edge:#8c959f;--ro:#0969da;--rw:#bc4c00;background:var(--back)}
@media(prefers-color-scheme:dark){svg{--back:#0d1117;--ink:#e6edf3;--soft:#8d96a0;--box:#161b22;--edge:#6e7681;--ro:#4493f8;--rw:#f0883e}}
text{font:12px system-ui,Helvetica,Arial,sans-serif;fill:var(--ink)}
.h{font-size:15px;font-weight:600}.b{font-weight:600}.s{fill:var(--soft);font-size:11px}.m{text-anchor:middle}
rect{fill:var(--box);stroke:var(--edge)}.c rect{stroke-width:2.5}.x rect{stroke-dasharray:3 3}
path,line{fill:none}.ro{stroke:var(--ro)}.rw{stroke:var(--rw)}.u{stroke-opacity:.4}.n{stroke-dasharray:6 4}
.e{stroke:var(--soft);stroke-opacity:.6}
.l{paint-order:stroke;stroke:var(--back);stroke-width:4px;stroke-linejoin:round;font-size:11px;text-anchor:middle}
.t{stroke:none}.ro.t{fill:var(--ro)}.rw.t{fill:var(--rw)}
"""


@dataclass(slots=True)
class _Arrow:
    """All that one domain grants another in one mode. `isolated` only when all of it is."""

    grantor: int
    grantee: int
    writable: bool
    pages: int = 0
    mapped: int = 0
    isolated: bool = True

    def label(self) -> str:
        """That nothing is mapped is seen."""
        mode = "rw" if self.writable else "ro"
        mapped = f", {self.mapped:,} mapped" if 0 < self.mapped < self.pages else ""
        return f"{self.pages:,} {'page' if self.pages == 1 else 'pages'} {mode}{mapped}"

    def sentence(self) -> str:
        """What is shown where the pointer is."""
        more = ("" if self.mapped else ", not mapped") + ("" if self.isolated else ", not isolated")
        return f"domain {self.grantor} grants domain {self.grantee} {self.label()}{more}"


def picture(status: Data) -> str:
    """The whole file."""
    arrows = _arrows(status["grants"])
    channels = _channels(status["ports"])
    domains = {domain["domid"]: domain for domain in status["domains"]}
    ends = [(arrow.grantor, arrow.grantee) for arrow in arrows]
    for domid in sorted({domid for pair in [*ends, *channels] for domid in pair} - set(domains)):
        domains[domid] = {"domid": domid, "name": "gone", "gone": True}
    layout = place(*arrange(sorted(domains), [*ends, *channels]))
    title = f"{_count(len(status['domains']), 'domain')} of the hypervisor {status['hypervisor']['socket']}".strip()
    size = f'width="{layout.width}" height="{layout.height}"'
    left_out = max(0, len(arrows) - _MOST_ARROWS), max(0, len(channels) - _MOST_CHANNELS)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {layout.width} {layout.height}" {size}>',
        f"<title>{_escaped(title)}</title><style>{_STYLE}</style>",
        *_markers(),
        *_legend(title, layout.height, *left_out),
        *(_channel(pair, channels[pair], layout.places) for pair in list(channels)[:_MOST_CHANNELS]),
        *_drawn(arrows[:_MOST_ARROWS], layout),
        *(_box(domain, layout.places[domid]) for domid, domain in domains.items()),
        "</svg>\n",
    ]
    return "\n".join(lines)


def _arrows(grants: list[Data]) -> list[_Arrow]:
    """Those of most pages first. What was released and is mapped by nobody any more is gone."""
    found: dict[tuple[int, int, bool], _Arrow] = {}
    for grant in grants:
        key = grant["grantor"], grant["grantee"], grant["writable"]
        mapped = sum(mapping["pages"] for mapping in grant["mapped_by"])
        if grant["revoked"] or (grant["released"] and not mapped):
            continue
        arrow = found.setdefault(key, _Arrow(*key))
        arrow.pages += grant["count"]
        arrow.mapped += min(mapped, grant["count"])
        arrow.isolated = arrow.isolated and grant["isolated"]
    return sorted(found.values(), key=lambda arrow: (-arrow.pages, arrow.grantor, arrow.grantee, arrow.writable))


def _channels(ports: list[Data]) -> dict[tuple[int, int], int]:
    """How many event channels each pair of domains has."""
    ends: dict[tuple[int, int], int] = defaultdict(int)
    for port in ports:
        if port["kind"] == "interdomain" and port["remote_domid"] != port["domid"]:
            ends[min(port["domid"], port["remote_domid"]), max(port["domid"], port["remote_domid"])] += 1
    return {pair: max(1, count // 2) for pair, count in sorted(ends.items())}


def _drawn(arrows: list[_Arrow], layout: Layout) -> Iterator[str]:
    labels = _Labels(layout)
    both = {(arrow.grantor, arrow.grantee) for arrow in arrows if arrow.writable}
    for arrow in arrows:
        bend = 34 if not arrow.writable and (arrow.grantor, arrow.grantee) in both else 15
        path, places = curve(layout.places[arrow.grantor], layout.places[arrow.grantee], bend, layout)
        mode = "rw" if arrow.writable else "ro"
        classes = mode + ("" if arrow.mapped else " u") + ("" if arrow.isolated else " n")
        thickness = round(1.2 + 0.35 * math.log2(arrow.pages), 1)
        yield (
            f'<path class="{classes}" stroke-width="{thickness}" marker-end="url(#{mode})" d="{path}">'
            f"<title>{arrow.sentence()}</title></path>"
        )
        if len(arrows) <= _MOST_LABELS:
            labels.add(arrow.label(), places)
    yield from labels.texts


class _Labels:
    """Texts on arrows, each where it hides no box and no other one, if there is such a place."""

    def __init__(self, layout: Layout) -> None:
        self.texts: list[str] = []
        self._taken: list[tuple[Place, float, float]] = [(box, BOX_WIDTH, BOX_HEIGHT) for box in layout.places.values()]

    def add(self, text: str, places: list[Place]) -> None:
        width = 6.2 * len(text)
        place = next((place for place in places if self._is_free(place, width)), places[0])
        self._taken.append((place, width, _LABEL_HEIGHT))
        self.texts.append(f'<text class="l" x="{place.x:.0f}" y="{place.y + 4:.0f}">{text}</text>')

    def _is_free(self, place: Place, width: float) -> bool:
        return all(
            abs(place.x - other.x) > (width + wide) / 2 or abs(place.y - other.y) > (_LABEL_HEIGHT + high) / 2
            for other, wide, high in self._taken
        )


def _channel(pair: tuple[int, int], count: int, places: Mapping[int, Place]) -> str:
    start, end = places[pair[0]], places[pair[1]]
    line = f'x1="{start.x:.0f}" y1="{start.y:.0f}" x2="{end.x:.0f}" y2="{end.y:.0f}"'
    text = f"{_count(count, 'event channel')}, domain {pair[0]} and domain {pair[1]}"
    return f'<line class="e" {line}><title>{text}</title></line>'


def _box(domain: Data, centre: Place) -> str:
    x, y = centre.x - BOX_WIDTH / 2, centre.y - BOX_HEIGHT / 2
    gone = domain.get("gone", False)
    name = domain["name"]
    short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    below = f"domid {domain['domid']}" if gone else f"domid {domain['domid']}, user {domain['uid']}"
    kind = "x" if gone else "c" if domain["control"] else "d"
    title = "" if short == name else f"<title>{_escaped(name)}</title>"
    return (
        f'<g class="{kind}">{title}<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7"/>'
        f'<text class="b m" x="{centre.x:.0f}" y="{centre.y - 3:.0f}">{_escaped(short)}</text>'
        f'<text class="s m" x="{centre.x:.0f}" y="{centre.y + 14:.0f}">{below}</text></g>'
    )


def _markers() -> Iterator[str]:
    for mode in ("ro", "rw"):
        yield (
            f'<marker id="{mode}" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="9" markerHeight="9" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path class="{mode} t" d="M0 0L8 4L0 8z"/></marker>'
        )


def _legend(title: str, height: int, arrows: int, channels: int) -> Iterator[str]:
    """The heading, what the lines mean, and how many `arrows` and `channels` are left out."""
    yield f'<text class="h" x="{MARGIN}" y="28">{_escaped(title)}</text>'
    y = height - 40
    entries = (
        ('class="ro" stroke-width="2"', "may read", 100),
        ('class="rw" stroke-width="2"', "may write", 104),
        ('class="ro u" stroke-width="2"', "not mapped", 112),
        ('class="ro n" stroke-width="2"', "not isolated: same user", 184),
        ('class="e"', "event channels", 0),
    )
    x = MARGIN
    for style, text, step in entries:
        yield f'<line {style} x1="{x}" y1="{y}" x2="{x + 24}" y2="{y}"/>'
        yield f'<text class="s" x="{x + 30}" y="{y + 4}">{text}</text>'
        x += step
    parts = ["An arrow goes from who grants to who may map; its thickness says how many pages."]
    parts += [f"{_count(arrows, 'arrow')} of fewer pages left out."] if arrows else []
    parts += [f"{_count(channels, 'pair')} with event channels left out."] if channels else []
    yield f'<text class="s" x="{MARGIN}" y="{height - 16}">{" ".join(parts)}</text>'


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _escaped(text: str) -> str:
    """XML has no control characters, not even escaped."""
    return escape("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text))
