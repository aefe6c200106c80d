"""The alerts, as one table; ``python -m dashboards.prometheus.alerts`` writes it as ``flip-alerts.yml``.

Two kinds, each with its pattern written once:

A **moment** happened: a run failed. It must page once, whatever was down at that moment, so it rests on a timestamp
that the exporter goes on to serve and on what Prometheus had already heard (:func:`heard_first`). Such an alert is
active for a quarter of an hour and means nothing when it ends: its receivers do not send "resolved".

A **condition** lasts: the hub does not answer. While the exporter is down nobody knows better than what it said last,
so an alert neither ends nor begins by its restart (:func:`last_known`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

RULES = Path(__file__).with_name("flip-alerts.yml")
JOB = "flip-observability"
"""The scrape job of the exporters: ``up`` of this job says whether they live."""

# Where links lead: external labels of Prometheus, which prometheus.yml sets and keeps out of what it sends.
GRAFANA = ("flip_grafana_url", "http://localhost:3000")
RUNBOOKS = ("flip_runbook_url", "docs/runbooks.md")
TRACES = "flip_trace_url"
"""External label with the address that a trace id is appended to, for a trace store that Grafana does not show."""

RUN_LABELS = "net_id, run_id, model_id"
OBSERVER_LABELS = "net_id, instance"


def heard_first(series: str) -> str:
    """Active for 15 minutes from when Prometheus first hears of a timestamp that is less than a day old.

    Not again after a restart or downtime of the exporter (the second half knows it), nor for all that happened before
    Prometheus began to look. Without ``instance``: the same run served by another exporter is the same run.
    """
    latest, before = (
        f"max by ({RUN_LABELS}) (\n    last_over_time({series}[{window})\n  )" for window in ("15m]", "1d] offset 15m")
    )
    return f"(\n  time() - {latest} < 86400\n)\nunless\n  {before}\n"


def last_known(condition: str) -> str:
    """Active while the last verdict of the past 45 minutes was yes. ``condition`` compares with ``bool``."""
    indented = condition.replace("\n", "\n  ")
    return f"last_over_time((\n  {indented}\n)[45m:1m]) == 1\n"


def unfinished(expression: str) -> str:
    """Only for runs without a final status: the series of a finished run stay for a day."""
    return (
        f"(\n{expression})\nunless on (net_id, run_id)\n"
        "  last_over_time(flip_run_final_status_timestamp_seconds[45m])\n"
    )


def each(labels: str, series: str, function: str = "max") -> str:
    """One value for each combination of ``labels``."""
    return f"{function} by ({labels}) ({series})"


@dataclass(frozen=True)
class Alert:
    """One alert.

    Args:
        name: also the anchor in the runbooks.
        severity: ``critical`` calls a person, ``warning`` waits for office hours, ``info`` is kept.
        lasts: ``moment`` or ``condition``.
        expr: PromQL.
        summary: what is wrong, in one line, for somebody who was asleep a minute ago.
        description: what it means and what to look at first.
        dashboard: uid of the dashboard to open.
        of_run: its labels name a run.
        hold: how long ``expr`` must hold (``for``).
    """

    name: str
    severity: str
    lasts: str
    expr: str
    summary: str
    description: str
    dashboard: str = "flip-health"
    of_run: bool = False
    hold: str | None = None

    def rule(self) -> dict[str, Any]:
        """As Prometheus reads it."""
        rule: dict[str, Any] = {"alert": self.name, "expr": self.expr}
        if self.hold is not None:
            rule["for"] = self.hold
        rule["labels"] = {"severity": self.severity, "lasts": self.lasts}
        rule["annotations"] = {
            "summary": self.summary,
            "description": self.description,
            "runbook_url": f"{_external(*RUNBOOKS)}#{self.name.lower()}",
            "dashboard_url": f"{_external(*GRAFANA)}/d/{self.dashboard}{_variables(self.of_run)}",
        }
        if self.of_run:
            rule["annotations"]["trace_url"] = _trace_url()
        return rule


def _external(label: str, otherwise: str) -> str:
    return f"{{{{ with $externalLabels.{label} }}}}{{{{ . }}}}{{{{ else }}}}{otherwise}{{{{ end }}}}"


def _variables(of_run: bool) -> str:
    labels = {"var-net": "net_id"}
    if of_run:
        labels |= {"var-model": "model_id", "var-run": "run_id"}
    values = [f"{variable}={{{{ $labels.{label} | urlquery }}}}" for variable, label in labels.items()]
    return "?" + "&".join([*values, "from=now-24h", "to=now"])


def _trace_url() -> str:
    """The trace of a run has the run's id, without the hyphens."""
    source = {"type": "tempo", "uid": "tempo"}
    query = {"refId": "A", "datasource": source, "queryType": "traceql", "query": "TRACE"}
    panes = json.dumps({"trace": {"datasource": "tempo", "queries": [query]}}, separators=(",", ":"))
    trace_id = '{{ reReplaceAll "-" "" $labels.run_id | urlquery }}'
    explore = f"{_external(*GRAFANA)}/explore?schemaVersion=1&orgId=1&panes={quote(panes)}".replace("TRACE", trace_id)
    return f"{{{{ with $externalLabels.{TRACES} }}}}{{{{ . }}}}{trace_id}{{{{ else }}}}{explore}{{{{ end }}}}"


