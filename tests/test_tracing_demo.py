"""The traces of the demo's scenarios, as they came in over real OTLP from real jobs."""

from __future__ import annotations

from typing import Any

import pytest

from demo_runs import CANARY, DemoRuns
from flip_observability.demo.scenarios import SCENARIOS
from flip_observability.ledger import Ledger
from otlp_sink import CLIENT, ERROR, check_trace

pytestmark = pytest.mark.nvflare_job


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_every_run_is_one_complete_trace(scenario: str, demo_runs: DemoRuns) -> None:
    run = demo_runs[scenario]
    root = check_trace(run.spans, run.run_id)
    with Ledger(demo_runs.ledger, read_only=True) as ledger:
        row: dict[str, Any] = ledger.run(run.run_id) or {}
    assert root.attributes["flip.status"] == row["final_status"] == run.statuses[-1]
    assert root.attributes["flip.model_id"] == run.model_id
    assert (root.status == ERROR) == (row["final_status"] == "ERROR")
    assert all(span.attributes["flip.run_id"] == run.run_id for span in run.spans if span.kind != CLIENT)
    assert {span.resource["service.name"] for span in run.spans} == {"flip-fl-server"}


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_the_hub_was_told_in_that_trace(scenario: str, demo_runs: DemoRuns) -> None:
    run = demo_runs[scenario]
    seen = [record.headers.get("traceparent", "").split("-") for record in run.evidence.hub if record.accepted]
    assert seen
    assert {parts[1] for parts in seen} == {run.run_id.replace("-", "")}
    assert {parts[2] for parts in seen} <= {span.span_id for span in run.spans if span.kind == CLIENT}


def test_rounds_clients_and_the_upload_are_there(demo_runs: DemoRuns) -> None:
    spans = demo_runs["success"].spans
    rounds = {span.span_id: span for span in spans if span.name == "flip.round"}
    tasks = [span for span in spans if span.name == "flip.client_task"]
    assert len(tasks) == 3 * len(rounds) > 0
    assert {span.parent_id for span in tasks} == set(rounds)
    uploads = [span for span in spans if span.name == "flip.results_upload"]
    assert len(uploads) == 1
    assert {span.parent_id for span in spans if span.name.startswith("S3.")} == {uploads[0].span_id}


def test_no_secret_is_in_any_span(demo_runs: DemoRuns) -> None:
    assert CANARY not in repr([run.spans for run in demo_runs])
