"""The catalogue of metrics, as data: names, labels, buckets, and which stored fact each one counts.

Names and labels are an interface: dashboards, alerts and other people's queries stand on them. Pure: no I/O. A new
metric is a new row of :data:`CATALOGUE`; ``docs/telemetry.md`` is made from it.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from flip_observability.constants import FINAL_STATUSES, ModelStatus, OwnEvents
from flip_observability.lifecycle import TABLE
from flip_observability.results import REASONS

Kind: TypeAlias = Literal["counter", "histogram", "gauge"]

OTHER = "other"
"""The label value of everything for which there is no room, or that is in no list."""
UNKNOWN = "unknown"
"""The label value where nothing was given."""
MAX_LABEL_CHARS = 96
_NO_PART_OF_AN_ID = re.compile(r"^[-~]|[^A-Za-z0-9_.~-]")

EVENT_FACT = "event"
"""The one fact that is not stored: every event counts as one of these."""

_MINUTE, _HOUR, _DAY = 60.0, 3_600.0, 86_400.0
_KIB, _MIB, _GIB = 2.0**10, 2.0**20, 2.0**30

FINAL = tuple(status.value for status in ModelStatus if status in FINAL_STATUSES)
HUB_KINDS = ("status", "metric", "log", "event")
HUB_OUTCOMES = ("delivered", "retried", "rejected", "expired")
EVENTS = tuple(dict.fromkeys(name.lstrip("_") for name in (*TABLE, *(own.value for own in OwnEvents))))
"""As in the timeline of ``flip-obs show`` and in traces: NVFLARE's names without the leading underscore."""
COMPONENTS = (
    *("client", "context", "dispatcher", "doctor", "exporter", "handler", "hub", "install", "json_generator"),
    *(
        "ledger",
        "links",
        "metrics",
        "model_id",
        "observer",
        "persist",
        "recorder",
        "results",
        "salvage",
        "sentinel",
        "spool",
    ),
    *("tracing", "foreign_client", "server_observer"),
)
PROBLEMS = ("orphaned", "fatal_error", "aborted", "upload_failed", "hub_rejected", "model_id")

RUN_LABELS = ("run_id", "model_id")


@dataclass(frozen=True)
class Label:
    """A label of a metric and what may stand in it.

    Args:
        name: the label.
        values: the only values there are (anything else is ``other``), or, with a limit, those known from the start.
        limit: how many different values are kept, first come, first served; the rest is ``other``.
    """

    name: str
    values: tuple[str, ...] = ()
    limit: int | None = None

    def clean(self, value: object) -> str:
        """A value as it may be exposed: short, printable, and from the list where there is one."""
        text = clean_label(value)
        closed = self.values and self.limit is None
        return OTHER if closed and text not in self.values else text


@dataclass(frozen=True)
class Metric:
    """One family of metrics.

    Args:
        name: as in queries; counters end in ``_total``.
        kind: ``counter``, ``histogram`` or ``gauge``.
        help: what it means, in a sentence.
        labels: beside ``net_id``, which every series has.
        fact: counters and histograms: the stored fact that is counted. Gauges are read when they are scraped.
        buckets: histograms: upper bounds, in the unit that the name ends in.
        exemplars: counters: whether series point to the trace of the latest run counted. Histograms always do.
        max_series: label sets kept; beyond it, labels with a limit become ``other``.
        example: a query to begin with.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[Label, ...] = ()
    fact: str | None = None
    buckets: tuple[float, ...] = ()
    exemplars: bool = False
    max_series: int = 500
    example: str = ""

    @functools.cached_property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels beside ``net_id``."""
        return tuple(label.name for label in self.labels)

    @property
    def has_exemplars(self) -> bool:
        """Whether its series point to traces."""
        return self.exemplars or self.kind == "histogram"

    def label_values(self, labels: Mapping[str, object]) -> tuple[str, ...]:
        """The values of this metric's labels, whatever labels were stored: surplus ones go, missing are ``unknown``."""
        return tuple(label.clean(labels.get(label.name, "")) for label in self.labels)


def clean_label(value: object) -> str:
    """A label value that no one can grow or garble the page with: one short printable line, never empty.

    A long one keeps its beginning and gets a hash, so that two long ones stay apart.
    """
    text = value if isinstance(value, str) else str(value) if isinstance(value, int | float) else ""
    if len(text) > MAX_LABEL_CHARS:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        text = f"{text[: MAX_LABEL_CHARS - 9]}~{digest}"
    if not text.isprintable():
        text = "".join(char if char.isprintable() else "_" for char in text)
    return text.strip() or UNKNOWN