_FINAL = "flip_run_final_status_timestamp_seconds"
_PROBLEM = "flip_run_problem_timestamp_seconds"
_RUN = "Model {{ $labels.model_id }}, run {{ $labels.run_id }}, net {{ $labels.net_id }}. "
_CAUSES = (
    f'{{{{ with printf "max by (kind) (last_over_time({_PROBLEM}{{net_id=%q,run_id=%q}}[15m]))"'
    " $labels.net_id $labels.run_id | query }}Known of it: "
    "{{ range $i, $problem := . }}{{ if $i }}, {{ end }}{{ $problem.Labels.kind }}{{ end }}. {{ end }}"
)
_SHOW = "flip-obs show {{ $labels.run_id }}"
_OBSERVER = "Net {{ $labels.net_id }}, observer {{ $labels.instance }}. "


def _problem(kind: str) -> str:
    return heard_first(f'{_PROBLEM}{{kind="{kind}"}}')


def _loop_stuck() -> str:
    """The sentinel may be sending a dead run's results, which takes as long as they are big."""
    late = []
    for selector, seconds in (('loop!="sentinel"', 300), ('loop="sentinel"', 3600)):
        series = f"flip_observer_loop_last_success_timestamp_seconds{{{selector}}}"
        late.append(f"time() - {each(f'{OBSERVER_LABELS}, loop', series)} > bool {seconds}")
    return last_known(f"{late[0]}\nor\n{late[1]}")


def _rose(series: str, label: str) -> str:
    """A counter that is higher than 15 minutes ago, or new and not 0: a first error can be in its first sample."""
    labels = f"{OBSERVER_LABELS}, {label}"
    before = each(labels, f"last_over_time({series}[1d] offset 15m)")
    now = each(labels, f"last_over_time({series}[15m])")
    return f"{now}\n>\n(\n  {before}\n  or\n  0 * {now}\n)\n"


def _observer_down() -> str:
    """``up`` does not know the net: what the exporter said while it lived does."""
    down = f'max by (instance) (up{{job="{JOB}"}}) == 0'
    known = f"0 * {each(OBSERVER_LABELS, 'last_over_time(flip_build_info[7d])')}"
    return (
        f"(\n  {known}\n  + on (instance) group_left ()\n  ({down})\n)\n"
        f'or on (instance)\n  ({down})\nor\n  absent(up{{job="{JOB}"}})\n'
    )


