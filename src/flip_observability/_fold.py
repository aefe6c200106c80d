"""The fold of the ledger's events into metric state: every fact is counted exactly once, whatever happens.

State and cursor change in one transaction, on condition that the cursor is where this fold read from. So any number of
processes may fold one ledger, and be killed at any moment. What cannot be counted is skipped and itself counted; it
never stops what is behind it.
"""

from __future__ import annotations

import json
import math
import threading
import time
import uuid
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from flip_observability._catalogue import BY_FACT, BY_NAME, EVENT_FACT, OTHER, Metric
from flip_observability.errors import logger, report
from flip_observability.ledger import (
    Ledger,
    LedgerBusyError,
    LedgerCorruptError,
    LedgerError,
    UnreadEvent,
    set_aside,
)

log = logger(__name__)

BATCH = 500
"""Events folded in one transaction: few enough that no writer of another process waits noticeably."""
PAUSE_SECONDS = 0.01
"""Between two batches, for the writers of other processes."""
BATCHES_AT_ONCE = 100
MAX_FACT = 1e15
"""No duration and no size is greater; what is would spoil a sum for ever."""

SeriesKey: TypeAlias = "tuple[str, ...]"
Deltas: TypeAlias = "dict[str, dict[SeriesKey, Series]]"
T = TypeVar("T")

