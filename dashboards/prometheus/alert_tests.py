"""What each alert must do, told as timelines, and checked by promtool.

A timeline is a story in minutes: what series said, when the exporter or Prometheus was away, and from which minute to
which an alert fires. Each is checked over the whole story, minute by minute: it started so often, first here, last
there. ``python -m dashboards.prometheus.alert_tests FOLDER`` writes the rules and a test file for each alert into a
folder, to be run with ``promtool test rules FOLDER/*.test.yml``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from dashboards.prometheus.alerts import BY_NAME, JOB, RULES

Value: TypeAlias = "Callable[[int], float | None]"
"""Minute → what a series says, None where it says nothing."""

RUN, OTHER_RUN = "6f1c2c9e-0000-4000-8000-000000000001", "6f1c2c9e-0000-4000-8000-000000000002"
MODEL, OTHER_MODEL = "0d0e0000-0000-4000-8000-000000000001", "0d0e0000-0000-4000-8000-000000000002"
FIRST = {"net_id": "net-1", "instance": "fl-1:9464", "job": JOB}
SECOND = {"net_id": "net-2", "instance": "fl-2:9464", "job": JOB}
THE_RUN = {"run_id": RUN, "model_id": MODEL}
ANOTHER_RUN = {"run_id": OTHER_RUN, "model_id": OTHER_MODEL}
DAY = 1440


@dataclass(frozen=True)
class Gap:
    """Minutes, both included, in which the exporter did not answer, or in which Prometheus itself was not there."""

    first: int
    last: int
    of_prometheus: bool = False


@dataclass(frozen=True)
class Fires:
    """That an alert with these labels first fires in one minute and last in another; open-ended without ``last``."""

    first: int
    last: int | None
    labels: Mapping[str, str]
    times: int = 1


@dataclass(frozen=True)
class Timeline:
    """One story about one alert."""

    name: str
    alert: str
    series: Mapping[str, Value]
    fires: Sequence[Fires] = ()
    gaps: Sequence[Gap] = ()
    minutes: int = 150
    silent_at: Sequence[int] = ()

    def render(self) -> dict[str, Any]:
        """As promtool reads it."""
        return {
            "name": f"{self.alert}: {self.name}",
            "interval": "1m",
            "input_series": [
                {"series": series, "values": _encode(self._samples(value))} for series, value in self.series.items()
            ],
            "promql_expr_test": list(self._checks()),
        }

    def _samples(self, value: Value) -> Iterator[str]:
        there = False
        for minute in range(self.minutes + 1):
            gap = next((gap for gap in self.gaps if gap.first <= minute <= gap.last), None)
            sample = None if gap else value(minute)
            if sample is not None:
                yield f"{sample:g}" if abs(sample) < 1e5 else f"{sample:.0f}"
            else:
                # A scrape that fails, or no longer has the series, marks its end; a Prometheus that is away cannot.
                yield "stale" if there and not (gap and gap.of_prometheus) else "_"
            there = sample is not None

    def _checks(self) -> Iterator[dict[str, Any]]:
        active = f'ALERTS{{alertname="{self.alert}",alertstate="firing"}}'
        # One minute more, for Prometheus 3 leaves out the begin of a range.
        over = f"[{self.minutes + 1}m:1m]"
        keep = "sum without (alertname, alertstate, severity, lasts)"
        yield self._check(
            f"{keep} (count_over_time(({active} unless {active} offset 1m){over}))",
            {_labels(fires): float(fires.times) for fires in self.fires},
        )
        yield self._check(
            f"{keep} (min_over_time(timestamp({active}){over})) / 60",
            {_labels(fires): float(fires.first) for fires in self.fires},
        )
        if all(fires.last is not None for fires in self.fires):
            yield self._check(
                f"{keep} (max_over_time(timestamp({active}){over})) / 60",
                {_labels(fires): float(fires.last or 0) for fires in self.fires},
            )
        for minute in self.silent_at:
            yield {"expr": active, "eval_time": f"{minute}m", "exp_samples": []}

    def _check(self, expression: str, samples: Mapping[str, float]) -> dict[str, Any]:
        expected = [{"labels": labels, "value": value} for labels, value in samples.items()]
        return {"expr": expression, "eval_time": f"{self.minutes}m", "exp_samples": expected}


def _encode(samples: Iterator[str]) -> str:
    """promtool's notation, runs of the same or of evenly growing values shortened."""
    parts: list[str] = []
    todo = list(samples)
    while todo:
        head, count = todo[0], 1
        if head in ("_", "stale"):
            while count < len(todo) and head == "_" == todo[count]:
                count += 1
            parts.append(f"_x{count}" if count > 1 else head)
        else:
            step = float(todo[1]) - float(head) if len(todo) > 1 and todo[1] not in ("_", "stale") else 0.0
            while (
                count < len(todo)
                and todo[count] not in ("_", "stale")
                and float(todo[count]) - float(todo[count - 1]) == step
            ):
                count += 1
            parts.append(head if count == 1 else f"{head}{step:+g}x{count - 1}")
        del todo[:count]
    return " ".join(parts)


