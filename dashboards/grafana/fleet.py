"""FLIP fleet: is anything on fire, and where?"""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

from dashboards.grafana.parts import (
    AMBER,
    FAILED,
    FINAL,
    FLEET,
    GREEN,
    HEALTH,
    JOB,
    RED,
    RUN,
    STATUSES,
    TEXT,
    TRACE_ID,
    AnyPanel,
    Column,
    Query,
    Section,
    Steps,
    board,
    data_sources,
    lines,
    link_to,
    link_to_trace,
    number,
    problem,
    rows,
    variable,
)

NET = 'net_id=~"$net"'
RUNS = f'{NET}, model_id=~"$model"'
BY_RUN = "max by (net_id, run_id, model_id)"
DAY = 86_400

ONE_IS_TOO_MANY: Steps = ((None, GREEN), (1, RED))
A_LOOK: Steps = ((None, GREEN), (1, AMBER))
TO_HEALTH = link_to("Open FLIP observability health", HEALTH)


def build() -> models.Dashboard:
    """The dashboard."""
    return board(
        FLEET,
        "FLIP fleet",
        "Every FL network at a glance. Top row: all green means nobody has to get up.",
        [
            Section("Is anything on fire?", [*_fire(), _alerts()]),
            Section("Runs", [_runs(), *_counts()]),
            Section("Results and the Central Hub", _deliveries()),
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
            variable("model", "Model", f"label_values(flip_run_status{{{NET}}}, model_id)", multi=True, with_all=True),
        ],
        annotations=[
            problem("Fatal errors", "fatal_error|orphaned", RED, RUNS),
            problem("Upload failures", "upload_failed", AMBER, RUNS),
            problem("Aborts", "aborted", "yellow", RUNS),
        ],
    )


def _lately(series: str) -> str:
    """How many runs had this within a day before the end of the time shown; 0 when none."""
    return f"count((time() - {BY_RUN} ({series})) < {DAY}) or vector(0)"


def _fire() -> list[AnyPanel]:
    stalled = (
        f"count({BY_RUN} (time() - flip_run_last_event_timestamp_seconds{{{RUNS}}})"
        f" > {BY_RUN} (flip_run_stall_after_seconds{{{RUNS}}})"
        f' unless {BY_RUN} (flip_run_status{{{RUNS}, status=~"{FINAL}"}})) or vector(0)'
    )
    return [
        number(
            "Servers not seen",
            "Exporters that Prometheus cannot reach. While one is away nothing on its network is watched.",
            Query(f'count(up{{job="{JOB}"}} == 0) or vector(0)', instant=True),
            unit="none",
            steps=ONE_IS_TOO_MANY,
            links=[TO_HEALTH],
            background=True,
        ),
        number(
            "Runs failed, 24 h",
            "Runs that ended as ERROR or with a failed upload within a day before the end of the time shown.",
            Query(
                _lately(f'flip_run_final_status_timestamp_seconds{{{RUNS}, status=~"{FAILED}"}}'),
                instant=True,
            ),
            unit="none",
            steps=ONE_IS_TOO_MANY,
            background=True,
        ),
        number(
            "Runs orphaned, 24 h",
            "Runs whose process died without a final status, and which the observer had to end.",
            Query(_lately(f'flip_run_problem_timestamp_seconds{{{RUNS}, kind="orphaned"}}'), instant=True),
            unit="none",
            steps=ONE_IS_TOO_MANY,
            background=True,
        ),
        number(
            "Uploads failed, 24 h",
            "Runs whose results could not be stored. The results stay on the server, as long as NVFLARE keeps them.",
            Query(_lately(f'flip_run_problem_timestamp_seconds{{{RUNS}, kind="upload_failed"}}'), instant=True),
            unit="none",
            steps=ONE_IS_TOO_MANY,
            background=True,
        ),
        number(
            "Runs stalled now",
            "Runs in progress that have been silent for longer than three of their rounds (half an hour in round 1).",
            Query(stalled, instant=True),
            unit="none",
            steps=A_LOOK,
            background=True,
        ),
        number(
            "Hub waits for a status",
            "Age of the oldest status that the Central Hub has not accepted. Until a final one arrives, the hub gives"
            " the network no new job. Above 5 minutes: hub down, or key refused.",
            Query(f'max(flip_outbox_oldest_age_seconds{{{NET}, kind="status"}})', instant=True),
            unit="s",
            steps=((None, GREEN), (60, AMBER), (300, RED)),
            links=[TO_HEALTH],
            background=True,
        ),
        number(
            "Ledgers that cannot be written",
            "Servers on which events are kept in memory only. Disk full, read-only or damaged.",
            Query(f"count(flip_ledger_writable{{{NET}}} == 0) or vector(0)", instant=True),
            unit="none",
            steps=ONE_IS_TOO_MANY,
            links=[TO_HEALTH],
            background=True,
        ),
        number(
            "Runs active",
            "Runs that have begun and have no final status.",
            Query(f"sum(flip_runs_active{{{NET}}})", instant=True),
            unit="none",
            steps=((None, TEXT),),
        ),
    ]