_MALFORMED = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""What reading something can raise that is not what it should be."""


@dataclass(frozen=True)
class Exemplar:
    """Which run was counted: its trace, the value, and when (epoch seconds)."""

    trace_id: str
    value: float
    time: float


@dataclass
class Series:
    """What one label set of a counter or histogram has come to. A counter is a histogram without bounds.

    Args:
        bounds: upper bounds of the buckets, without infinity.
        total: the counter's value, or the sum of what a histogram saw.
        counts: what fell into each bucket and, last, beyond them (not cumulative).
        exemplars: by bucket, the latest.
    """

    bounds: tuple[float, ...]
    total: float = 0.0
    counts: list[int] = field(default_factory=list)
    exemplars: dict[int, Exemplar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float, exemplar: Exemplar | None) -> None:
        slot = bisect_left(self.bounds, value)
        self.total += value
        self.counts[slot] += 1
        if exemplar is not None:
            self.exemplars[slot] = exemplar

    def merge(self, other: Series) -> None:
        """Add what another series counted. Its buckets may be others: see :meth:`rebucketed`."""
        other = other.rebucketed(self.bounds)
        self.total += other.total
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.exemplars |= other.exemplars

    def rebucketed(self, bounds: tuple[float, ...]) -> Series:
        """The same counts in other buckets.

        Number and sum stay as they are. What was in an old bucket goes to the first new one that holds all of it: never
        below what it was, at most one old bucket too high.
        """
        if bounds == self.bounds:
            return self
        moved = Series(bounds, self.total)
        for upper, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            moved.counts[bisect_left(bounds, upper)] += count
        moved.exemplars = {bisect_left(bounds, e.value): e for e in self.exemplars.values()}
        return moved

    def to_json(self) -> str:
        exemplars = {slot: [e.trace_id, e.value, e.time] for slot, e in self.exemplars.items()}
        data = {"total": self.total, "counts": self.counts, "bounds": self.bounds, "exemplars": exemplars}
        return json.dumps(data, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Series:
        """The series of a stored row.

        Raises:
            ValueError and its like (:data:`_MALFORMED`): the row is not one that :meth:`to_json` wrote.
        """
        data = json.loads(text)
        bounds = tuple(_finite(bound) for bound in data["bounds"])
        counts = [int(_amount(count)) for count in data["counts"]]
        if len(counts) != len(bounds) + 1 or list(bounds) != sorted(bounds):
            raise ValueError("counts and bounds do not belong together")
        exemplars = {
            int(slot): Exemplar(str(trace_id), _finite(value), _finite(when))
            for slot, (trace_id, value, when) in data["exemplars"].items()
            if 0 <= int(slot) < len(counts)
        }
        return cls(bounds, _finite(data["total"]), counts, exemplars)


def load_series(rows: Iterable[tuple[str, str, str]]) -> Deltas:
    """Stored rows as series of today's catalogue, by metric and label values.

    Rows of metrics that are no more stay in the ledger and are not shown. Rows with other labels are added to the
    series that today's labels make of them; changed buckets: :meth:`Series.rebucketed`. A damaged row is left out, and
    that is logged.
    """
    found: Deltas = defaultdict(dict)
    damaged = 0
    for name, labels, value in rows:
        metric = BY_NAME.get(name)
        if metric is None or metric.fact is None:
            continue
        try:
            stored = Series.from_json(value)
            key = metric.label_values(json.loads(labels))
        except _MALFORMED:
            damaged += 1
            continue
        found[name].setdefault(key, Series(metric.buckets)).merge(stored)
    if damaged:
        _warn("damaged", "%d rows of metric_state are damaged and left out; what they counted is lost.", damaged)
    return found


def fold_events(events: Iterable[UnreadEvent]) -> tuple[Deltas, int]:
    """What events add to the metrics.

    Returns:
        The additions, before any limit on label values; and how many events or facts could not be read.
    """
    deltas: Deltas = defaultdict(dict)
    skipped = 0
    for event in events:
        trace_id = _trace_id(event.run_id)
        try:
            name = event.name.decode("utf-8", "replace") if isinstance(event.name, bytes) else ""
            _count(deltas, [EVENT_FACT, 1, {"event": name.lstrip("_")}], None, event.time)
            facts = list(json.loads(event.facts or b""))
        except _MALFORMED:
            skipped += 1
            continue
        skipped += sum(not _could_count(deltas, fact, trace_id, event.time) for fact in facts)
    return deltas, skipped


def _could_count(deltas: Deltas, fact: Any, trace_id: str | None, when: object) -> bool:
    try:
        _count(deltas, fact, trace_id, when)
    except _MALFORMED:
        return False
    return True


def _count(deltas: Deltas, fact: Any, trace_id: str | None, when: object) -> None:
    name, value, labels = fact
    metric = BY_FACT[name]
    amount = _amount(value)
    if not isinstance(labels, dict):
        raise TypeError("labels are a mapping")
    exemplar = None
    if trace_id is not None and metric.has_exemplars and isinstance(when, float) and math.isfinite(when):
        exemplar = Exemplar(trace_id, amount, when)
    series = deltas[metric.name].setdefault(metric.label_values(labels), Series(metric.buckets))
    series.add(amount, exemplar)


def _finite(value: Any) -> float:
    number = float(value)
    if isinstance(value, str | bool) or not math.isfinite(number):
        raise ValueError("not a number")
    return number


def _amount(value: Any) -> float:
    number = _finite(value)
    if not 0 <= number <= MAX_FACT:
        raise ValueError("not an amount")
    return number


def _trace_id(run_id: object) -> str | None:
    """The trace id of a run is its run id."""
    try:
        return uuid.UUID(run_id.decode()).hex if isinstance(run_id, bytes) else None
    except ValueError:
        return None


class _Admission:
    """Which label values of a metric still find room. First come, first served; the rest is ``other``."""

    def __init__(self, metric: Metric, known: Iterable[SeriesKey]) -> None:
        self._metric = metric
        self._series = set(known)
        self._values = [{key[i] for key in self._series} | set(label.values) for i, label in enumerate(metric.labels)]

    def admit(self, key: SeriesKey) -> SeriesKey:
        if key in self._series:
            return key
        key = tuple(self._fit(i, value) for i, value in enumerate(key))
        if key not in self._series and len(self._series) >= self._metric.max_series:
            key = tuple(OTHER if label.limit else value for label, value in zip(self._metric.labels, key, strict=True))
        self._series.add(key)
        for values, value in zip(self._values, key, strict=True):
            values.add(value)
        return key

    def _fit(self, i: int, value: str) -> str:
        limit = self._metric.labels[i].limit
        full = limit is not None and value not in self._values[i] and len(self._values[i] - {OTHER}) >= limit
        return OTHER if full else value


def merged(deltas: Deltas, rows: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The rows of ``metric_state`` that change when ``deltas`` are added to the stored ``rows``, as they then are."""
    rows = list(rows)
    known = load_series(rows)
    stored = {(name, labels): value for name, labels, value in rows}
    changed: dict[tuple[str, str], Series] = {}
    for name, additions in deltas.items():
        metric = BY_NAME[name]
        admission = _Admission(metric, known.get(name, {}))
        for key, addition in additions.items():
            labels = json.dumps(dict(zip(metric.label_names, admission.admit(key), strict=True)), sort_keys=True)
            series = changed.get((name, labels))
            if series is None:
                series = changed[name, labels] = _stored_series(metric, stored.get((name, labels)))
            series.merge(addition)
    return [(name, labels, series.to_json()) for (name, labels), series in changed.items()]