def _selector(metric: str, *labels: Mapping[str, str], **more: str) -> str:
    merged: dict[str, str] = {}
    for some in (*labels, more):
        merged |= some
    return metric + "{" + ",".join(f'{name}="{value}"' for name, value in merged.items()) + "}"


def _labels(fires: Fires) -> str:
    return _selector("", fires.labels)


def _always(value: float) -> Value:
    return lambda minute: value


def _from(first: int, value: float, last: int = 10**6) -> Value:
    return lambda minute: value if first <= minute <= last else None


def _between(first: int, last: int, bad: float, good: float) -> Value:
    return lambda minute: bad if first <= minute <= last else good


# -- moments -----------------------------------------------------------------------------------------------------------


def _net(server: Mapping[str, str]) -> dict[str, str]:
    return {"net_id": server["net_id"]}


def _moments_of_a_run(
    alert: str, metric: str, matched: Mapping[str, str], others: Sequence[Mapping[str, str]]
) -> Iterator[Timeline]:
    """The stories of an alert on a run's timestamp. ``others`` are what the same series says of runs that are well."""

    def series(
        minute: int,
        *,
        known_from: int | None = None,
        known_to: int = 10**6,
        server: Mapping[str, str] = FIRST,
        run: Mapping[str, str] = THE_RUN,
    ) -> dict[str, Value]:
        first = minute if known_from is None else known_from
        return {_selector(metric, server, run, matched): _from(first, minute * 60.0, known_to)}

    well: dict[str, Value] = {
        _selector(metric, FIRST, ANOTHER_RUN, other): _from(20, 20 * 60.0) for other in others
    } | {_selector(metric, SECOND, THE_RUN, other): _from(20, 20 * 60.0) for other in others}

    def fires(first: int, last: int, server: Mapping[str, str] = FIRST, run: Mapping[str, str] = THE_RUN) -> Fires:
        return Fires(first, last, {**_net(server), **run})

    yield Timeline("what is well is silent", alert, well)
    yield Timeline("fires once, beside what is well", alert, well | series(30), [fires(30, 44)])
    yield Timeline("a restart of the exporter", alert, series(30), [fires(30, 44)], [Gap(32, 34)])
    yield Timeline("30 minutes of exporter downtime after it", alert, series(30), [fires(30, 44)], [Gap(31, 60)])
    yield Timeline("30 minutes of exporter downtime around it", alert, series(10), [fires(35, 49)], [Gap(5, 34)])
    yield Timeline(
        "30 minutes without Prometheus around it", alert, series(10), [fires(35, 49)], [Gap(5, 34, of_prometheus=True)]
    )
    yield Timeline(
        "30 minutes without Prometheus after it", alert, series(5), [fires(5, 19)], [Gap(25, 54, of_prometheus=True)]
    )
    yield Timeline("a run that no scrape saw alive, the first run ever", alert, series(0), [fires(0, 14)])
    yield Timeline(
        "two servers with the same run names",
        alert,
        series(30) | series(50, server=SECOND),
        [fires(30, 44), fires(50, 64, SECOND)],
    )
    yield Timeline(
        "two runs at once",
        alert,
        series(30) | series(30, run=ANOTHER_RUN),
        [fires(30, 44), fires(30, 44, run=ANOTHER_RUN)],
    )
    yield Timeline(
        "another exporter takes over the ledger",
        alert,
        series(30, known_to=35) | series(30, known_from=37, server={**FIRST, "instance": "fl-1:9465"}),
        [fires(30, 44)],
    )
    yield Timeline(
        "the exporter is away for most of a day", alert, series(30), [fires(30, 44)], [Gap(40, 1_300)], minutes=1_500
    )
    yield Timeline(
        "what is older than a day when Prometheus first hears of it is history",
        alert,
        series(59, known_from=DAY + 60),
        minutes=DAY + 120,
    )
    yield Timeline(
        "what is almost a day old is not",
        alert,
        series(62, known_from=DAY + 60),
        [fires(DAY + 60, DAY + 61)],
        minutes=DAY + 120,
    )


