"""FLIP run: one run from start to end."""

from __future__ import annotations

from grafana_foundation_sdk.builders import tempo
from grafana_foundation_sdk.models import dashboard as models

from dashboards.grafana.parts import (
    AMBER,
    BLUE,
    GRAY,
    GREEN,
    RED,
    RUN,
    STATUSES,
    TEMPO,
    TEXT,
    TRACE_ID,
    AnyPanel,
    Column,
    Query,
    Section,
    board,
    data_sources,
    lines,
    link_to_trace,
    number,
    problem,
    ranking,
    rows,
    timeline,
    trace,
    variable,
)

NET = 'net_id="$net"'
THIS = f'{NET}, run_id="$run"'
ONE_AT_A_TIME = " Counted on this network in the time shown: a network does one run at a time."

CODES = {float(code): (status, colour) for code, (status, colour) in enumerate(STATUSES.items(), 1)}
"""A number for each status, so that a run's status is one lane over time and not one for each."""


def build() -> models.Dashboard:
    """The dashboard."""
    known = f'last_over_time(flip_run_last_event_timestamp_seconds{{{NET}, model_id=~"$model"}}[$__range])'
    seen = f"last_over_time(flip_run_last_event_timestamp_seconds{{{THIS}}}[$__range])"
    return board(
        RUN,
        "FLIP run",
        "One run from start to end: how far it is, who it waits for, and what became of its results.",
        [
            Section("How is it?", [*_numbers(), _status_over_time()]),
            Section("Rounds and clients", _rounds()),
            Section("Results and the Central Hub", [*_deliveries(), _problems()]),
            Section("Trace", [_trace()]),
        ],
        variables=[
            *data_sources(),
            variable(
                "net", "Network", "label_values(flip_build_info, net_id)", sort=models.VariableSort.ALPHABETICAL_ASC
            ),
            variable("model", "Model", f"label_values(flip_run_status{{{NET}}}, model_id)", with_all=True),
            # The run with the latest event comes first, and so is the one that is shown unless another was chosen.
            variable("run", "Run", f"query_result(sort_desc(max by (run_id) ({known})))", regex='/run_id="([^"]+)"/'),
            variable(
                "trace",
                "Trace",
                f"query_result(label_replace(max by (run_id) ({seen}), {TRACE_ID}))",
                regex='/trace_id="([0-9a-f]{32})"/',
                hidden=True,
            ),
        ],
        annotations=[
            problem("Fatal errors", "fatal_error|orphaned", RED, THIS),
            problem("Upload failures", "upload_failed|hub_rejected", AMBER, THIS),
            problem("Aborts", "aborted", "yellow", THIS),
        ],
        since="now-6h",
        refresh="10s",
    )


def _gauge(name: str) -> str:
    return f"max({name}{{{THIS}}})"


def _status() -> Query:
    each = " or ".join(
        f'{code:g} * (flip_run_status{{{THIS}, status="{status}"}} == 1)' for code, (status, _) in CODES.items()
    )
    return Query(f"max by (run_id) ({each})", legend="status")


def _numbers() -> list[AnyPanel]:
    silent = f"{_gauge('flip_run_last_event_timestamp_seconds')}"
    return [
        number(
            "Status",
            "The run's last status that is known.",
            _status(),
            unit="none",
            texts=CODES,
            span=5,
            background=True,
            links=[link_to_trace("Open the trace", "${trace}")],
        ),
        number(
            "Round",
            "The round that the run is in, or was in when it ended.",
            Query(_gauge("flip_run_round")),
            unit="none",
            span=3,
        ),
        number(
            "Rounds expected",
            "Rounds that the run's workflow means to do.",
            Query(_gauge("flip_run_rounds_expected")),
            unit="none",
            span=3,
        ),
        number(
            "Clients",
            "Clients that take part in the run.",
            Query(_gauge("flip_run_clients")),
            unit="none",
            span=3,
        ),
        number(
            "Results missing",
            "Clients whose result of the last finished round was not accepted: they failed or were too late.",
            Query(f"{_gauge('flip_run_clients')} - {_gauge('flip_run_round_results')}"),
            unit="none",
            steps=((None, GREEN), (1, AMBER)),
            span=3,
        ),
        number(
            "Last event",
            "When something last happened in the run.",
            Query(f"1000 * {silent}"),
            unit="dateTimeFromNow",
            span=4,
        ),
        number(
            "Stalled after",
            "A run in progress that is silent for longer than this counts as stalled: three times its median round,"
            " half an hour in round 1.",
            Query(_gauge("flip_run_stall_after_seconds")),
            unit="s",
            steps=((None, TEXT),),
            span=3,
        ),
    ]


def _status_over_time() -> AnyPanel:
    return timeline(
        "Status over time",
        "What the run's status was, as recorded on the server. Grey stretches without a name: nobody watched.",
        _status(),
        texts=CODES,
        height=4,
    )


