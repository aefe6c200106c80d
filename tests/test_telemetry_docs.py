"""docs/telemetry.md is what the catalogues say. Run as a program, this writes it anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flip_observability import lifecycle, metrics
from flip_observability._catalogue import CATALOGUE, MAX_LABEL_CHARS, Label, Metric
from flip_observability.constants import FlareEvents, OwnEvents
from flip_observability.ledger import Ledger
from flip_observability.lifecycle import TABLE, Event, RunState, Transition
from flip_observability.settings import Settings
from history import Run

DOCUMENT = Path(__file__).parent.parent / "docs" / "telemetry.md"

INTRODUCTION = f"""\
# Telemetry

What can be asked of a server, in Prometheus and in the trace store. Names and labels are an interface: they change
only with a note in the changelog. This file is made from the catalogues of the source:
`.venv/bin/python tests/test_telemetry_docs.py`.

## Metrics

All come from the ledger. They survive restarts, crashes and retention, and count nothing twice; until an observer
that starts has counted what happened while none was there, `/metrics` answers 503. A ledger that is deleted is
another ledger: counters then begin at 0, as Prometheus expects of a restart.

- **Every series has `net_id`**, the FL network (`NET_ID`). What tells of one run has the network that the run was in.
- **Counters and histograms have no label for run, job or model.** Use the gauges whose names begin with `flip_run_`,
  or follow an exemplar. Every counter whose labels have known values is there from the start, at 0, so that
  `increase()` sees the first error too.
- **Exemplars** (OpenMetrics only, which Prometheus asks for by itself; start it with
  `--enable-feature=exemplar-storage`) are on histograms and on counters of failures. Their `trace_id` is the run's
  trace: **the run id without its hyphens**.
- **One series per run** is shown for runs without a final status (the {metrics.MAX_OPEN_RUNS} most recently active),
  for all that got one within {metrics.WINDOW_SECONDS / 3600:.0f} hours (the latest {metrics.MAX_FINISHED_RUNS:,}),
  and in any case for the latest `FLIP_METRICS_RECENT_RUNS`. They stay for a day after the run: ask for the status
  where only running ones are meant.
- **Label values are bounded.** Those from outside (clients, tasks) are cut to {MAX_LABEL_CHARS} printable characters,
  and kept up to a number that is named below; what comes later is counted as `other`. `unknown` is where nothing was
  given.
- **After an upgrade** totals stay. Where the buckets of a histogram have changed, what was counted in an old bucket
  is in the first new one that holds all of it. A metric that is no more stays in the ledger and is not shown.

"""

GROUPS = (
    ("What happened", lambda m: m.kind == "counter"),
    ("How long, how much", lambda m: m.kind == "histogram"),
    ("One run", lambda m: m.name.startswith("flip_run_")),
    ("Now", lambda m: True),
)

TRACES = """\
## Traces

One trace per run, and **its id is the run id without hyphens**: a job id pasted into Tempo or Jaeger finds the run.
Spans go where the standard `OTEL_EXPORTER_OTLP_ENDPOINT` points to; without it none are exported. Resource:
`service.name` is `flip-fl-server` unless it is set, `service.version`, `flip.net_id`. Calls of the hub and of the
bucket appear in the trace as client spans.

A span of what never came to its end is closed by what implies that: a round by the next one or the end of its
workflow, everything by the end of the run; and by the observer when the run's process died.

| event | told to the hub | in the trace |
| --- | --- | --- |
"""

ATTRIBUTES = {
    "flip.run_id": "the run; on every span",
    "flip.model_id": "the model at the Central Hub; on every span",
    "flip.job_id": "NVFLARE's job id; on `flip.run`",
    "flip.net_id": "the FL network; on `flip.run` and the resource",
    "flip.status": "the final status; on `flip.run`",
    "flip.workflow": "id of the workflow (controller)",
    "flip.round": "number of the round, from 1",
    "flip.total_rounds": "rounds that the workflow means to do",
    "flip.client": "name of the client",
    "flip.task": "name of the task",
    "flip.return_code": "what the client said of the task: `OK`, or why not (then the span's status is an error)",
    "flip.results.bytes": "size of the uploaded archive",
    "flip.results.files": "number of files in it",
    "flip.results.uri": "where it is",
    "exception.type": "class of the exception, or a word for the failure; the span's status is an error",
    "exception.message": "(and `exception.stacktrace`) only with `FLIP_CAPTURE_EXCEPTION_MESSAGES=true`: "
    "messages can hold patients' data",
}

BY_CODE = {
    FlareEvents.START_RUN.value: "`flip.run` begins",
    FlareEvents.START_WORKFLOW.value: "`flip.workflow` begins (also when another workflow's event comes first)",
    FlareEvents.AFTER_TASK_DATA_FILTER.value: "`flip.client_task` begins, one for each task id",
    FlareEvents.BEFORE_PROCESS_SUBMISSION.value: "`flip.client_task` ends",
    FlareEvents.FATAL_SYSTEM_ERROR.value: "event `fatal_error` on `flip.run`, whose status is an error",
    "_aborted": "event `abort` on `flip.run`",
    "_results_upload_completed": "`flip.results_upload` ends",
    OwnEvents.UPLOAD_FAILED.value: "`flip.results_upload` ends with an error",
    FlareEvents.ABOUT_TO_END_RUN.value: "event `abort` on `flip.run`, when the abort signal is set",
    FlareEvents.END_RUN.value: "everything ends, `flip.run` last",
    OwnEvents.ORPHANED.value: "event `orphaned` on `flip.run`",
    OwnEvents.FINAL_STATUS.value: "everything ends, `flip.run` last",
    OwnEvents.STATUS.value: "",
}
"""What the table's functions do to spans beside its other columns."""