def _alerts() -> AnyPanel:
    return rows(
        "Alerts that fire",
        "What Prometheus has raised at the end of the time shown, of all networks. Each alert names its runbook.",
        Query('max by (alertname, severity, net_id, run_id) (ALERTS{alertstate="firing", alertname=~"Flip.+"})'),
        columns=[
            Column(
                "severity",
                "Severity",
                texts={"page": RED, "critical": RED, "warning": AMBER, "info": "blue"},
                width=110,
            ),
            Column("alertname", "Alert"),
            Column("net_id", "Network"),
            Column("run_id", "Run", links=(_to_run(),)),
        ],
        sort="Severity",
        height=6,
        none="No alert fires.",
    )


def _to_run() -> models.DashboardLink:
    return link_to("Open this run", RUN, net="${__data.fields.Network}", run="${__data.fields.Run}")


def _runs() -> AnyPanel:
    status = f"{BY_RUN[:-1]}, status) (flip_run_status{{{RUNS}}} == 1)"
    age = f"time() - {BY_RUN} (flip_run_last_event_timestamp_seconds{{{RUNS}}})"
    return rows(
        "Latest runs",
        "Runs that are active or have ended lately, the latest event first. A click on the run opens its dashboard, one"
        " on its trace the spans.",
        Query(f"label_replace({status}, {TRACE_ID})"),
        Query(f"{BY_RUN} (flip_run_round{{{RUNS}}})"),
        Query(f"{BY_RUN} (flip_run_rounds_expected{{{RUNS}}})"),
        Query(f"{BY_RUN} (flip_run_clients{{{RUNS}}})"),
        Query(age),
        columns=[
            Column("status", "Status", texts=STATUSES, width=210),
            Column("net_id", "Network", width=110),
            Column("model_id", "Model"),
            Column("run_id", "Run", links=(_to_run(),)),
            Column("Value #B", "Round", unit="none", width=80),
            Column("Value #C", "of", unit="none", width=60),
            Column("Value #D", "Clients", unit="none", width=80),
            Column("Value #E", "Last event ago", unit="s", width=130),
            Column("trace_id", "Trace", links=(link_to_trace("Open the trace", "${__data.fields.Trace}"),)),
        ],
        sort="Last event ago",
        none="No run is active, and none has ended lately.",
    )


