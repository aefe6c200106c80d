"""Metrics: what Prometheus reads, made from the ledger, so that they survive every restart and never count twice.

The catalogue is data (:data:`CATALOGUE`), :class:`MetricsFold` counts the ledger's events, and :class:`FlipCollector`
gives the result, with gauges read from the ledger's tables, in the form that ``prometheus_client`` renders.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

from prometheus_client import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as PromExemplar
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from flip_observability._catalogue import BY_NAME, CATALOGUE, EVENT_FACT, PROBLEMS, Metric, clean_id, clean_label
from flip_observability._fold import Exemplar, LiveLedger, MetricsFold, Series, SeriesKey, load_series, series_of
from flip_observability._page import Renderer
from flip_observability.constants import ModelStatus
from flip_observability.errors import logger, report
from flip_observability.ledger import Ledger, LedgerError
from flip_observability.settings import Settings

__all__ = ["CATALOGUE", "EVENT_FACT", "FlipCollector", "Metric", "MetricsFold", "render"]

log = logger(__name__)

MAX_OPEN_RUNS = 500
"""Open runs that gauges tell of, the most recently active first. ``flip_runs_active`` counts all."""
MAX_FINISHED_RUNS = 2_000
"""Finished runs that gauges tell of, the latest first."""
WINDOW_SECONDS = 86_400.0
"""Runs that finished within it are told of, however many there are (up to :data:`MAX_FINISHED_RUNS`)."""

_go_float: Callable[[float], str] = floatToGoString
_BOUNDS = {metric.name: tuple(map(_go_float, (*metric.buckets, float("inf")))) for metric in CATALOGUE}
"""By metric, what stands in ``le``."""
Row = Mapping[str, Any]
Values = Iterable[tuple[SeriesKey, float]]
_Told = tuple[Row, list[Sample]]
"""A run's row, and what gauges tell of it."""


class FlipCollector(Collector):
    """What a scrape sees. Register it, or have it rendered.

    When the ledger cannot be read, what comes from it is left out (a counter at 0 would look like a reset), and the
    rest is still told, with ``flip_ledger_writable`` at 0.

    Args:
        ledger: best a connection of its own. A file that is deleted, replaced or damaged is opened anew.
        settings: of this server.
        writable: whether the ledger could be written lately.
        loops: the observer's loops and when each last succeeded (epoch seconds).
        clock: epoch seconds.
    """

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        *,
        writable: Callable[[], bool] = lambda: True,
        loops: Callable[[], Mapping[str, float]] = dict,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = LiveLedger(ledger)
        self._settings = settings
        self._net_id = clean_label(settings.net_id)
        self._writable = writable
        self._loops = loops
        self._clock = clock
        self._capped = False
        self._told: dict[str, _Told] = {}
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Family]:
        """All families of the catalogue, in its order."""
        families = {metric.name: _family(metric) for metric in CATALOGUE}
        readable = True
        try:
            self._ledger.use(lambda ledger: self._read(ledger, families))
        except LedgerError as error:
            report("metrics", error, "cannot read the ledger; a scrape goes without it")
            families = {metric.name: _family(metric) for metric in CATALOGUE}
            readable = False
        self._add(families, "flip_ledger_writable", [((), float(readable and self._writable()))])
        loops = [((clean_label(name),), when) for name, when in sorted(self._loops().items())]
        self._add(families, "flip_observer_loop_last_success_timestamp_seconds", loops)
        self._add(families, "flip_build_info", [(_versions(), 1.0)])
        yield from (family for family in families.values() if family.samples)

    def _read(self, ledger: Ledger, families: dict[str, Family]) -> None:
        now = self._clock()
        state = load_series(ledger.metric_state())
        open_runs = ledger.open_runs(MAX_OPEN_RUNS)
        finished = ledger.finished_runs(now - WINDOW_SECONDS, self._settings.metrics_recent_runs, MAX_FINISHED_RUNS)
        active, backlog = ledger.count_active_runs(), ledger.outbox_backlog()
        self._mention_caps(len(open_runs), len(finished))
        for metric in CATALOGUE:
            if metric.fact is not None:
                for key, series in series_of(state, metric):
                    _add_series(families[metric.name], metric, self._labels(metric, key), series)
        self._add(families, "flip_runs_active", [((), float(active))])
        waiting = {clean_label(kind): found for kind, found in backlog.items()}
        kinds = sorted({*BY_NAME["flip_outbox_pending"].labels[0].values, *waiting})
        self._add(families, "flip_outbox_pending", [((kind,), float(waiting.get(kind, (0, now))[0])) for kind in kinds])
        ages = [((kind,), max(0.0, now - waiting.get(kind, (0, now))[1])) for kind in kinds]
        self._add(families, "flip_outbox_oldest_age_seconds", ages)
        # One that ended between the two queries is in both; told twice, the whole page would be refused.
        runs = {run["run_id"]: run for run in (*open_runs, *finished)}
        last = self._told
        self._told = told = {run_id: self._tell(run, last.get(run_id)) for run_id, run in runs.items()}
        for _, samples in told.values():
            for sample in samples:
                families[sample.name].samples.append(sample)

    def _tell(self, run: Row, last: _Told | None) -> _Told:
        """A run in samples: those of the last page while its row is the same, which that of a finished run stays."""
        if last is not None and last[0] == run:
            return last
        identity = (clean_id(run["run_id"]), clean_id(run["model_id"]))
        # The run's own net: it stays what it was when the server is given another one, and no alert fires again.
        net_id = clean_label(run["net_id"]) if run["net_id"] else self._net_id
        samples = [
            Sample(name, self._labels(BY_NAME[name], (*identity, *labels), net_id), float(value))
            for name, values_of in _RUN_GAUGES.items()
            for labels, value in values_of(run)
            if _is_number(value)
        ]
        return run, samples

    def _add(self, families: Mapping[str, Family], name: str, values: Values) -> None:
        family, metric = families[name], BY_NAME[name]
        for key, value in values:
            family.add_sample(name, self._labels(metric, key), value)

    def _labels(self, metric: Metric, key: SeriesKey, net_id: str | None = None) -> dict[str, str]:
        return {"net_id": net_id or self._net_id, **dict(zip(metric.label_names, key, strict=True))}

    def _mention_caps(self, open_runs: int, finished: int) -> None:
        capped = open_runs >= MAX_OPEN_RUNS or finished >= MAX_FINISHED_RUNS
        with self._lock:
            news, self._capped = capped and not self._capped, capped
        if news:
            log.warning(
                "More runs than metrics tell of one by one: the %d most recently active open ones and the %d that "
                "finished last are shown. Counters and flip_runs_active count all.",
                MAX_OPEN_RUNS,
                MAX_FINISHED_RUNS,
            )


