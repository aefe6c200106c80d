"""Draws the panels of a Grafana dashboard, and the answers to their queries, as SVG.

It knows the few kinds of panels that our dashboards are made of, and of their options what can be seen.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

COLUMNS, WIDTH, ROW, GAP, TOP = 24, 1_200, 32, 8, 64
INK, FAINT, GRID, PAPER, BOARD, EDGE = "#d8d9e3", "#8e93a6", "#2c3039", "#181b20", "#0f1116", "#2a2e37"
COLOURS: Mapping[str, str] = {
    "green": "#73bf69",
    "red": "#f2495c",
    "orange": "#ff9830",
    "dark-orange": "#e0752d",
    "dark-red": "#c4162a",
    "yellow": "#f2cc0c",
    "blue": "#5794f2",
    "light-blue": "#8ab8ff",
    "purple": "#b877d9",
    "#8e8e8e": "#8e93a6",
    "text": INK,
}
PALETTE = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff9830", "#f2495c", "#5794f2", "#b877d9", "#56d8c9")

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """The answer to a query: points of (seconds since the epoch, value), under the name of its legend."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Picture:
    """One panel and its data.

    Args:
        panel: as in the dashboard's JSON.
        series: answers to its queries.
    """

    panel: Mapping[str, Any]
    series: Sequence[Series]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    x: float
    y: float
    w: float
    h: float

    def inside(self, left: float, top: float, right: float, bottom: float) -> Box:
        return Box(self.x + left, self.y + top, self.w - left - right, self.h - top - bottom)


@dataclass
class Sheet:
    """Collects what is drawn. Times are drawn between ``start`` and ``end`` (seconds since the epoch)."""

    start: float
    end: float
    parts: list[str] = field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 12,
        colour: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"{weight}>'
            f"{escape(words)}</text>"
        )

    def rect(self, box: Box, colour: str, *, radius: float = 0, edge: str = "", opacity: float = 1) -> None:
        stroke = f' stroke="{edge}"' if edge else ""
        dim = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
        self.parts.append(
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{max(0.0, box.w):.1f}" height="{max(0.0, box.h):.1f}"'
            f' rx="{radius:g}" fill="{colour}"{stroke}{dim}/>'
        )

    def path(self, points: Sequence[Point], colour: str, *, width: float = 1.0, dashed: bool = False) -> None:
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width:g}"'
            f' stroke-linejoin="round" stroke-linecap="round"{dash}/>'
        )

    def across(self, box: Box, when: float) -> float:
        """Where a time is in a box."""
        share = (when - self.start) / max(1e-9, self.end - self.start)
        return box.x + box.w * min(1.0, max(0.0, share))


# -- words for values --------------------------------------------------------------------------------------------------


def in_words(value: float, unit: str, now: float) -> str:
    """A value as Grafana would write it. ``now``: seconds since the epoch."""
    if not math.isfinite(value):
        return "no data"
    return _WORDS.get(unit, _plain)(value, now)


def _plain(value: float, _: float) -> str:
    return f"{value:.0f}" if math.isclose(value, round(value), abs_tol=1e-9) else f"{value:.3g}"


