"""The text of a page: letter for letter what ``prometheus_client`` makes, and no line of it made twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from flip_observability import _page
from flip_observability._page import MAX_FORMATS, Renderer
from flip_observability.ledger import FILE_NAME, Ledger
from flip_observability.metrics import FlipCollector, MetricsFold
from flip_observability.settings import Settings
from history import Run

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
FORMATS = [
    OPENMETRICS,
    "application/openmetrics-text",
    "text/plain;version=0.0.4",
    *(f"{OPENMETRICS}; escaping={how}" for how in ("allow-utf-8", "underscores", "dots", "values")),
    *(f"text/plain; version=1.0.0; escaping={how}" for how in ("allow-utf-8", "dots")),
]
NOW = 1_800_000_000.0


class Told(Collector):
    """Tells what it was given last."""

    def __init__(self, *families: Family) -> None:
        self.families = families

    def collect(self) -> Iterator[Family]:
        return iter(self.families)


def gauge(name: str, *samples: tuple[dict[str, str], float]) -> Family:
    family = Family(name, "A gauge.", "gauge")
    for labels, value in samples:
        family.add_sample(name, labels, value)
    return family


def own(collector: Collector, accept: str) -> tuple[str, bytes]:
    """The page as the library makes it."""
    encoder, content_type = choose_encoder(accept)
    return content_type, encoder(collector)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the samples of which text was made."""
    names: list[str] = []

    def counting(accept: str) -> tuple[Callable[[Collector], bytes], str]:
        encoder, content_type = choose_encoder(accept)

        def encode(collector: Collector) -> bytes:
            families = list(collector.collect())
            names.extend(sample.name for family in families for sample in family.samples)
            return encoder(Told(*families))

        return encode, content_type

    monkeypatch.setattr(_page, "choose_encoder", counting)
    return names


# -- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", FORMATS)
def test_a_page_is_the_library_s_whatever_has_happened_since_the_last_one(accept: str, tmp_path: Path) -> None:
    now = [NOW]
    ledger = Ledger(tmp_path)

    def reader(ledger: Ledger) -> FlipCollector:
        return FlipCollector(ledger, Settings(), clock=lambda: now[0], loops=lambda: {"fold": now[0] - 1})

    collector, renderer = reader(ledger), Renderer()
    pages: list[bytes] = []

    def look() -> None:
        content_type, page = renderer.render(collector, accept)
        with Ledger(tmp_path) as other:
            assert (content_type, page) == own(reader(other), accept) == renderer.render(collector, accept)
        assert page not in pages, "something has happened"
        pages.append(page)

    look()
    run = Run(ledger, begin=NOW - 600)
    run.train({"site-1": 3.0, 'site "2"\\': 5.0})
    look()
    fold = MetricsFold(ledger)
    assert fold.catch_up()
    look()
    run.finish("ERROR")
    look()
    assert fold.catch_up()
    look()
    now[0] += 1.0  # what waits for the hub has been waiting for longer
    look()
    now[0] += 90 * 86_400.0
    look()
    for path in tmp_path.glob(f"{FILE_NAME}*"):
        path.unlink()
    now[0] = NOW
    with Ledger(tmp_path) as fresh:
        Run(fresh, begin=NOW - 300).train({"site-1": 4.0})
        assert MetricsFold(fresh).catch_up()
        look()
    ledger.close()


_TEXT = st.sampled_from(["", "a", "b", '"', "\\", "\n", "\n#", "# EOF", "é", "\u2028", "a b"])
_SAMPLES = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from(["a", "b", "le"]), _TEXT),
        st.sampled_from([0.0, 1.0, 2.5, float("inf")]),
        st.none()
        | st.builds(
            Exemplar,
            st.dictionaries(st.just("trace_id"), _TEXT, min_size=1),
            st.just(1.0),
            st.sampled_from([None, 5.5]),
        ),
    ),
    max_size=4,
)


@given(st.lists(_SAMPLES, min_size=2, max_size=4), st.sampled_from(FORMATS))
def test_no_two_samples_share_a_line(pages: list[Any], accept: str) -> None:
    renderer = Renderer()
    for samples in pages:
        family = Family("some", 'A "counter"\nof some\\thing.', "counter")
        for labels, value, exemplar in samples:
            family.add_sample("some_total", labels, value, exemplar=exemplar)
        told = Told(family, gauge("other", *((labels, value) for labels, value, _ in samples)))
        assert renderer.render(told, accept) == own(told, accept)


# -- once ------------------------------------------------------------------------------------------------------------


def test_no_line_is_made_twice(made: list[str]) -> None:
    renderer, told = Renderer(), Told(gauge("one", ({"run": "a"}, 1), ({"run": "b"}, 1)), gauge("two", ({}, 1)))
    renderer.render(told, OPENMETRICS)
    assert made == ["one", "one", "two"]
    renderer.render(told, OPENMETRICS)
    told.families = (gauge("one", ({"run": "a"}, 1), ({"run": "b"}, 1)), gauge("two", ({}, 5)))
    renderer.render(told, OPENMETRICS)
    assert made[3:] == ["two"]


def test_an_event_costs_the_lines_that_it_changes(made: list[str], tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        runs = [Run(ledger, begin=NOW - 600) for _ in range(20)]
        for run in runs:
            run.train({"site-1": 3.0})
        fold, renderer = MetricsFold(ledger), Renderer()
        collector = FlipCollector(ledger, Settings(), clock=lambda: NOW)
        assert fold.catch_up()
        renderer.render(collector, OPENMETRICS)
        assert len(made) > 300
        made.clear()
        runs[0].at(500, "_start_run")
        assert fold.catch_up()
        renderer.render(collector, OPENMETRICS)
        assert {"flip_run_last_event_timestamp_seconds", "flip_lifecycle_events_total"} <= set(made)
        assert len(made) < 10


def test_what_is_not_told_any_more_is_forgotten() -> None:
    renderer = Renderer()
    for number in range(1_000):
        renderer.render(Told(gauge("one", *(({"run": str(i)}, number) for i in range(10)))), OPENMETRICS)
    [kept] = renderer._formats.values()
    assert len(kept._lines) <= 40


def test_who_names_many_versions_fills_no_memory() -> None:
    renderer, told = Renderer(), Told(gauge("one", ({}, 1)))
    for number in range(100):
        renderer.render(told, OPENMETRICS)
        content_type, _ = renderer.render(told, f"application/openmetrics-text; version=1.0.{number}")
        assert f"version=1.0.{number};" in content_type
    assert len(renderer._formats) == MAX_FORMATS
    assert any("version=1.0.0;" in content_type for content_type in renderer._formats), (
        "which is asked for all the time"
    )