def clean_id(value: object) -> str:
    """The id of a run or model as a label: alerts put it into commands that a person pastes into a shell.

    What no id of ours can hold is replaced, and a hash keeps two such ids apart.
    """
    text = clean_label(value)
    harmless = _NO_PART_OF_AN_ID.sub("_", text)
    if harmless == text:
        return text
    return f"{harmless[: MAX_LABEL_CHARS - 9]}~{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _per_run(name: str, help_: str, *labels: Label, example: str) -> Metric:
    return Metric(name, "gauge", help_, (*(Label(label) for label in RUN_LABELS), *labels), example=example)


_STATUS = Label("status", FINAL)
_KIND = Label("kind", HUB_KINDS)

CATALOGUE: tuple[Metric, ...] = (
    Metric(
        "flip_lifecycle_events_total",
        "counter",
        "Events recorded in the ledger, by name.",
        (Label("event", EVENTS),),
        EVENT_FACT,
        example="sum by (event) (increase(flip_lifecycle_events_total[1h])) > 0",
    ),
    Metric(
        "flip_runs_started_total",
        "counter",
        "Runs that began (START_RUN).",
        fact="run_started",
        example="increase(flip_runs_started_total[1d])",
    ),
    Metric(
        "flip_runs_finished_total",
        "counter",
        "Runs that got their final status, by that status (our vocabulary, whatever the hub's contract).",
        (_STATUS,),
        "run_finished",
        exemplars=True,
        example="sum by (net_id, status) (increase(flip_runs_finished_total[1d]))",
    ),
    Metric(
        "flip_fatal_errors_total",
        "counter",
        "Runs in which NVFLARE reported a fatal system error, or which ended in the middle.",
        fact="fatal_error",
        exemplars=True,
        example="increase(flip_fatal_errors_total[1h])",
    ),
    Metric(
        "flip_aborts_total",
        "counter",
        "Runs that were aborted by a person (final status STOPPED).",
        fact="abort",
        exemplars=True,
        example="increase(flip_aborts_total[1d])",
    ),
    Metric(
        "flip_orphaned_runs_total",
        "counter",
        "Runs whose process died without a final status, and which the observer ended.",
        fact="orphaned",
        exemplars=True,
        example="increase(flip_orphaned_runs_total[1d])",
    ),
    Metric(
        "flip_results_upload_failures_total",
        "counter",
        "Runs whose results could not be uploaded, by why.",
        (Label("reason", REASONS),),
        "upload_failure",
        exemplars=True,
        example="sum by (reason) (increase(flip_results_upload_failures_total[1d])) > 0",
    ),
    Metric(
        "flip_hub_requests_total",
        "counter",
        "Attempts to tell the Central Hub something, by what it was and what came of it.",
        (_KIND, Label("outcome", HUB_OUTCOMES)),
        "hub_request",
        exemplars=True,
        example='sum by (kind) (rate(flip_hub_requests_total{outcome!="delivered"}[5m]))',
    ),
    Metric(
        "flip_observability_errors_total",
        "counter",
        "Errors of the observability itself, by the part that had them. Runs go on all the same.",
        (Label("component", COMPONENTS, limit=40),),
        "observability_error",
        example="sum by (component) (increase(flip_observability_errors_total[1h])) > 0",
    ),
    Metric(
        "flip_run_duration_seconds",
        "histogram",
        "From a run's first event to its final status.",
        (_STATUS,),
        "run_duration",
        (
            10,
            30,
            _MINUTE,
            300,
            900,
            1_800,
            _HOUR,
            2 * _HOUR,
            4 * _HOUR,
            8 * _HOUR,
            12 * _HOUR,
            _DAY,
            2 * _DAY,
            7 * _DAY,
        ),
        example="histogram_quantile(0.5, sum by (le, status) (rate(flip_run_duration_seconds_bucket[7d])))",
    ),
    Metric(
        "flip_round_duration_seconds",
        "histogram",
        "One round of federated training, from its start to its end.",
        (),
        "round_duration",
        (1, 5, 15, 30, _MINUTE, 120, 300, 600, 1_800, _HOUR, 2 * _HOUR, 4 * _HOUR, 12 * _HOUR, _DAY),
        example="histogram_quantile(0.95, sum by (le) (rate(flip_round_duration_seconds_bucket[1h])))",
    ),
    Metric(
        "flip_aggregation_duration_seconds",
        "histogram",
        "Aggregating the clients' results of a round.",
        (),
        "aggregation_duration",
        (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 30, _MINUTE, 120, 300, 600),
        example="histogram_quantile(0.95, sum by (le) (rate(flip_aggregation_duration_seconds_bucket[1h])))",
    ),
    Metric(
        "flip_client_task_duration_seconds",
        "histogram",
        "A client's own time for a task: from the moment the task left the server until its result came.",
        (Label("client", limit=200), Label("task", limit=10)),
        "client_task_duration",
        (1, 5, 15, _MINUTE, 300, 900, 1_800, _HOUR, 4 * _HOUR, 12 * _HOUR),
        example="sum by (client) (rate(flip_client_task_duration_seconds_sum[1h]))"
        " / sum by (client) (rate(flip_client_task_duration_seconds_count[1h]))",
    ),
    Metric(
        "flip_results_upload_duration_seconds",
        "histogram",
        "Packing and uploading a run's results.",
        (),
        "upload_duration",
        (0.5, 1, 5, 15, 30, _MINUTE, 120, 300, 600, 1_800, _HOUR, 2 * _HOUR),
        example="histogram_quantile(0.95, sum by (le) (rate(flip_results_upload_duration_seconds_bucket[1d])))",
    ),
    Metric(
        "flip_results_upload_size_bytes",
        "histogram",
        "Size of a run's uploaded results.",
        (),
        "upload_size",
        (_KIB, 64 * _KIB, _MIB, 10 * _MIB, 100 * _MIB, 512 * _MIB, _GIB, 2 * _GIB, 5 * _GIB, 10 * _GIB, 50 * _GIB),
        example="sum(increase(flip_results_upload_size_bytes_sum[1d]))",
    ),
    Metric(
        "flip_hub_delivery_lag_seconds",
        "histogram",
        "From an event to its acceptance by the Central Hub.",
        (_KIND,),
        "hub_delivery_lag",
        (0.1, 0.5, 1, 2.5, 5, 10, 30, _MINUTE, 300, 900, _HOUR, 6 * _HOUR, _DAY, 3 * _DAY),
        example='histogram_quantile(0.99, sum by (le) (rate(flip_hub_delivery_lag_seconds_bucket{kind="status"}[1h])))',
    ),
    Metric(
        "flip_runs_active",
        "gauge",
        "Runs that have begun and have no final status yet.",
        example="sum by (net_id) (flip_runs_active)",
    ),
    _per_run(
        "flip_run_status",
        "1 for the status that a run has now.",
        Label("status"),
        example='flip_run_status{status!~"RESULTS_UPLOADED|ERROR|STOPPED|RESULTS_UPLOAD_FAILED"}',
    ),
    _per_run("flip_run_round", "The round that a run is in, from 1.", example="flip_run_round"),
    _per_run(
        "flip_run_rounds_expected",
        "Rounds that the run's workflow means to do.",
        example="flip_run_round / flip_run_rounds_expected",
    ),
    _per_run("flip_run_clients", "Clients that take part in a run.", example="flip_run_clients"),
    _per_run(
        "flip_run_round_results",
        "Results accepted in the run's last finished round.",
        example="flip_run_round_results < flip_run_clients",
    ),
    _per_run(
        "flip_run_last_event_timestamp_seconds",
        "When the run's last event happened.",
        example="time() - flip_run_last_event_timestamp_seconds",
    ),
    _per_run(
        "flip_run_stall_after_seconds",
        "Time without an event after which a running run counts as stalled: three times its median round.",
        example="time() - flip_run_last_event_timestamp_seconds > flip_run_stall_after_seconds"
        " unless on (net_id, run_id, model_id) flip_run_final_status_timestamp_seconds",
    ),
    _per_run(
        "flip_run_final_status_timestamp_seconds",
        "When the run got its final status.",
        Label("status"),
        example="time() - flip_run_final_status_timestamp_seconds < 3600",
    ),
    _per_run(
        "flip_run_problem_timestamp_seconds",
        "When a problem was first seen in the run.",
        Label("kind", PROBLEMS),
        example="time() - flip_run_problem_timestamp_seconds < 3600",
    ),
    Metric(
        "flip_outbox_pending",
        "gauge",
        "What the Central Hub must still be told.",
        (_KIND,),
        example="sum by (kind) (flip_outbox_pending) > 0",
    ),
    Metric(
        "flip_outbox_oldest_age_seconds",
        "gauge",
        "For how long the oldest of it has been waiting; 0 when nothing waits.",
        (_KIND,),
        example='flip_outbox_oldest_age_seconds{kind="status"} > 300',
    ),
    Metric(
        "flip_ledger_writable",
        "gauge",
        "1 while the ledger can be read and written, otherwise 0.",
        example="flip_ledger_writable == 0",
    ),
    Metric(
        "flip_observer_loop_last_success_timestamp_seconds",
        "gauge",
        "When a loop of the observer last went through without an error.",
        (Label("loop"),),
        example="time() - flip_observer_loop_last_success_timestamp_seconds > 300",
    ),
    Metric(
        "flip_build_info",
        "gauge",
        "1; its labels say which versions run.",
        (Label("version"), Label("nvflare_version")),
        example="flip_build_info",
    ),
)

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in CATALOGUE}
BY_FACT: Mapping[str, Metric] = {metric.fact: metric for metric in CATALOGUE if metric.fact}
