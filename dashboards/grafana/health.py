"""FLIP observability health: can what the other dashboards say be believed?"""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

from dashboards.grafana.parts import (
    AMBER,
    GREEN,
    HEALTH,
    JOB,
    RED,
    AnyPanel,
    Column,
    Query,
    Section,
    board,
    data_sources,
    lines,
    number,
    rows,
    timeline,
    variable,
)

NET = 'net_id=~"$net"'
UP = f'job="{JOB}"'
YES_NO = {1.0: ("yes", GREEN), 0.0: ("NO", RED)}
LOOP_STEPS = ((None, GREEN), (120.0, AMBER), (300.0, RED))


def build() -> models.Dashboard:
    """The dashboard."""
    return board(
        HEALTH,
        "FLIP observability health",
        "The observers themselves: exporter, ledger, outbox, loops, collector. When this is red, what the other"
        " dashboards show may be old.",
        [
            Section("Exporter and ledger", [*_now(), *_exporter()]),
            Section("Loops and errors", _loops()),
            Section("Outbox and Central Hub", _outbox()),
            Section("Collector", _collector()),
        ],
        variables=[
            *data_sources(),
            variable(
                "net",
                "Network",
                "label_values(flip_build_info, net_id)",
                multi=True,
                with_all=True,
                sort=models.VariableSort.ALPHABETICAL_ASC,
            ),
        ],
        since="now-6h",
    )


def _now() -> list[AnyPanel]:
    return [
        number(
            "Exporters up",
            "Share of the exporters that Prometheus reaches.",
            Query(f"avg(up{{{UP}}})", instant=True),
            unit="percentunit",
            steps=((None, RED), (1, GREEN)),
            span=6,
            none="no exporter is scraped",
            background=True,
        ),
        number(
            "Ledger writable",
            "Whether events and statuses get to the disk, on every server shown. NO: disk full, read-only or damaged;"
            " statuses still go to the hub, from memory.",
            Query(f"min(flip_ledger_writable{{{NET}}})", instant=True),
            unit="none",
            texts=YES_NO,
            span=6,
            background=True,
        ),
        number(
            "Slowest loop",
            "How long ago the loop that is furthest behind last went through without an error.",
            Query(f"max(time() - flip_observer_loop_last_success_timestamp_seconds{{{NET}}})", instant=True),
            unit="s",
            steps=LOOP_STEPS,
            span=6,
            background=True,
        ),
        number(
            "Errors of our own, in the time shown",
            "Errors in observing, which did not harm a run. The log of the server says more; so does flip-obs doctor.",
            Query(f"sum(increase(flip_observability_errors_total{{{NET}}}[$__range]))", instant=True),
            unit="none",
            steps=((None, GREEN), (1, AMBER)),
            span=6,
            background=True,
        ),
    ]


def _exporter() -> list[AnyPanel]:
    return [
        timeline(
            "Exporter reached",
            "Whether Prometheus could scrape each exporter.",
            Query(f"max by (instance) (up{{{UP}}})", legend="{{instance}}"),
            texts={1.0: ("up", GREEN), 0.0: ("DOWN", RED)},
            span=12,
            height=6,
        ),
        timeline(
            "Ledger writable over time",
            "Whether each server could write its ledger.",
            Query(f"min by (net_id) (flip_ledger_writable{{{NET}}})", legend="{{net_id}}"),
            texts=YES_NO,
            span=12,
            height=6,
        ),
        lines(
            "How long a scrape takes",
            "Time that Prometheus waited for the page of metrics.",
            Query(f"max by (instance) (scrape_duration_seconds{{{UP}}})", legend="{{instance}}"),
            unit="s",
            span=8,
        ),
        lines(
            "Samples in a scrape",
            "Size of the page of metrics. It is bounded: it must level off, whatever the number of runs and clients.",
            Query(f"max by (instance) (scrape_samples_scraped{{{UP}}})", legend="{{instance}}"),
            unit="none",
            span=8,
        ),
        rows(
            "Versions",
            "Which versions of this package and of NVFLARE each observer runs.",
            Query(f"max by (net_id, instance, version, nvflare_version) (flip_build_info{{{NET}}})"),
            columns=[
                Column("net_id", "Network"),
                Column("instance", "Exporter"),
                Column("version", "flip-observability"),
                Column("nvflare_version", "NVFLARE"),
            ],
            sort="Network",
            span=8,
            height=8,
        ),
    ]