def _run_moments() -> Iterator[Timeline]:
    final = "flip_run_final_status_timestamp_seconds"
    well = [{"status": status} for status in ("RESULTS_UPLOADED", "STOPPED")]
    yield from _moments_of_a_run("FlipRunFailed", final, {"status": "ERROR"}, well)
    upload_failed = _moments_of_a_run("FlipRunFailed", final, {"status": "RESULTS_UPLOAD_FAILED"}, well)
    for timeline in islice(upload_failed, 3):
        yield replace(timeline, name=f"{timeline.name} (a failed upload, where the hub has a status for it)")
    problems = {
        "FlipRunOrphaned": "orphaned",
        "FlipResultsUploadFailed": "upload_failed",
        "FlipFatalError": "fatal_error",
        "FlipHubRejected": "hub_rejected",
        "FlipRunAborted": "aborted",
    }
    for alert, kind in problems.items():
        others = [{"kind": other} for other in problems.values() if other != kind]
        yield from _moments_of_a_run(alert, "flip_run_problem_timestamp_seconds", {"kind": kind}, others)


@dataclass(frozen=True)
class Counter:
    """How an alert on a counter that rose is told: by two values of the label that tells its series apart.

    Args:
        alert: its name.
        metric: the counter.
        label: that the alert keeps.
        values: of that label.
        more: labels that the alert looks for.
    """

    alert: str
    metric: str
    label: str
    values: tuple[str, str]
    more: Mapping[str, str]


COUNTERS = (
    Counter("FlipObservabilityErrors", "flip_observability_errors_total", "component", ("tracing", "hub"), {}),
    Counter("FlipHubRejectedDetails", "flip_hub_requests_total", "kind", ("metric", "log"), {"outcome": "rejected"}),
)