ALERTS: Mapping[str, tuple[Alert, ...]] = {
    "flip-runs": (
        Alert(
            "FlipRunFailed",
            "critical",
            "moment",
            heard_first(f'{_FINAL}{{status=~"ERROR|RESULTS_UPLOAD_FAILED"}}'),
            "FLIP run failed: model {{ $labels.model_id }} on net {{ $labels.net_id }}",
            f"{_RUN}It ended as failed. {_CAUSES}The whole story: {_SHOW}",
            dashboard="flip-run",
            of_run=True,
        ),
        Alert(
            "FlipRunOrphaned",
            "warning",
            "moment",
            _problem("orphaned"),
            "FLIP run's process died: model {{ $labels.model_id }} on net {{ $labels.net_id }}",
            f"{_RUN}Its job process went away before it could end the run (out of memory, killed, machine restarted). "
            f"The observer has ended it and saved what results there were. The whole story: {_SHOW}",
            dashboard="flip-run",
            of_run=True,
        ),
        Alert(
            "FlipResultsUploadFailed",
            "warning",
            "moment",
            _problem("upload_failed"),
            "FLIP results not uploaded: model {{ $labels.model_id }} on net {{ $labels.net_id }}",
            f"{_RUN}The results did not reach the bucket. They are still on the server, nothing is lost: mend the "
            "bucket, then flip-obs results upload {{ $labels.run_id }}",
            dashboard="flip-run",
            of_run=True,
        ),
        Alert(
            "FlipFatalError",
            "warning",
            "moment",
            _problem("fatal_error"),
            "FLIP run had a fatal error: model {{ $labels.model_id }} on net {{ $labels.net_id }}",
            f"{_RUN}NVFLARE reported a fatal system error; the run is about to end as failed. The whole story: {_SHOW}",
            dashboard="flip-run",
            of_run=True,
        ),
        Alert(
            "FlipHubRejected",
            "critical",
            "moment",
            _problem("hub_rejected"),
            "The FLIP hub refused a status of model {{ $labels.model_id }} on net {{ $labels.net_id }}",
            f"{_RUN}The Central Hub refused a status of this run for good. If that was its final status, the hub "
            "shows the model as running for ever and gives this net no further job. Which one, and why: "
            "flip-obs outbox list",
            dashboard="flip-run",
            of_run=True,
        ),
        Alert(
            "FlipRunAborted",
            "info",
            "moment",
            _problem("aborted"),
            "FLIP run was aborted: model {{ $labels.model_id }} on net {{ $labels.net_id }}",
            f"{_RUN}A person stopped it. Nothing to do.",
            dashboard="flip-run",
            of_run=True,
        ),
        Alert(
            "FlipRunStalled",
            "warning",
            "condition",
            unfinished(
                last_known(
                    f"time() - {each(f'{RUN_LABELS}, instance', 'flip_run_last_event_timestamp_seconds')}\n"
                    f"> bool {each(f'{RUN_LABELS}, instance', 'flip_run_stall_after_seconds')}"
                )
            ),
            "FLIP run makes no progress: model {{ $labels.model_id }} on net {{ $labels.net_id }}",
            f"{_RUN}It is not finished, and nothing has happened in it for much longer than its rounds take. A client "
            f"hangs, or is cut off. Which one owes a result: {_SHOW}",
            dashboard="flip-run",
            of_run=True,
        ),
        Alert(
            "FlipClientsMissing",
            "warning",
            "condition",
            unfinished(
                last_known(
                    f"{each(f'{RUN_LABELS}, instance', 'flip_run_round_results')}\n"
                    f"< bool {each(f'{RUN_LABELS}, instance', 'flip_run_clients')}"
                )
            ),
            "FLIP run trains without some clients: model {{ $labels.model_id }} on net {{ $labels.net_id }}",
            f"{_RUN}In the last finished round fewer clients returned a result than take part. The model learns "
            f"without their data. Which ones: {_SHOW}",
            dashboard="flip-run",
            of_run=True,
            hold="1m",
        ),
    ),
    "flip-observer": (
        Alert(
            "FlipHubUnreachable",
            "critical",
            "condition",
            last_known(f"{each(OBSERVER_LABELS, 'flip_outbox_oldest_age_seconds')} > bool 300"),
            "Messages to the FLIP hub have been waiting for over 5 minutes on net {{ $labels.net_id }}",
            f"{_OBSERVER}The Central Hub does not answer, refuses the key, or does not accept a final status. Nothing "
            "is lost, it is sent again until accepted; until then the hub's picture is old and finished runs block "
            "their net. Is the hub there: flip-obs doctor. What waits: flip-obs outbox list",
        ),
        Alert(
            "FlipHubRejectedDetails",
            "warning",
            "moment",
            _rose('flip_hub_requests_total{outcome="rejected", kind!="status"}', "kind"),
            "The FLIP hub refused some {{ $labels.kind }} messages on net {{ $labels.net_id }}",
            f"{_OBSERVER}The Central Hub refused messages of the kind {{{{ $labels.kind }}}} for good during the last "
            "15 minutes. Statuses are not among them: runs begin and end at the hub as they should, and only these "
            "details are missing there. Which ones, and why: flip-obs outbox list",
        ),
        Alert(
            "FlipLedgerUnwritable",
            "critical",
            "condition",
            last_known(f"{each(OBSERVER_LABELS, 'flip_ledger_writable', 'min')} == bool 0"),
            "FLIP's ledger cannot be written on net {{ $labels.net_id }}",
            f"{_OBSERVER}Disk full, read-only, or the file is damaged. Runs go on and statuses still go to the hub, "
            "but what happens now is not kept, and a run that dies now may not be noticed. "
            "What is wrong: flip-obs doctor",
            hold="1m",
        ),
        Alert(
            "FlipObservabilityErrors",
            "warning",
            "moment",
            _rose("flip_observability_errors_total", "component"),
            "FLIP's observability had errors in {{ $labels.component }} on net {{ $labels.net_id }}",
            f"{_OBSERVER}Errors of our own in {{{{ $labels.component }}}} during the last 15 minutes. Runs are not "
            "affected; something about them may be missing here. The server's log has the kind of error and where; "
            "flip-obs doctor looks for the cause.",
        ),
        Alert(
            "FlipObserverLoopStuck",
            "critical",
            "condition",
            _loop_stuck(),
            "FLIP's observer no longer does its {{ $labels.loop }} work on net {{ $labels.net_id }}",
            f"{_OBSERVER}The loop {{{{ $labels.loop }}}} has not succeeded for long, though the observer answers. "
            "Without fold the metrics are old, without dispatcher the hub hears nothing, without sentinel dead runs "
            "stay open. Why: flip-obs doctor, then restart it.",
            hold="1m",
        ),
        Alert(
            "FlipObserverDown",
            "critical",
            "condition",
            _observer_down(),
            "FLIP's observer {{ $labels.instance }} does not answer (net {{ $labels.net_id }})",
            f"{_OBSERVER}Nobody sees this server's runs fail, sends what the hub has not got, or ends runs whose "
            "process died. Runs themselves go on. Without a net and observer named here, Prometheus has no "
            f"target of the job {JOB} at all.",
            hold="5m",
        ),
        Alert(
            "Watchdog",
            "none",
            "condition",
            "vector(1)\n",
            "Always on: shows that alerts of FLIP get through",
            "When a receiver no longer hears this, Prometheus, Alertmanager or the way between is broken, and no other "
            "alert would arrive either.",
            dashboard="flip-fleet",
        ),
    ),
}
"""Rule group → its alerts."""

BY_NAME: Mapping[str, Alert] = {alert.name: alert for alerts in ALERTS.values() for alert in alerts}


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, so that a query can be read."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def render() -> str:
    """The rule file."""
    groups = [{"name": name, "rules": [alert.rule() for alert in alerts]} for name, alerts in ALERTS.items()]
    text: str = yaml.dump({"groups": groups}, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return f"# Written by `python -m {__spec__.name}` from the table there; edit that.\n{text}"


if __name__ == "__main__":
    RULES.write_text(render(), encoding="utf-8")