def _loops() -> list[AnyPanel]:
    return [
        lines(
            "Age of each loop's last success",
            "fold counts what has happened, dispatcher speaks to the hub, sentinel looks for dead runs. Above 5 minutes"
            " one is stuck.",
            Query(
                f"max by (net_id, loop) (time() - flip_observer_loop_last_success_timestamp_seconds{{{NET}}})",
                legend="{{net_id}} {{loop}}",
            ),
            unit="s",
            steps=LOOP_STEPS,
        ),
        lines(
            "Errors by component",
            "Errors in observing, per step of the graph.",
            Query(
                f"sum by (component) (increase(flip_observability_errors_total{{{NET}}}[$__rate_interval]))",
                legend="{{component}}",
            ),
            unit="none",
            bars=True,
        ),
        lines(
            "Lifecycle events",
            "Events counted per second. Nothing while runs are active means that the fold is behind.",
            Query(
                f"sum by (net_id) (rate(flip_lifecycle_events_total{{{NET}}}[$__rate_interval]))", legend="{{net_id}}"
            ),
            unit="ops",
        ),
        lines(
            "Runs started",
            "Runs that began, per step of the graph.",
            Query(
                f"sum by (net_id) (increase(flip_runs_started_total{{{NET}}}[$__rate_interval]))", legend="{{net_id}}"
            ),
            unit="none",
            bars=True,
        ),
    ]


def _outbox() -> list[AnyPanel]:
    lag = f"sum by (le, kind) (rate(flip_hub_delivery_lag_seconds_bucket{{{NET}}}[$__rate_interval]))"
    return [
        lines(
            "Messages that wait",
            "What the Central Hub must still be told.",
            Query(f"sum by (net_id, kind) (flip_outbox_pending{{{NET}}})", legend="{{net_id}} {{kind}}"),
            unit="none",
            steady=True,
        ),
        lines(
            "Age of the oldest message",
            "For how long the oldest message has been waiting. Above 5 minutes: hub down, or key refused.",
            Query(f"max by (net_id, kind) (flip_outbox_oldest_age_seconds{{{NET}}})", legend="{{net_id}} {{kind}}"),
            unit="s",
            steps=((None, GREEN), (60, AMBER), (300, RED)),
        ),
        lines(
            "Calls to the hub by outcome",
            "delivered; retried (hub away or ill, or key refused); rejected (never to be taken); expired (given up).",
            Query(f"sum by (outcome) (rate(flip_hub_requests_total{{{NET}}}[$__rate_interval]))", legend="{{outcome}}"),
            unit="reqps",
            colours={"delivered": GREEN, "retried": AMBER, "rejected": RED, "expired": "dark-red"},
        ),
        lines(
            "Delivery lag",
            "From an event to the hub's acceptance: half, and 95 % of the messages, were faster.",
            Query(f"histogram_quantile(0.5, {lag})", legend="{{kind}}, half"),
            Query(f"histogram_quantile(0.95, {lag})", legend="{{kind}}, 95 %", exemplars=True),
            unit="s",
        ),
    ]


def _otel(name: str) -> str:
    """The rate of a counter of the collector's own, whose name ends in ``_total`` or not, by its configuration."""
    return f'rate({{__name__=~"otelcol_{name}(_total)?"}}[$__rate_interval])'


def _collector() -> list[AnyPanel]:
    return [
        lines(
            "Spans in and out",
            "Spans that the OpenTelemetry collector took, and gave to the trace store. What goes in must come out.",
            Query(f"sum({_otel('receiver_accepted_spans')})", legend="taken"),
            Query(f"sum({_otel('exporter_sent_spans')})", legend="given on"),
            unit="cps",
        ),
        lines(
            "Spans lost",
            "Spans that the collector refused, or could not give on: traces have holes then.",
            Query(f"sum({_otel('receiver_refused_spans')})", legend="refused"),
            # The collector has no series for this before it happens for the first time.
            Query(
                f"sum({_otel('exporter_send_failed_spans')}) or 0 * sum({_otel('receiver_accepted_spans')})",
                legend="not given on",
            ),
            unit="cps",
            colours={"refused": RED, "not given on": "dark-red"},
        ),
        lines(
            "Queue to the trace store",
            "How full the collector's queue is. At 100 % spans are lost.",
            Query(
                "max by (exporter) (otelcol_exporter_queue_size / (otelcol_exporter_queue_capacity > 0))",
                legend="{{exporter}}",
            ),
            unit="percentunit",
            steps=((None, GREEN), (0.7, AMBER), (1, RED)),
        ),
        lines(
            "Memory",
            "Resident memory of the collector.",
            Query('max by (instance) ({__name__=~"otelcol_process_memory_rss(_bytes)?"})', legend="{{instance}}"),
            unit="bytes",
        ),
    ]