def render(collector: Collector, accept_header: str | None) -> tuple[str, bytes]:
    """One page by itself. Who makes many keeps a :class:`~flip_observability._page.Renderer`, which is quicker.

    Args:
        collector: what to show.
        accept_header: the request's ``Accept``, if it has one.

    Returns:
        The content type and the page.
    """
    return Renderer().render(collector, accept_header)


def _family(metric: Metric) -> Family:
    return Family(metric.name.removesuffix("_total"), metric.help, metric.kind)


def _add_series(family: Family, metric: Metric, labels: dict[str, str], series: Series) -> None:
    if metric.kind == "counter":
        family.add_sample(metric.name, labels, series.total, exemplar=_exemplar(series.exemplars.get(0)))
        return
    seen = 0
    for slot, bound in enumerate(_BOUNDS[metric.name]):
        seen += series.counts[slot]
        exemplar = _exemplar(series.exemplars.get(slot))
        family.add_sample(f"{metric.name}_bucket", {**labels, "le": bound}, float(seen), exemplar=exemplar)
    family.add_sample(f"{metric.name}_count", labels, float(seen))
    family.add_sample(f"{metric.name}_sum", labels, series.total)


def _exemplar(exemplar: Exemplar | None) -> PromExemplar | None:
    return PromExemplar({"trace_id": exemplar.trace_id}, exemplar.value, exemplar.time) if exemplar else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@functools.cache
def _versions() -> tuple[str, ...]:
    # They do not change while this process runs, and to look them up takes a millisecond of every scrape.
    return tuple(_version(package) for package in ("flip-observability", "nvflare"))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _column(name: str) -> Callable[[Row], list[tuple[tuple[str, ...], Any]]]:
    return lambda run: [((), run[name])]


def _status(run: Row) -> list[tuple[tuple[str, ...], Any]]:
    return [((clean_label(run["status"] or ModelStatus.PENDING.value),), 1)]


def _final_status(run: Row) -> list[tuple[tuple[str, ...], Any]]:
    return [((clean_label(run["final_status"]),), run["final_time"])] if run["final_status"] else []


def _problems(run: Row) -> list[tuple[tuple[str, ...], Any]]:
    return [((kind,), run["problems"].get(kind)) for kind in PROBLEMS]


_RUN_GAUGES: Mapping[str, Callable[[Row], list[tuple[tuple[str, ...], Any]]]] = {
    "flip_run_status": _status,
    "flip_run_round": _column("round"),
    "flip_run_rounds_expected": _column("total_rounds"),
    "flip_run_clients": _column("clients"),
    "flip_run_round_results": _column("round_results"),
    "flip_run_last_event_timestamp_seconds": _column("last_event"),
    "flip_run_stall_after_seconds": _column("stall_after"),
    "flip_run_final_status_timestamp_seconds": _final_status,
    "flip_run_problem_timestamp_seconds": _problems,
}
"""Per-run gauge → label values and value, from a row of ``runs``. What is None is not shown."""