def _rises(it: Counter) -> Iterator[Timeline]:
    alert = it.alert
    one, another = it.values

    def errors(value: Value, server: Mapping[str, str] = FIRST, which: str = one) -> dict[str, Value]:
        return {_selector(it.metric, server, it.more, **{it.label: which}): value}

    def fires(first: int, last: int, server: Mapping[str, str] = FIRST, which: str = one) -> Fires:
        return Fires(first, last, _observer_labels(server) | {it.label: which})

    def rises(first: int, *, before: float = 0, after: float = 2) -> Value:
        return lambda minute: after if minute >= first else before

    beside = errors(_always(7), which=another) | errors(_always(0), SECOND)
    old = fires(0, 14, which=another)
    yield Timeline("no errors", alert, errors(_always(0)))
    yield Timeline("an error, beside old ones", alert, errors(rises(30)) | beside, [fires(30, 44), old])
    yield Timeline("one more error", alert, errors(rises(30, before=5, after=6)), [replace(fires(0, 44), times=2)])
    yield Timeline("a series that begins with its first error", alert, errors(_from(30, 1)), [fires(30, 44)])
    yield Timeline("an error at the first scrape ever", alert, errors(_always(1)), [fires(0, 14)])
    yield Timeline("a restart of the exporter", alert, errors(rises(30)), [fires(30, 44)], [Gap(32, 34)])
    yield Timeline("30 minutes of downtime after it", alert, errors(rises(30)), [fires(30, 44)], [Gap(31, 60)])
    yield Timeline("30 minutes of downtime around it", alert, errors(rises(10)), [fires(35, 49)], [Gap(5, 34)])
    yield Timeline(
        "30 minutes without Prometheus", alert, errors(rises(10)), [fires(35, 49)], [Gap(5, 34, of_prometheus=True)]
    )
    yield Timeline("most of a day away", alert, errors(_always(1)), [fires(0, 14)], [Gap(40, 1_300)], minutes=1_500)
    yield Timeline(
        "two servers and two series",
        alert,
        errors(rises(30)) | errors(rises(50), SECOND) | errors(rises(60), which=another),
        [fires(30, 44), fires(50, 64, SECOND), fires(60, 74, which=another)],
    )
    yield Timeline(
        "two servers of one net",
        alert,
        errors(_always(0)) | errors(rises(30), {**FIRST, "instance": "fl-3:9464"}),
        [fires(30, 44, {**FIRST, "instance": "fl-3:9464"})],
    )