def _rounds() -> list[AnyPanel]:
    task = f"flip_client_task_duration_seconds_%s{{{NET}}}"
    total, count = task % "sum", task % "count"
    buckets = "sum by (le) (rate({}_bucket{{" + NET + "}}[$__rate_interval]))"
    rounds = buckets.format("flip_round_duration_seconds")
    aggregation = buckets.format("flip_aggregation_duration_seconds")
    lately = (
        f"sum by (client) (rate({total}[$__rate_interval])) / (sum by (client) (rate({count}[$__rate_interval])) > 0)"
    )
    anybody = f"sum by (le) (rate({task % 'bucket'}[$__rate_interval]))"
    round_mean = (
        f"sum(rate(flip_round_duration_seconds_sum{{{NET}}}[$__rate_interval]))"
        f" / (sum(rate(flip_round_duration_seconds_count{{{NET}}}[$__rate_interval])) > 0)"
    )
    mean = f"sum by (client) (increase({total}[$__range])) / (sum by (client) (increase({count}[$__range])) > 0)"
    return [
        lines(
            "Rounds",
            "The round that the run is in, and how many it means to do.",
            Query(_gauge("flip_run_round"), legend="round"),
            Query(_gauge("flip_run_rounds_expected"), legend="expected"),
            unit="none",
            steady=True,
            span=8,
            colours={"round": BLUE, "expected": GRAY},
        ),
        lines(
            "Results per round",
            "Results that were accepted in the last finished round, and the clients that take part. A gap between the"
            " lines is a client that failed or was too late.",
            Query(_gauge("flip_run_round_results"), legend="results"),
            Query(_gauge("flip_run_clients"), legend="clients"),
            unit="none",
            steady=True,
            span=8,
            colours={"results": GREEN, "clients": GRAY},
        ),
        lines(
            "How long rounds take",
            "The mean of the rounds, and what 95 % of rounds and aggregations were below. Dots are runs: they open the"
            " trace." + ONE_AT_A_TIME,
            Query(round_mean, legend="round, mean"),
            Query(f"histogram_quantile(0.95, {rounds})", legend="round, 95 %", exemplars=True),
            Query(f"histogram_quantile(0.95, {aggregation})", legend="aggregation, 95 %", exemplars=True),
            unit="s",
            span=8,
            colours={"round, mean": BLUE, "round, 95 %": GRAY},
        ),
        ranking(
            "Who is the straggler?",
            "Mean time from giving a client a task to having its result, the slowest first. A round lasts as long as"
            " its slowest client." + ONE_AT_A_TIME,
            Query(f"topk(15, {mean})", legend="{{client}}", instant=True),
            unit="s",
            steps=((None, BLUE),),
            span=8,
            height=9,
        ),
        lines(
            "How long clients take",
            "The mean of each client's tasks, and what 95 % of all were below. A client that climbs is about to hold up"
            " everybody. Dots are runs: they open the trace." + ONE_AT_A_TIME,
            Query(lately, legend="{{client}}"),
            Query(f"histogram_quantile(0.95, {anybody})", legend="95 % of all", exemplars=True),
            unit="s",
            span=16,
            height=9,
            colours={"95 % of all": GRAY},
        ),
    ]


def _deliveries() -> list[AnyPanel]:
    lag = f"sum by (le, kind) (rate(flip_hub_delivery_lag_seconds_bucket{{{NET}}}[$__rate_interval]))"
    upload = f"sum by (le) (rate(flip_results_upload_duration_seconds_bucket{{{NET}}}[$__rate_interval]))"
    return [
        lines(
            "What happens",
            "Lifecycle events that were recorded, per step of the graph." + ONE_AT_A_TIME,
            Query(
                f"sum by (event) (increase(flip_lifecycle_events_total{{{NET}}}[$__rate_interval])) > 0",
                legend="{{event}}",
            ),
            unit="none",
            bars=True,
        ),
        lines(
            "From event to hub, 95 %",
            "95 % of what the hub accepted had waited for less than this." + ONE_AT_A_TIME,
            Query(f"histogram_quantile(0.95, {lag})", legend="{{kind}}", exemplars=True),
            unit="s",
            steps=((None, GREEN), (60, AMBER), (300, RED)),
        ),
        lines(
            "Calls to the hub",
            "How they went." + ONE_AT_A_TIME,
            Query(
                f"sum by (kind, outcome) (increase(flip_hub_requests_total{{{NET}}}[$__rate_interval])) > 0",
                legend="{{kind}} {{outcome}}",
            ),
            unit="none",
            bars=True,
            span=8,
        ),
        lines(
            "Upload of results",
            "How long the upload took, at most for 95 %." + ONE_AT_A_TIME,
            Query(f"histogram_quantile(0.95, {upload})", legend="upload", exemplars=True),
            unit="s",
            span=8,
        ),
        lines(
            "Size of results",
            "Bytes that reached the bucket." + ONE_AT_A_TIME,
            Query(f"sum(increase(flip_results_upload_size_bytes_sum{{{NET}}}[$__rate_interval]))", legend="results"),
            unit="bytes",
            bars=True,
            span=8,
        ),
    ]


def _problems() -> AnyPanel:
    series = f"last_over_time(flip_run_problem_timestamp_seconds{{{THIS}}}[$__range])"
    return rows(
        "Problems",
        "What went wrong in the run, and when it was first seen. The trace and the log of the run say more.",
        Query(f"1000 * max by (kind) ({series})"),
        columns=[
            Column(
                "kind",
                "Problem",
                texts={
                    "fatal_error": RED,
                    "orphaned": RED,
                    "upload_failed": AMBER,
                    "hub_rejected": AMBER,
                    "aborted": "yellow",
                },
                width=200,
            ),
            Column("Value", "When", unit="dateTimeAsIso"),
        ],
        sort="When",
        height=5,
        none="Nothing went wrong.",
    )


def _trace() -> AnyPanel:
    return trace(
        "Trace of the run",
        "Every step of the run, with the calls to hub and bucket. A run's trace id is its run id without hyphens."
        " The root span arrives when the run has ended.",
        lambda: tempo.TempoQuery().ref_id("A").datasource(TEMPO).query_type("traceql").query("${trace}"),
    )
