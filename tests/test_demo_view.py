"""What the demo shows: whole on a terminal, line by line elsewhere, and never what a terminal would obey."""

from __future__ import annotations

import io
import uuid
from pathlib import Path

import pytest
from rich.console import Console

from flip_observability.constants import FlareEvents, FlipEvents
from flip_observability.demo.bucket import BucketRecord
from flip_observability.demo.hub import HubRecord
from flip_observability.demo.scenarios import GLOBAL_ACCURACY, SCENARIOS
from flip_observability.demo.view import Glance, LedgerReader, Summary, View, summarise, upload_progress
from flip_observability.ledger import Ledger
from flip_observability.recorder import RunIdentity, RunRecorder
from flip_observability.settings import Settings

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"
HUB = [HubRecord(1.0, "PUT", "/x", 200, "status", MODEL, "TRAINING_STARTED")]


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger with a run in its second round."""
    for name in ("FLIP_OBSERVABILITY_DIR", "FLIP_API_INTERNAL_URL"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "ledger"
    identity = RunIdentity(str(uuid.uuid4()), "simulate_job", MODEL)
    recorder = RunRecorder(identity, Settings(LOCAL_DEV=True), folder)
    recorder.record(FlareEvents.START_RUN.value)
    recorder.record(FlipEvents.TRAINING_INITIATED.value)
    recorder.record(FlareEvents.TRAINING_STARTED.value)
    for number in (1, 2):
        recorder.record(FlareEvents.ROUND_STARTED.value, {"round": number, "total_rounds": 5})
        task = {"client": "site-1\x1b[2J", "task": "train", "task_id": f"t{number}"}
        recorder.record(FlareEvents.AFTER_TASK_DATA_FILTER.value, task)
        recorder.record(FlareEvents.BEFORE_PROCESS_SUBMISSION.value, {**task, "return_code": "OK"})
        payload = {"client": "server", "label": GLOBAL_ACCURACY, "value": 0.5 + number / 10, "round": number}
        recorder.post("metric", MODEL, payload, False)
    recorder.close()
    return folder


def test_the_reader_tells_nothing_before_there_is_something(tmp_path: Path) -> None:
    with LedgerReader(tmp_path / "none", MODEL) as reader:
        assert reader.read() == (None, {})
        assert not (tmp_path / "none").exists()
    with Ledger(tmp_path / "empty"), LedgerReader(tmp_path / "empty", MODEL) as reader:
        assert reader.read() == (None, {})


def test_the_reader_finds_run_and_accuracy(ledger: Path) -> None:
    with LedgerReader(ledger, MODEL) as reader:
        report, accuracy = reader.read()
    assert report is not None
    assert [(item.round, item.state) for item in report.rounds] == [(1, "done"), (2, "open")]
    assert accuracy == {1: 0.6, 2: 0.7}


@pytest.mark.parametrize("terminal", [True, False])
def test_shows_rounds_sites_and_hub(ledger: Path, terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    view = View(console, SCENARIOS["success"])
    with LedgerReader(ledger, MODEL) as reader, view.shown():
        report, accuracy = reader.read()
        assert report is not None
        for _ in range(2):
            view.update(Glance(report, accuracy, HUB, True, ()))
        view.say("the hub is down")
    text = out.getvalue()
    for expected in (report.run.run_id, "0.600", "site-1\\x1b[2J", "TRAINING_STARTED", "the hub is down"):
        assert expected in text
    assert "\x1b[2J" not in text
    if not terminal:
        assert text.count("round 1:") == 1
        assert "round 2:" not in text


def test_upload_progress_by_the_buckets_records() -> None:
    create = BucketRecord(1, "POST", "k", "create_upload", 0, 200)
    part = BucketRecord(2, "PUT", "k", "part", 2048, 200)
    done = BucketRecord(3, "POST", "k", "complete_upload", 10, 200)
    assert upload_progress([]) == "nothing yet"
    assert "1 parts, 2.0 KiB" in upload_progress([create, part])
    assert upload_progress([create, part, done]).startswith("archive complete")
    assert "403" in upload_progress([BucketRecord(1, "POST", "k", "create_upload", 0, 403)])


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=str)
def test_summary_says_all_and_what_to_do_next(scenario: object, terminal: bool, tmp_path: Path) -> None:
    chosen = next(item for item in SCENARIOS.values() if item == scenario)
    summary = Summary(
        scenario=chosen,
        run_id="ad178c76-b1e2-4134-814a-7fadfb1f99a2",
        statuses=["INITIATED", "TRAINING_STARTED"],
        uri="s3://flip-results/demo/x.zip",
        size=4096,
        checksum="CRC32 KhmpkQ==",
        copy=Path("copy.zip"),
        ledger=Path("led"),
        log=Path("job.log"),
        differences=["the hub holds no final status"],
    )
    out = io.StringIO()
    summarise(Console(file=out, force_terminal=terminal, width=200, color_system=None), summary)
    text = out.getvalue()
    wanted = [summary.run_id, summary.uri, summary.checksum, "4096 bytes", "INITIATED → TRAINING_STARTED"]
    wanted += [
        "flip-obs --dir led runs",
        "flip-obs --dir led show ad178c76",
        "flip-obs --dir led serve",
        "differs: the hub holds no final status",
    ]
    wanted.append("results upload" if chosen.refusing else "make demo ARGS=")
    for expected in wanted:
        assert expected in text
