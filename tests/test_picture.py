"""What draws a dashboard, and the picture that it has drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from dashboards.picture.charts import Picture, Series, draw, in_words, legend_of

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "dashboard.svg"
DASHBOARD = json.loads((ROOT / "dashboards" / "json" / "flip-run.json").read_text(encoding="utf-8"))
SVG = "{http://www.w3.org/2000/svg}"


def panel(title: str) -> dict[str, Any]:
    found: dict[str, Any] = next(panel for panel in DASHBOARD["panels"] if panel["title"] == title)
    return found


def drawn(title: str, *series: Series) -> ElementTree.Element:
    picture = Picture(panel(title), series)
    return ElementTree.fromstring(draw("A <run> & more", "of a test", {"Section": [picture]}, start=1_000, end=1_100))


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


def lengths(svg: ElementTree.Element, colour: str) -> list[float]:
    return [float(r.attrib["width"]) for r in svg.iter(f"{SVG}rect") if r.attrib["fill"] == colour]


def test_the_committed_picture_shows_the_dashboards_first_sections() -> None:
    svg = ElementTree.parse(PICTURE).getroot()
    title = svg.find(f"{SVG}title")
    assert title is not None
    assert "real run" in str(title.text)
    assert "not a screenshot" in str(title.text)
    first = [p["title"] for p in DASHBOARD["panels"]]
    first = first[: first.index("Results and the Central Hub")]
    assert set(first) <= set(texts(svg)), "run: make picture"
    assert "RESULTS_UPLOADED" in texts(svg)
    assert not {"no data", "nan"} & set(texts(svg))
    assert "docs/dashboard.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_number_is_its_last_value_in_the_words_and_colour_of_its_mapping() -> None:
    code = next(
        float(c)
        for c, m in panel("Status")["fieldConfig"]["defaults"]["mappings"][0]["options"].items()
        if m["text"] == "ERROR"
    )
    svg = drawn("Status", Series("status", [(1_000, 1.0), (1_050, code)]))
    assert "ERROR" in texts(svg)
    assert lengths(svg, "#f2495c")
    assert "A <run> & more" in texts(svg)


def test_without_data_it_says_so() -> None:
    svg = drawn("Status")
    assert "no data" in texts(svg)
    assert "Rounds" in texts(drawn("Rounds"))
    assert "Who is the straggler?" in texts(drawn("Who is the straggler?"))


def test_the_longest_bar_is_the_slowest_client() -> None:
    svg = drawn("Who is the straggler?", Series("quick", [(1_100, 2.0)]), Series("slow", [(1_100, 8.0)]))
    longest, shorter = lengths(svg, "#5794f2")
    assert shorter == pytest.approx(longest / 4, rel=0.01)
    assert texts(svg).index("slow") < texts(svg).index("quick")


def test_a_status_is_one_block_for_as_long_as_it_lasts() -> None:
    points = [(1_000 + n, 4.0 if n < 50 else 6.0) for n in range(100)]
    svg = drawn("Status over time", Series("status", points))
    (training,), (uploaded,) = lengths(svg, "#b877d9"), lengths(svg, "#73bf69")
    assert training == pytest.approx(uploaded, abs=2)
    assert {"TRAINING_STARTED", "RESULTS_UPLOADED"} <= set(texts(svg))


def lines_of(svg: ElementTree.Element) -> list[list[list[float]]]:
    found = [line for line in svg.iter(f"{SVG}polyline") if line.attrib["stroke-width"] != "1"]
    return [[[float(x) for x in pair.split(",")] for pair in line.attrib["points"].split()] for line in found]


def test_a_line_ends_where_data_are_missing() -> None:
    points: Sequence[tuple[float, float]] = [(1_000, 1), (1_001, 2), (1_050, 3), (1_051, 4)]
    svg = drawn("How long clients take", Series("site-1", points))
    assert [len(line) for line in lines_of(svg)] == [2, 2]


def test_a_value_that_holds_is_drawn_in_stairs() -> None:
    svg = drawn("Rounds", Series("round", [(1_000, 1), (1_001, 2)]))
    ((a, b, c),) = lines_of(svg)
    assert (a[1], b[0]) == (b[1], c[0])
    assert c[1] < a[1]


def test_what_cannot_be_drawn_is_an_error() -> None:
    with pytest.raises(KeyError, match="table"):
        drawn("Problems")


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (3.0, "none", "3"),
        (0.25, "percentunit", "25 %"),
        (0.0, "s", "0 s"),
        (0.0123, "s", "12 ms"),
        (4.567, "s", "4.57 s"),
        (90.0, "s", "1.5 min"),
        (7_200.0, "s", "2 h"),
        (995_000.0, "dateTimeFromNow", "a moment ago"),
        (640_000.0, "dateTimeFromNow", "6 min ago"),
        (float("nan"), "s", "no data"),
    ],
)
def test_values_in_words(value: float, unit: str, words: str) -> None:
    assert in_words(value, unit, 1_000.0 if unit == "dateTimeFromNow" else 0.0) == words


def test_a_legend_takes_labels_from_the_series() -> None:
    assert legend_of("{{client}} of {{ net_id }}{{nothing}}", {"client": "site-1", "net_id": "a"}) == "site-1 of a"
    assert re.fullmatch("plain", legend_of("plain", {}))
