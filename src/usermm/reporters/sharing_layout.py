"""Where the boxes of the sharing picture are, and the way of its arrows."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

BOX_WIDTH: Final = 148
BOX_HEIGHT: Final = 46
MARGIN: Final = 30
LEGEND_HEIGHT: Final = 64

_GAP: Final = 26
_LEAST_WIDTH: Final = 720  # that of the legend
_NEAR: Final = 230  # neighbours on the ellipse
_LABEL_AT: Final = (0.42, 0.3, 0.55, 0.66, 0.2, 0.78)


class Place(NamedTuple):
    """Pixels from the left and from the top."""

    x: float
    y: float


def arrange(domids: Sequence[int], pairs: Iterable[tuple[int, int]]) -> tuple[list[int], int | None]:
    """Who sits beside whom: each next to one it is paired with, where that is free; and who is in the middle, if any.

    `pairs` may repeat: more ties are a stronger one.
    """
    near: dict[int, dict[int, int]] = {domid: defaultdict(int) for domid in domids}
    for first, second in pairs:
        if first != second:
            near[first][second] += 1
            near[second][first] += 1
    hub = _hub(near)
    left = [domid for domid in domids if domid != hub]
    order: list[int] = []
    while left:
        last = order[-1] if order else None
        following = min(left, key=lambda domid: (-(near[last][domid] if last is not None else len(near[domid])), domid))
        order.append(following)
        left.remove(following)
    return order, hub


def _hub(near: Mapping[int, Mapping[int, int]]) -> int | None:
    """The one that most of the others are paired with, and they with hardly anybody else."""
    hub = max(near, key=lambda domid: (len(near[domid]), -domid), default=None)
    pairs = sum(map(len, near.values())) / 2
    if hub is None or len(near) < 4 or len(near[hub]) < max(0.6 * (len(near) - 1), 0.8 * pairs):
        return None
    return hub


class Layout(NamedTuple):
    """The centres of the boxes by domid, the size of the picture, and its middle, to which long arrows are drawn."""

    places: dict[int, Place]
    width: int
    height: int
    middle: Place
    has_hub: bool


def place(order: Sequence[int], hub: int | None) -> Layout:
    """Puts the boxes on an ellipse."""
    count = len(order)
    # The boxes of a flat ellipse are side by side at the top and bottom, where they need their width.
    across = max(0 if count < 2 else 200, (BOX_WIDTH + _GAP) * count / 4.6)
    down = 55 if count < 3 else max(130, (BOX_HEIGHT + _GAP) * count / 4.2)
    if hub is not None:
        across, down = max(across, 290), max(down, 170)
    left, top = MARGIN + BOX_WIDTH / 2, MARGIN + BOX_HEIGHT / 2 + 24
    width = max(_LEAST_WIDTH, round(2 * (left + across)))
    height = round(top + 2 * down + BOX_HEIGHT / 2 + MARGIN + LEGEND_HEIGHT)
    middle = Place(width / 2, top + down)
    places = {
        domid: Place(round(middle.x + across * x, 1), round(middle.y + down * y, 1))
        for domid, (x, y) in zip(order, _around(count, across, down), strict=True)
    }
    if hub is not None:
        places[hub] = middle
    return Layout(places, width, height, middle, hub is not None)


def _around(count: int, across: float, down: float) -> Iterator[tuple[float, float]]:
    """Points on the ellipse, as fractions of its axes, the same way along it apart; the first is at the left."""
    if count < 3:
        yield from ((-1.0, 0.0), (1.0, 0.0)) if count == 2 else ((0.0, 0.0),) * count
        return
    steps = 720
    angles = [math.pi + 2 * math.pi * step / steps for step in range(steps + 1)]
    lengths = [0.0]
    for before, after in itertools.pairwise(angles):
        # A step down is worth more than one across: boxes are wide and low.
        x = across * (math.cos(after) - math.cos(before)) / (BOX_WIDTH + _GAP)
        y = down * (math.sin(after) - math.sin(before)) / (BOX_HEIGHT + _GAP)
        lengths.append(lengths[-1] + math.hypot(x, y))
    step = 0
    for number in range(count):
        while lengths[step] < lengths[-1] * number / count:
            step += 1
        yield math.cos(angles[step]), math.sin(angles[step])


def curve(start: Place, end: Place, bend: float, layout: Layout) -> tuple[str, list[Place]]:
    """From the edge of one box to the edge of the other, bent to the right of its way; and where its label can be."""
    if start == end:
        x, y = start.x + BOX_WIDTH / 2, start.y
        return f"M{x:.0f} {y - 9:.0f}c40 -30 40 48 5 18", [Place(x + 40, y - 18)]
    distance = math.hypot(end.x - start.x, end.y - start.y)
    aside = Place(-(end.y - start.y) / distance, (end.x - start.x) / distance)
    bend = 2 * bend * (1 + distance / 500)
    # Past those who sit between the two: through the middle, unless somebody is there.
    pull = 0.0 if layout.has_hub or distance < _NEAR else 0.45
    x, y = (start.x + end.x) / 2, (start.y + end.y) / 2
    x, y = x + pull * (layout.middle.x - x), y + pull * (layout.middle.y - y)
    control = Place(x + bend * aside.x, y + bend * aside.y)
    first, last = _edge(start, control, 0), _edge(end, control, 5)
    path = f"M{first.x:.0f} {first.y:.0f}Q{control.x:.0f} {control.y:.0f} {last.x:.0f} {last.y:.0f}"
    return path, [_along(first, control, last, part) for part in _LABEL_AT]


def _along(first: Place, control: Place, last: Place, part: float) -> Place:
    """A point of the quadratic curve."""
    weights = (1 - part) ** 2, 2 * part * (1 - part), part**2
    ends = first, control, last
    return Place(
        sum(weight * end.x for weight, end in zip(weights, ends, strict=True)),
        sum(weight * end.y for weight, end in zip(weights, ends, strict=True)),
    )


def _edge(box: Place, towards: Place, apart: float) -> Place:
    """Where the line from the middle of a box leaves it, and `apart` pixels on."""
    x, y = towards.x - box.x, towards.y - box.y
    scale = min(
        (BOX_WIDTH / 2 + apart) / abs(x) if x else math.inf, (BOX_HEIGHT / 2 + apart) / abs(y) if y else math.inf
    )
    return Place(box.x + x * min(scale, 1), box.y + y * min(scale, 1))