def _seconds(value: float, _: float) -> str:
    for size, name in ((3_600.0, "h"), (60.0, "min"), (1.0, "s")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return f"{value * 1_000:.0f} ms" if value else "0 s"


def _ago(value: float, now: float) -> str:
    seconds = max(0.0, now - value / 1_000)
    return "a moment ago" if seconds < 10 else f"{_seconds(seconds, now)} ago"


_WORDS: Mapping[str, Callable[[float, float], str]] = {
    "s": _seconds,
    "dateTimeFromNow": _ago,
    "percentunit": lambda value, _: f"{100 * value:.3g} %",
}


# -- colours -----------------------------------------------------------------------------------------------------------


def colour(name: str) -> str:
    """Grafana's name of a colour, as SVG has it."""
    return COLOURS.get(name, name)


def _mapping(panel: Mapping[str, Any], value: float) -> Mapping[str, Any]:
    for mapping in panel["fieldConfig"]["defaults"].get("mappings") or []:
        found: Mapping[str, Any] | None = mapping["options"].get(f"{value:g}")
        if found is not None:
            return found
    return {}


def _threshold(panel: Mapping[str, Any], value: float) -> str:
    shade = "text"
    for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            shade = step["color"]
    return colour(shade)


def _colours(panel: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    fixed = {
        override["matcher"]["options"]: colour(item["value"]["fixedColor"])
        for override in panel["fieldConfig"].get("overrides") or []
        for item in override["properties"]
        if item["id"] == "color"
    }
    free = iter(PALETTE * 9)
    return {name: fixed.get(name) or next(free) for name in names}


# -- kinds of panels ---------------------------------------------------------------------------------------------------


def _stat(sheet: Sheet, box: Box, picture: Picture) -> None:
    panel = picture.panel
    unit = panel["fieldConfig"]["defaults"]["unit"]
    points = picture.series[0].points if picture.series else []
    value = points[-1][1] if points else math.nan
    mapping = _mapping(panel, value)
    words = mapping.get("text") or in_words(value, unit, sheet.end)
    shade = colour(mapping["color"]) if mapping else _threshold(panel, value)
    size = min(34.0, 1.2 * box.w / max(1, len(words)))
    ink = shade
    if panel["options"]["colorMode"] == "background" and points:
        sheet.rect(box, shade, radius=4)
        ink = BOARD
        sheet.text(box.x + 10, box.y + 20, panel["title"], colour=ink, bold=True)
    sheet.text(
        box.x + box.w / 2, box.y + box.h / 2 + 12 + size / 3, words, size=size, colour=ink, anchor="middle", bold=True
    )


def _timeline(sheet: Sheet, box: Box, picture: Picture) -> None:
    lane = box.inside(12, 34, 12, 24)
    _clock(sheet, lane)
    height = lane.h / max(1, len(picture.series))
    for number, series in enumerate(picture.series):
        top = lane.y + number * height + 2
        for begin, end, value in _stretches(series.points, sheet.end):
            mapping = _mapping(picture.panel, value)
            left, right = sheet.across(lane, begin), sheet.across(lane, end)
            sheet.rect(Box(left, top, right - left - 1, height - 6), colour(mapping.get("color", "text")), radius=3)
            words = mapping.get("text", f"{value:g}")
            if right - left > 7.4 * len(words) + 8:
                sheet.text((left + right) / 2, top + height / 2 + 1, words, colour=BOARD, anchor="middle", bold=True)


def _stretches(points: Sequence[Point], end: float) -> list[tuple[float, float, float]]:
    """The times during which a value stayed the same: (from, to, value)."""
    found: list[tuple[float, float, float]] = []
    for (when, value), following in zip(points, [*points[1:], (end, math.nan)], strict=True):
        if found and found[-1][2] == value and math.isclose(found[-1][1], when):
            found[-1] = (found[-1][0], following[0], value)
        else:
            found.append((when, following[0], value))
    return found


def _lines(sheet: Sheet, box: Box, picture: Picture) -> None:
    panel = picture.panel
    unit = panel["fieldConfig"]["defaults"]["unit"]
    custom = panel["fieldConfig"]["defaults"]["custom"]
    steady = custom.get("lineInterpolation") == "stepAfter"
    rows = picture.series[:8]
    entries = [(s.name, in_words(s.points[-1][1], unit, sheet.end)) for s in rows if s.points]
    legend = _flow(entries, box.w - 24)
    plot = box.inside(54, 38, 16, 34 + 16 * max(1, 1 + max((line for line, _ in legend), default=0)))
    top = _nice(max((value for series in rows for _, value in series.points), default=1.0), whole=unit == "none")
    shades = _colours(panel, [series.name for series in rows])
    for share in (0.0, 0.5, 1.0) if unit == "none" else (0.0, 0.25, 0.5, 0.75, 1.0):
        y = plot.y + plot.h * (1 - share)
        sheet.path([(plot.x, y), (plot.x + plot.w, y)], GRID)
        sheet.text(plot.x - 8, y + 4, in_words(top * share, unit, sheet.end), size=11, colour=FAINT, anchor="end")
    _clock(sheet, plot)
    # Many lines can lie on each other: the first is drawn last, and so on top.
    for series in reversed(rows):
        for stretch in _unbroken(series.points):
            places = [(sheet.across(plot, when), plot.y + plot.h * (1 - value / top)) for when, value in stretch]
            sheet.path(_stairs(places) if steady else places, shades[series.name], width=2.2)
    for (name, words), (line, left) in zip(entries, legend, strict=True):
        x, y = box.x + 14 + left, box.y + box.h - 10 - 16 * (legend[-1][0] - line)
        sheet.rect(Box(x, y - 6, 14, 4), shades[name], radius=2)
        sheet.text(x + 20, y, f"{name}  {words}", size=11)


def _unbroken(points: Sequence[Point]) -> list[list[Point]]:
    """Pieces of a line between which there are no data."""
    if len(points) < 2:
        return [list(points)]
    step = min(b[0] - a[0] for a, b in itertools.pairwise(points))
    pieces = [[points[0]]]
    for before, point in itertools.pairwise(points):
        if point[0] - before[0] > 1.5 * step:
            pieces.append([])
        pieces[-1].append(point)
    return pieces


def _stairs(places: Sequence[Point]) -> list[Point]:
    found = list(places[:1])
    for x, y in places[1:]:
        found += [(x, found[-1][1]), (x, y)]
    return found


def _nice(value: float, *, whole: bool) -> float:
    """The smallest round number that is not below a value; ``whole`` for one whose half is a whole number."""
    if value <= 0:
        return 2.0 if whole else 1.0
    size = 10.0 ** math.floor(math.log10(value))
    found = next(size * step for step in (1, 2, 4, 6, 8, 10) if size * step >= value * 0.999)
    return max(2.0, found) if whole else found


def _clock(sheet: Sheet, plot: Box) -> None:
    """Times below a plot, on round seconds."""
    span = sheet.end - sheet.start
    step = next((s for s in (5, 10, 15, 30, 60, 300, 900, 3_600) if span / s <= plot.w / 90), 7_200)
    when = math.ceil(sheet.start / step) * step
    while when < sheet.end:
        x = sheet.across(plot, when)
        if plot.x + 16 < x < plot.x + plot.w - 16:
            sheet.text(
                x,
                plot.y + plot.h + 17,
                time.strftime("%H:%M:%S", time.gmtime(when)),
                size=11,
                colour=FAINT,
                anchor="middle",
            )
        when += step


def _flow(entries: Sequence[tuple[str, str]], width: float) -> list[tuple[int, float]]:
    """Where the entries of a legend go that is so wide: (line, pixels from its left)."""
    found: list[tuple[int, float]] = []
    line, left = 0, 0.0
    for name, words in entries:
        needed = 42 + 6.3 * len(f"{name}  {words}")
        if left and left + needed > width:
            line, left = line + 1, 0.0
        found.append((line, left))
        left += needed
    return found


def _bars(sheet: Sheet, box: Box, picture: Picture) -> None:
    panel = picture.panel
    unit = panel["fieldConfig"]["defaults"]["unit"]
    rows = sorted(((s.points[-1][1], s.name) for s in picture.series if s.points), reverse=True)[:10]
    longest = max((value for value, _ in rows), default=1.0)
    area = box.inside(14, 40, 14, 12)
    height = min(70.0, area.h / max(1, len(rows)))
    for number, (value, name) in enumerate(rows):
        y = area.y + number * height
        bar = Box(area.x + 70, y + 4, area.w - 150, height - 12)
        shade = _threshold(panel, value)
        sheet.rect(bar, GRID, radius=3)
        sheet.rect(Box(bar.x, bar.y, bar.w * value / longest, bar.h), shade, radius=3)
        sheet.text(area.x, bar.y + bar.h / 2 + 4, name)
        sheet.text(
            area.x + area.w,
            bar.y + bar.h / 2 + 5,
            in_words(value, unit, sheet.end),
            size=14,
            colour=shade,
            anchor="end",
            bold=True,
        )


_KINDS: Mapping[str, Callable[[Sheet, Box, Picture], None]] = {
    "stat": _stat,
    "state-timeline": _timeline,
    "timeseries": _lines,
    "bargauge": _bars,
}
"""Grafana's name of a kind of panel, and what draws it."""


# -- the whole ---------------------------------------------------------------------------------------------------------


def draw(title: str, note: str, sections: Mapping[str, Sequence[Picture]], *, start: float, end: float) -> str:
    """An SVG of some sections of a dashboard.

    Args:
        title: of the dashboard.
        note: what it is drawn from.
        sections: heading to the panels below it, placed as in the dashboard.
        start: of the time shown, seconds since the epoch.
        end: of the time shown.

    Raises:
        KeyError: a kind of panel that is not drawn here.
    """
    sheet = Sheet(start, end)
    sheet.text(20, 30, title, size=19, bold=True)
    sheet.text(20, 51, note, size=12.5, colour=FAINT)
    y = float(TOP)
    for heading, pictures in sections.items():
        sheet.text(20, y + 20, heading, size=14, bold=True)
        y += 30
        first = min(p.panel["gridPos"]["y"] for p in pictures)
        for picture in pictures:
            _panel(sheet, _box(picture.panel["gridPos"], y, first), picture)
        y += ROW * max(p.panel["gridPos"]["y"] + p.panel["gridPos"]["h"] - first for p in pictures)
    height = y + 10
    words = escape(f"{title}: {note}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="title"'
        " font-family=\"Inter, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif\">\n"
        f'<title id="title">{words}</title>\n'
        f'<rect width="{WIDTH}" height="{height:.0f}" rx="8" fill="{BOARD}"/>\n' + "\n".join(sheet.parts) + "\n</svg>\n"
    )


def _box(place: Mapping[str, int], y: float, first: int) -> Box:
    unit = (WIDTH - 24) / COLUMNS
    return Box(
        12 + place["x"] * unit + GAP / 2,
        y + (place["y"] - first) * ROW + GAP / 2,
        place["w"] * unit - GAP,
        place["h"] * ROW - GAP,
    )


def _panel(sheet: Sheet, box: Box, picture: Picture) -> None:
    sheet.rect(box, PAPER, radius=4, edge=EDGE)
    sheet.text(box.x + 10, box.y + 20, picture.panel["title"], bold=True)
    _KINDS[picture.panel["type"]](sheet, box, picture)


def legend_of(template: str, labels: Mapping[str, str]) -> str:
    """The name of a series from its legend's template."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), template)
