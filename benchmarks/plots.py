"""``python -m benchmarks.plots``: docs/performance.md's table and pictures, made from ``results.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dashboards.picture.charts import FAINT, GRID, INK, PALETTE, PAPER, Box, Sheet

from benchmarks.measure import ROOT

RESULTS = ROOT / "benchmarks" / "results.json"
DOCUMENT = ROOT / "docs" / "performance.md"
GOALS_PICTURE = ROOT / "docs" / "performance-goals.svg"
EVENTS_PICTURE = ROOT / "docs" / "performance-events.svg"
_TABLE = re.compile(r"(<!-- figures: make bench-plots -->\n).*?(<!-- /figures -->)", re.DOTALL)
WIDTH, ROW, LEFT, RIGHT = 960.0, 30.0, 330.0, 190.0
GOOD, BAD = PALETTE[0], PALETTE[4]


def table(results: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| figure | value | spread | goal | what it means |", "| --- | ---: | ---: | ---: | --- |"]
    for key, entry in results["figures"].items():
        low, high = entry["spread"]
        spread = "" if low == high else f"{low:,.3g} … {high:,.3g}"
        goal = "reported" if entry["goal"] == "-" else entry["goal"] + ("" if entry["reached"] else " **missed**")
        lines.append(f"| `{key}` | {entry['value']:,.4g} {entry['unit']} | {spread} | {goal} | {entry['meaning']} |")
    machine = results["machine"]
    words = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Python {machine['python']}"
    return "\n".join([*lines, "", f"Commit {results['commit']}, on {words}.", ""])


def with_table(document: str, results: Mapping[str, Any]) -> str:
    """The document with this table in the place of its own."""
    return _TABLE.sub(lambda found: found[1] + table(results) + found[2], document)


def goals_picture(results: Mapping[str, Any]) -> str:
    """How much of what a goal allows each figure uses up; 100 % is the goal itself."""
    rows = []
    for key, entry in results["figures"].items():
        sense, _, text = entry["goal"].partition(" ")
        if sense in ("≤", "≥"):
            shares = [_share(sense, float(text), value) for value in (entry["value"], *entry["spread"])]
            rows.append(
                (key, f"{entry['value']:,.3g} {entry['unit']}  (goal {entry['goal']})", shares, entry["reached"])
            )
    height = 70 + ROW * len(rows)
    sheet, plot = _sheet("Figures against their goals: the share of what the goal allows", height)
    for percent in (0, 50, 100):
        x = plot.x + plot.w * percent / 150
        colour = INK if percent == 100 else GRID
        sheet.path([(x, 50), (x, height - 12)], colour, dashed=percent == 100)
        sheet.text(x, 45, f"{percent} %", size=11, colour=FAINT, anchor="middle")
    for number, (key, label, (share, low, high), reached) in enumerate(rows):
        y = 56 + ROW * number
        sheet.text(LEFT - 12, y + 15, key, anchor="end")
        sheet.rect(Box(plot.x, y + 3, max(1.5, plot.w * min(share, 1.5) / 1.5), 15), GOOD if reached else BAD, radius=2)
        places = [(plot.x + plot.w * min(end, 1.5) / 1.5, y + 10.5) for end in sorted((low, high))]
        sheet.path(places, INK, width=2)
        sheet.text(WIDTH - RIGHT + 8, y + 15, label, size=11, colour=FAINT)
    return _svg(sheet, height)


def _share(sense: str, goal: float, value: float) -> float:
    if sense == "≥":
        return goal / value if value else 99.0
    if goal == 0:
        return 0.0 if value == 0 else 99.0
    return value / goal


def events_picture(results: Mapping[str, Any]) -> str:
    """What each event costs the thread that fires it, ours beside NVFLARE's collector."""
    about = results["figures"]["recorded_event_ratio"]["about"]
    sides = (
        ("with us", about["ours_us"], PALETTE[0]),
        ("JobMetricsCollector + StatsD", about["theirs_us"], PALETTE[5]),
    )
    events = list(about["ours_us"])
    most = max(max(times.values()) for _, times, _ in sides)
    height = 90 + 2 * ROW * len(events)
    sheet, plot = _sheet("Microseconds that an event takes of NVFLARE's thread (median)", height)
    for side, (name, times, colour) in enumerate(sides):
        sheet.rect(Box(LEFT + 220 * side, 40, 12, 12), colour, radius=2)
        sheet.text(LEFT + 220 * side + 18, 51, name, size=11)
        for number, event in enumerate(events):
            y = 66 + 2 * ROW * number + 22 * side
            sheet.rect(Box(plot.x, y, max(1.5, plot.w * times[event] / most), 17), colour, radius=2)
            sheet.text(plot.x + plot.w * times[event] / most + 8, y + 13, f"{times[event]:,.3g}", size=11, colour=FAINT)
    for number, event in enumerate(events):
        name = "an event that is ignored" if event == "_an_event_of_somebody_else" else event.lstrip("_").upper()
        sheet.text(LEFT - 12, 88 + 2 * ROW * number, name, anchor="end")
    return _svg(sheet, height)


def _sheet(title: str, height: float) -> tuple[Sheet, Box]:
    sheet = Sheet(0, 1)
    sheet.rect(Box(0, 0, WIDTH, height), PAPER, radius=8)
    sheet.text(16, 26, title, size=15, bold=True)
    return sheet, Box(LEFT, 50, WIDTH - LEFT - RIGHT, height - 62)


def _svg(sheet: Sheet, height: float) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" font-family="sans-serif">'
    return "\n".join([head, *sheet.parts, "</svg>", ""])


def write(results: Mapping[str, Any], document: Path = DOCUMENT) -> None:
    """Write the table and both pictures."""
    document.write_text(with_table(document.read_text(encoding="utf-8"), results), encoding="utf-8")
    GOALS_PICTURE.write_text(goals_picture(results), encoding="utf-8")
    EVENTS_PICTURE.write_text(events_picture(results), encoding="utf-8")


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text(encoding="utf-8")))