def _counts() -> list[AnyPanel]:
    finished = f"flip_runs_finished_total{{{NET}}}"
    failed = f'flip_runs_finished_total{{{NET}, status=~"{FAILED}"}}'
    return [
        lines(
            "Runs active over time",
            "Runs in progress on each network.",
            Query(f"sum by (net_id) (flip_runs_active{{{NET}}})", legend="{{net_id}}"),
            unit="none",
            steady=True,
            span=8,
        ),
        lines(
            "Runs finished",
            "Runs that ended, by final status, per step of the graph.",
            Query(f"sum by (status) (increase({finished}[$__rate_interval])) > 0", legend="{{status}}"),
            unit="none",
            bars=True,
            colours=STATUSES,
            span=8,
        ),
        number(
            "Failure rate",
            "Share of the runs that ended in the time shown which failed. A run that a person stopped is no failure.",
            Query(f"sum(increase({failed}[$__range])) / (sum(increase({finished}[$__range])) > 0)", instant=True),
            unit="percentunit",
            steps=((None, GREEN), (0.1, AMBER), (0.25, RED)),
            span=4,
            height=8,
            none="no run ended",
        ),
        number(
            "Median run",
            "Half of the runs that ended in the time shown took less than this, from first event to final status.",
            Query(
                f"histogram_quantile(0.5, sum by (le) (increase(flip_run_duration_seconds_bucket{{{NET}}}[$__range])))",
                instant=True,
            ),
            unit="s",
            span=4,
            height=8,
            none="no run ended",
        ),
    ]


def _deliveries() -> list[AnyPanel]:
    lag = f"sum by (le, kind) (rate(flip_hub_delivery_lag_seconds_bucket{{{NET}}}[$__rate_interval]))"
    duration = f"sum by (le) (rate(flip_run_duration_seconds_bucket{{{NET}}}[$__rate_interval]))"
    upload = f"sum by (le) (rate(flip_results_upload_duration_seconds_bucket{{{NET}}}[$__rate_interval]))"
    return [
        lines(
            "Waiting for the hub",
            "Messages in the outbox. Statuses go ahead of all others.",
            Query(f"sum by (kind) (flip_outbox_pending{{{NET}}})", legend="{{kind}}"),
            unit="none",
            steady=True,
        ),
        lines(
            "From event to hub, 95 %",
            "95 % of what the hub accepted had waited for less than this. The dots are runs: they open the trace.",
            Query(f"histogram_quantile(0.95, {lag})", legend="{{kind}}", exemplars=True),
            unit="s",
            steps=((None, GREEN), (60, AMBER), (300, RED)),
        ),
        lines(
            "Problems",
            "What went wrong, per step of the graph.",
            Query(f"sum(increase(flip_fatal_errors_total{{{NET}}}[$__rate_interval]))", legend="fatal error"),
            Query(f"sum(increase(flip_orphaned_runs_total{{{NET}}}[$__rate_interval]))", legend="orphaned"),
            Query(f"sum(increase(flip_aborts_total{{{NET}}}[$__rate_interval]))", legend="aborted"),
            Query(
                f"sum by (reason) (increase(flip_results_upload_failures_total{{{NET}}}[$__rate_interval]))",
                legend="upload: {{reason}}",
            ),
            unit="none",
            bars=True,
            colours={"fatal error": RED, "orphaned": "dark-red", "aborted": "yellow"},
        ),
        lines(
            "Runs and their uploads, 95 %",
            "95 % of the runs, and of the uploads, took less than this. The dots are runs: they open the trace.",
            Query(f"histogram_quantile(0.95, {duration})", legend="run", exemplars=True),
            Query(f"histogram_quantile(0.95, {upload})", legend="upload", exemplars=True),
            unit="s",
        ),
        lines(
            "Results stored",
            "Bytes of results that reached the bucket, per step of the graph.",
            Query(
                f"sum by (net_id) (increase(flip_results_upload_size_bytes_sum{{{NET}}}[$__rate_interval]))",
                legend="{{net_id}}",
            ),
            unit="bytes",
            bars=True,
        ),
        lines(
            "Calls to the hub",
            "How they went. “retried” means that the hub was away, ill or refused the key; “rejected” that it will"
            " never take this message.",
            Query(
                f"sum by (outcome) (increase(flip_hub_requests_total{{{NET}}}[$__rate_interval]))", legend="{{outcome}}"
            ),
            unit="none",
            bars=True,
            colours={"delivered": GREEN, "retried": AMBER, "rejected": RED, "expired": "dark-red"},
        ),
    ]
