"""Scatter charts: examples as dots in a plane, both axes to the same scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kd_cli.report.svg.marks import circle, drawing, element, path, text_at, tooltip
from kd_cli.report.svg.scales import number, scale, ticks


@dataclass(frozen=True)
class Cloud:
    """Points (x, y) of one colour."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = "c0"


def scatter_chart(clouds: Sequence[Cloud], *, title: str, width: int = 420) -> Markup:
    """The clouds in a square that holds all of their points; empty without points."""
    points = [point for cloud in clouds for point in cloud.points]
    if not points:
        return Markup("")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    half = 0.54 * max(max(xs) - min(xs), max(ys) - min(ys), 1e-9)
    x_mid, y_mid = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    left, right, top = 54, width - 14, 12
    floor = top + right - left
    place_x = scale(x_mid - half, x_mid + half, left, right)
    place_y = scale(y_mid - half, y_mid + half, floor, top)
    out = []
    for mark in ticks(x_mid - half, x_mid + half):
        if left <= place_x(mark) <= right:
            out.append(text_at(place_x(mark), floor + 19, number(mark)))
    for mark in ticks(y_mid - half, y_mid + half):
        if top <= place_y(mark) <= floor:
            y = place_y(mark)
            out += [path("grid", f"M{left} {y:.1f}H{right}"), text_at(left - 8, y + 4, number(mark), "end")]
    out.append(path("axis", f"M{left} {floor}H{right}"))
    for cloud in clouds:
        dots = [circle("dot", place_x(x), place_y(y), 2) for x, y in cloud.points]
        out.append(element("g", tooltip(cloud.name) + "".join(dots), class_=cloud.colour))
    return drawing(out, width, floor + 30, title)