def _stored_series(metric: Metric, value: str | None) -> Series:
    if value is not None:
        try:
            return Series.from_json(value).rebucketed(metric.buckets)
        except _MALFORMED:  # load_series has said so
            pass
    return Series(metric.buckets)


class LiveLedger:
    """A ledger whose file may be deleted, replaced or damaged while it is in use: then the next call has a new one.

    Args:
        ledger: to begin with. It is never closed here; whoever opened it may share it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._given = self._ledger = ledger
        self._lock = threading.Lock()

    def use(self, work: Callable[[Ledger], T]) -> T:
        """Do something with the ledger.

        Raises:
            LedgerError: it cannot be used now. After anything but :class:`LedgerBusyError` the next call opens it anew.
        """
        with self._lock:
            ledger = self._ledger
            if not ledger.is_current():
                log.error(
                    "The ledger in %s is gone, replaced or emptied. Metrics go on with the new one; counters restart.",
                    ledger.directory,
                )
                ledger = self._reopen(ledger)
        try:
            return work(ledger)
        except LedgerBusyError:
            raise
        except LedgerError as error:
            with self._lock:
                if ledger is self._ledger:
                    self._mend(ledger, error)
            raise

    def _mend(self, ledger: Ledger, error: LedgerError) -> None:
        if ledger.directory is None:
            return
        try:
            if isinstance(error, LedgerCorruptError):
                set_aside(ledger.directory, ledger.inode)
            self._reopen(ledger)
        except (LedgerError, OSError) as problem:
            report("metrics", problem, "cannot open the ledger anew; trying again")

    def _reopen(self, old: Ledger) -> Ledger:
        assert old.directory is not None  # noqa: S101 - a ledger in memory is always current
        self._ledger = Ledger.open_or_replace(old.directory)
        if old is not self._given:
            old.close()
        return self._ledger


class MetricsFold:
    """Brings ``metric_state`` up to date with the ledger's events. Thread-safe; several processes may do it at once.

    Args:
        ledger: the ledger; best a connection of its own, so that scrapes do not wait for it.
        batch: events per transaction.
    """

    def __init__(self, ledger: Ledger, *, batch: int = BATCH) -> None:
        self._ledger = LiveLedger(ledger)
        self._batch = batch
        self._lock = threading.Lock()
        self._caught_up = False

    @property
    def caught_up(self) -> bool:
        """Whether everything had been counted at least once since the start: until then, do not show the counters."""
        return self._caught_up

    def catch_up(self) -> bool:
        """Count what has not been counted. At most :data:`BATCHES_AT_ONCE` batches, with pauses for the writers.

        Returns:
            True when nothing was left.

        Raises:
            LedgerError: the ledger cannot be used now; call again later. Nothing is lost or counted twice.
        """
        with self._lock:
            for _ in range(BATCHES_AT_ONCE):
                if self._ledger.use(self._step):
                    self._caught_up = True
                    return True
                time.sleep(PAUSE_SECONDS)
            return False

    def _step(self, ledger: Ledger) -> bool:
        cursor, events = ledger.unread_events(self._batch)
        if not events:
            return True
        deltas, skipped = fold_events(events)
        if skipped:
            _count(deltas, ["observability_error", skipped, {"component": "metrics"}], None, None)
        won = ledger.fold_metrics(cursor, events[-1].id, list(deltas), lambda rows: merged(deltas, rows))
        if won and skipped:
            _warn("skipped", "%d events or facts could not be counted and were skipped.", skipped)
        return won and len(events) < self._batch


_warned: dict[str, float] = {}


def _warn(kind: str, text: str, *arguments: object) -> None:
    """Log, once a minute and kind. Not ``report``: that would count a second time what the state counts itself."""
    now = time.monotonic()
    if now - _warned.get(kind, -math.inf) >= 60.0:
        _warned[kind] = now
        log.warning(text, *arguments)


def known_series(metric: Metric) -> list[SeriesKey]:
    """The label sets of a metric that are known beforehand, to be shown at 0 from the start."""
    keys: list[SeriesKey] = [()]
    for label in metric.labels:
        keys = [(*key, value) for key in keys for value in label.values]
    return keys


def series_of(state: Mapping[str, Mapping[SeriesKey, Series]], metric: Metric) -> list[tuple[SeriesKey, Series]]:
    """All series of a counter or histogram: the known ones, at 0 unless counted, then the others in order."""
    counted = state.get(metric.name, {})
    keys = known_series(metric)
    keys += sorted(counted.keys() - set(keys))
    return [(key, counted.get(key) or Series(metric.buckets)) for key in keys]