TOLD_BY_CODE = {
    FlareEvents.END_RUN.value: "the final status",
    OwnEvents.FINAL_STATUS.value: "the final status",
    OwnEvents.STATUS.value: "the status that the job's own code gave",
}


def document() -> str:
    """The document as it must be."""
    return "".join([INTRODUCTION, *_metrics(), TRACES, *_events(), *_attributes()])


def _metrics() -> Iterator[str]:
    shown: set[str] = set()
    for title, belongs in GROUPS:
        yield f"### {title}\n\n"
        for metric in CATALOGUE:
            if metric.name not in shown and belongs(metric):
                shown.add(metric.name)
                yield _metric(metric)


def _metric(metric: Metric) -> str:
    lines = [f"#### `{metric.name}`", "", f"*{metric.kind}.* {metric.help}", ""]
    lines += [f"- `{label.name}`: {_label(metric, label)}" for label in metric.labels]
    if metric.buckets:
        unit = metric.name.rsplit("_", 1)[1]
        lines.append(f"- buckets, in {unit}: {', '.join(f'{bound:,.12g}' for bound in metric.buckets)}")
    lines += [""] if metric.labels or metric.buckets else []
    return "\n".join([*lines, "```promql", metric.example, "```", "", ""])


def _label(metric: Metric, label: Label) -> str:
    values = ", ".join(f"`{value}`" for value in label.values)
    meanings = {
        "run_id": "NVFLARE's job id (in the simulator a new id)",
        "model_id": "the model at the Central Hub",
        "loop": "`heartbeat`, `fold`, `dispatcher`, `upkeep`, `sentinel`",
        "version": "of this package",
        "nvflare_version": "of NVFLARE",
        "status": "any status: `PENDING` of a queued job, …, the final ones",
    }
    if label.limit is not None:
        return f"up to {label.limit} different ones" + (f", among them {values}" if values else "")
    return values or meanings[label.name]


def _events() -> Iterator[str]:
    for name, row in TABLE.items():
        told = row.status.value if row.status else TOLD_BY_CODE.get(name, "")
        yield f"| `{name.lstrip('_')}` | {told} | {_spans(name, row)} |\n"
    yield (
        "\nNames of events are those of NVFLARE and FLIP without the leading underscore, as in\n"
        "`flip_lifecycle_events_total` and in the timeline of `flip-obs show`. A status that would take the hub\n"
        "backwards is recorded and not told.\n\n"
    )


def _spans(name: str, row: Transition) -> str:
    found = [f"`{span}` ends" for span in row.closes]
    found += [f"`{row.opens}` begins"] if row.opens else []
    found += [f"`{row.instant}`, without duration"] if row.instant else []
    found += [f"event on {', else '.join(f'`{span}`' for span in row.mark)}"] if row.mark else []
    found += [BY_CODE[name]] if BY_CODE.get(name) else []
    return "; ".join(found)


def _attributes() -> Iterator[str]:
    yield "### Attributes\n\n| attribute | meaning |\n| --- | --- |\n"
    for name, meaning in ATTRIBUTES.items():
        yield f"| `{name}` | {meaning} |\n"
    yield (
        "\nThat is all of our own spans; client spans of hub and bucket carry those of OpenTelemetry's conventions.\n"
        "File contents, accession numbers and patient identifiers are never recorded, messages and stack traces of\n"
        "exceptions only where it says so above.\n"
    )


def test_the_document_is_what_the_catalogues_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run: .venv/bin/python tests/test_telemetry_docs.py"


def test_every_metric_has_one_section() -> None:
    text = document()
    assert all(text.count(f"#### `{metric.name}`\n") == 1 for metric in CATALOGUE)


def test_every_attribute_is_explained() -> None:
    assert set(lifecycle._SPAN_ATTRIBUTES.values()) <= set(ATTRIBUTES)


def test_every_span_of_a_run_is_in_the_table(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        run = Run(ledger)
        run.train({"site-1": 1.0})
        run.at(run.now, FlareEvents.BEFORE_AGGREGATION)
        run.at(run.now, FlareEvents.BEFORE_LEARNABLE_PERSIST)
        run.finish()
        state, text = RunState(run.run_id), document()
        rows = ledger.events(run.run_id)
    spans = [span.name for row in rows for span in state.apply(Event(row["name"], row["time"], row["attrs"])).spans]
    assert {"flip.run", "flip.round", "flip.client_task", "flip.aggregation", "flip.initial_model_loaded"} < set(spans)
    assert all(f"`{name}`" in text for name in spans)


@pytest.mark.parametrize("name", sorted(BY_CODE))
def test_what_is_said_beside_the_table_belongs_to_it(name: str) -> None:
    assert TABLE[name].then is not None or name == FlareEvents.START_WORKFLOW


def test_every_row_says_something() -> None:
    silent = {name for name, row in TABLE.items() if not (_spans(name, row) or row.status or name in TOLD_BY_CODE)}
    assert silent == set()


def test_settings_that_are_named_exist() -> None:
    aliases = {field.alias for field in Settings.model_fields.values()}
    assert {"FLIP_METRICS_RECENT_RUNS", "NET_ID", "FLIP_CAPTURE_EXCEPTION_MESSAGES"} <= aliases


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