# -- conditions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """How an alert on a lasting state is told: it is bad from minute 30 to minute 99, and known ``delay`` later.

    Args:
        alert: its name.
        series: (server, run, bad from, bad to) → what is served.
        labels: the alert's labels on that server.
        delay: minutes from the begin of the trouble to the alert.
    """

    alert: str
    series: Callable[[Mapping[str, str], int, int], dict[str, Value]]
    labels: Callable[[Mapping[str, str]], dict[str, str]]
    delay: int


NEVER = 10**6


def _conditions(it: Condition) -> Iterator[Timeline]:
    def fires(first: int = 30 + it.delay, last: int = 99, server: Mapping[str, str] = FIRST) -> Fires:
        return Fires(first, last, it.labels(server))

    bad = it.series(FIRST, 30, 99)
    well = it.series(SECOND, NEVER, NEVER)
    yield Timeline("what is well is silent", it.alert, it.series(FIRST, NEVER, NEVER) | well)
    yield Timeline("fires once, beside what is well", it.alert, bad | well, [fires()])
    yield Timeline("a restart of the exporter", it.alert, bad, [fires()], [Gap(60, 62)])
    yield Timeline("30 minutes of exporter downtime in it", it.alert, bad, [fires()], [Gap(60, 89)])
    yield Timeline("30 minutes of downtime while all is well", it.alert, well, gaps=[Gap(60, 89)])
    yield Timeline("30 minutes without Prometheus in it", it.alert, bad, [fires()], [Gap(60, 89, of_prometheus=True)])
    yield Timeline(
        "30 minutes without Prometheus while all is well", it.alert, well, gaps=[Gap(60, 89, of_prometheus=True)]
    )
    yield Timeline(
        "what nobody has heard of for long is not known any more",
        it.alert,
        it.series(FIRST, 30, NEVER),
        [replace(fires(), last=None)],
        [Gap(60, NEVER)],
        silent_at=(115, 120, 150),
    )
    yield Timeline(
        "the exporter and the run are new", it.alert, it.series(FIRST, 0, 60), [fires(it.delay, 60)], minutes=120
    )
    yield Timeline(
        "two servers with the same run names",
        it.alert,
        bad | it.series(SECOND, 50, 119),
        [fires(), fires(50 + it.delay, 119, SECOND)],
    )
    other = {**FIRST, "instance": "fl-3:9464"}
    yield Timeline("two servers of one net", it.alert, it.series(other, NEVER, NEVER) | bad, [fires()])


def _observer_labels(server: Mapping[str, str]) -> dict[str, str]:
    return {name: server[name] for name in ("net_id", "instance")}


def _run_labels(server: Mapping[str, str]) -> dict[str, str]:
    return _observer_labels(server) | THE_RUN


def _gauge(metric: str, bad: float, good: float, **labels: str) -> Callable[..., dict[str, Value]]:
    return lambda server, first, last: {_selector(metric, server, labels): _between(first, last, bad, good)}


def _hub(server: Mapping[str, str], first: int, last: int) -> dict[str, Value]:
    """Whatever waits grows older by the minute; nothing waits longer than five when all is well."""

    def age(minute: int) -> float:
        return (minute - first) * 60.0 if first <= minute <= last else 240.0 if minute % 2 else 0.0

    metric = "flip_outbox_oldest_age_seconds"
    return {_selector(metric, server, kind="status"): age, _selector(metric, server, kind="logs"): _always(300)}


def _progress(server: Mapping[str, str], first: int, last: int) -> dict[str, Value]:
    """Something happens every minute, or nothing; ten minutes are too long."""

    def latest(minute: int) -> float:
        return 60.0 * (first if first <= minute <= last else minute)

    return {
        _selector("flip_run_last_event_timestamp_seconds", server, THE_RUN): latest,
        _selector("flip_run_stall_after_seconds", server, THE_RUN): _always(600),
    }


def _clients(server: Mapping[str, str], first: int, last: int) -> dict[str, Value]:
    return {
        _selector("flip_run_round_results", server, THE_RUN): _between(first, last, 2, 3),
        _selector("flip_run_clients", server, THE_RUN): _always(3),
    }


def _loop(loop: str) -> Callable[..., dict[str, Value]]:
    def series(server: Mapping[str, str], first: int, last: int) -> dict[str, Value]:
        def success(minute: int) -> float:
            return 60.0 * (first if first <= minute <= last else minute)

        metric = "flip_observer_loop_last_success_timestamp_seconds"
        well = _selector(metric, server, loop="fold")
        return {_selector(metric, server, loop=loop): success, well: lambda minute: minute * 60}

    return series


def _loop_labels(loop: str) -> Callable[[Mapping[str, str]], dict[str, str]]:
    return lambda server: _observer_labels(server) | {"loop": loop}


CONDITIONS = (
    Condition("FlipRunStalled", _progress, _run_labels, 11),
    Condition("FlipClientsMissing", _clients, _run_labels, 1),
    Condition("FlipHubUnreachable", _hub, _observer_labels, 6),
    Condition("FlipLedgerUnwritable", _gauge("flip_ledger_writable", 0, 1), _observer_labels, 1),
    Condition("FlipObserverLoopStuck", _loop("dispatcher"), _loop_labels("dispatcher"), 7),
)


def _particulars() -> Iterator[Timeline]:
    """What only one alert knows."""
    final = _selector("flip_run_final_status_timestamp_seconds", FIRST, THE_RUN, status="ERROR")
    # A run of the same net that ended, and one of the same name elsewhere, have nothing to do with it.
    others = {
        _selector("flip_run_final_status_timestamp_seconds", server, run, status="ERROR"): _from(35, 2_100.0)
        for server, run in ((FIRST, ANOTHER_RUN), (SECOND, THE_RUN))
    }
    for it, series in (("FlipRunStalled", _progress), ("FlipClientsMissing", _clients)):
        delay = next(condition.delay for condition in CONDITIONS if condition.alert == it)
        ended = series(FIRST, 30, NEVER) | {final: _from(60, 3_600.0)} | others
        labels = _run_labels(FIRST)
        yield Timeline("it ends with the run", it, ended, [Fires(30 + delay, 59, labels)])
        yield Timeline("not for a run that has ended", it, ended | {final: _from(20, 1_200.0)})
        yield Timeline(
            "it ends with the run, over a restart", it, ended, [Fires(30 + delay, 59, labels)], [Gap(70, 99)], 200
        )
    yield Timeline(
        "clients are not missing before a round has ended",
        "FlipClientsMissing",
        {_selector("flip_run_clients", FIRST, THE_RUN): _always(3)},
    )
    sentinel = _loop("sentinel")
    yield Timeline(
        "the sentinel may take an hour",
        "FlipObserverLoopStuck",
        sentinel(FIRST, 30, 90) | sentinel(SECOND, 30, 149),
        [Fires(92, 149, _loop_labels("sentinel")(SECOND))],
        minutes=200,
    )
    yield Timeline(
        "what is accepted, tried again, or a status is another matter",
        "FlipHubRejectedDetails",
        {
            _selector("flip_hub_requests_total", FIRST, kind=kind, outcome=outcome): float
            for kind, outcome in (("metric", "delivered"), ("metric", "retried"), ("status", "rejected"))
        },
    )
    yield Timeline("always", "Watchdog", {}, [Fires(0, 150, {})])


def _observer_down() -> Iterator[Timeline]:
    alert = "FlipObserverDown"

    def observer(first: int, last: int, server: Mapping[str, str] = FIRST, job: str = JOB) -> dict[str, Value]:
        up = _selector("up", job=job, instance=server["instance"])
        info = _selector("flip_build_info", server, version="1.0.0", nvflare_version="2.9.0")
        return {up: _between(first, last, 0, 1), info: lambda m: None if first <= m <= last else 1.0}

    def fires(first: int, last: int, server: Mapping[str, str] = FIRST) -> Fires:
        return Fires(first, last, _observer_labels(server))

    well = observer(NEVER, NEVER, SECOND)
    yield Timeline("what is well is silent", alert, observer(NEVER, NEVER) | well)
    yield Timeline("fires once, beside what is well", alert, observer(30, 99) | well, [fires(35, 99)])
    yield Timeline("a restart of the exporter", alert, observer(30, 33), [])
    yield Timeline("30 minutes of downtime", alert, observer(30, 59), [fires(35, 59)])
    yield Timeline(
        "two servers", alert, observer(30, 99) | observer(50, 119, SECOND), [fires(35, 99), fires(55, 119, SECOND)]
    )
    yield Timeline(
        "the net's name was changed",
        alert,
        observer(30, 99) | {_selector("flip_build_info", FIRST, net_id="old", version="1"): _from(0, 1, 10)},
        [fires(35, 99), fires(35, 99, {**FIRST, "net_id": "old"})],
    )
    yield Timeline(
        "one that never answered",
        alert,
        {_selector("up", job=JOB, instance=FIRST["instance"]): _always(0)} | well,
        [Fires(5, 150, {"instance": FIRST["instance"]})],
    )
    yield Timeline("half a day away is one incident", alert, observer(30, 700), [fires(35, 700)], minutes=760)
    yield Timeline(
        "no target at all, whatever else is scraped",
        alert,
        {_selector("up", job="prometheus", instance="localhost:9090"): _always(1)},
        [Fires(5, 150, {"job": JOB})],
    )
    yield Timeline(
        "another job's target",
        alert,
        {_selector("up", job="prometheus", instance="localhost:9090"): _always(0)} | well,
    )


def timelines() -> dict[str, list[Timeline]]:
    """All of them, by alert."""
    found: dict[str, list[Timeline]] = {name: [] for name in BY_NAME}
    stories = [_run_moments(), _observer_down(), _particulars(), *map(_rises, COUNTERS), *map(_conditions, CONDITIONS)]
    for timeline in chain.from_iterable(stories):
        found[timeline.alert].append(timeline)
    return found


def render(some: Sequence[Timeline], rules: str) -> str:
    """A test file for promtool.

    Args:
        some: the timelines in it.
        rules: the rule file, from where the test file lies.
    """
    content = {"rule_files": [rules], "evaluation_interval": "1m", "tests": [timeline.render() for timeline in some]}
    text: str = yaml.dump(content, sort_keys=False, width=10_000, default_flow_style=None)
    return text


def write(folder: Path) -> None:
    """The rules, and a test file for each alert."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(RULES, folder)
    for alert, some in timelines().items():
        (folder / f"{alert}.test.yml").write_text(render(some, RULES.name), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
