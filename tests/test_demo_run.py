"""Every scenario of the demo as a real NVFLARE job, judged here once more by what the hub and the bucket hold."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from demo_runs import CANARY, DemoRun, DemoRuns, _forget, copy_ledger
from flip_observability.demo import runner
from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.demo.job import ROUNDS, has_lost_a_site, write_job
from flip_observability.demo.scenarios import GLOBAL_ACCURACY, MODEL_FILE, SCENARIOS
from flip_observability.demo.verdict import Evidence, judge
from flip_observability.ledger import Ledger
from history import Run
from otlp_sink import check_trace

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"


def metrics(evidence: Evidence, label: str) -> Counter[tuple[str, int]]:
    """How often the hub accepted a metric, by who sent it and round."""
    payloads = [r.payload for r in evidence.hub if r.kind == "metrics" and r.payload is not None]
    who = "trust" if evidence.contract == "2026-05" else "fl_client_name"
    rounds = "globalRound" if evidence.contract == "2026-05" else "global_round"
    return Counter((p[who], p[rounds]) for p in payloads if p["label"] == label)


def archive_of(run: DemoRun) -> zipfile.ZipFile:
    (found,) = run.evidence.archives
    assert found.key.startswith(f"demo/{run.model_id}/")
    assert run.archive is not None
    return zipfile.ZipFile(run.archive)


def files_with(secret: str, *folders: Path) -> list[Path]:
    """The files that hold a text, in themselves or in a member of an archive."""
    found = []
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        content = file.read_bytes()
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                content = b"".join(archive.read(name) for name in archive.namelist())
        if secret.encode() in content:
            found.append(file)
    return found


@pytest.mark.nvflare_job
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_hub_holds_what_the_scenario_must_give(demo_runs: DemoRuns, scenario: str) -> None:
    run = demo_runs[scenario]
    assert run.statuses == ["INITIATED", "TRAINING_STARTED", str(SCENARIOS[scenario].final)]
    assert {r.model_id for r in run.evidence.hub if r.kind == "status"} == {run.model_id}
    assert judge(SCENARIOS[scenario], run.evidence) == []


@pytest.mark.nvflare_job
def test_success(demo_runs: DemoRuns) -> None:
    run = demo_runs["success"]
    assert metrics(run.evidence, GLOBAL_ACCURACY) == {("server", number): 1 for number in range(1, ROUNDS + 1)}
    sites = {(f"Trust_{site}", number) for site in (1, 2, 3) for number in range(1, ROUNDS + 1)}
    assert metrics(run.evidence, "LOSS_FUNCTION").keys() == sites
    with archive_of(run) as archive:
        lines = [json.loads(line) for line in archive.read("global_metrics.jsonl").splitlines()]
        assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]
        assert lines[0]["accuracy"] < lines[-1]["accuracy"]
        assert lines[-1]["accuracy"] > 0.9
        with archive.open(MODEL_FILE) as file:
            assert np.load(io.BytesIO(file.read()))["weights"].shape == (31,)
        assert json.loads(archive.read("cross_site_val/cross_val_results.json")) == {}
    assert run.checksum.startswith("CRC32 ")
    assert run.run_id in run.output
    with Ledger(run.ledger_after, read_only=True) as ledger:
        row = ledger.run(run.run_id)
        assert row is not None
        assert (row["final_status"], row["results_uri"]) == ("RESULTS_UPLOADED", run.uri)
        assert [row for row in ledger.outbox() if row.state == "pending"] == []


@pytest.mark.nvflare_job
def test_no_secret_is_in_what_the_runs_leave(demo_runs: DemoRuns) -> None:
    for run in demo_runs:
        assert files_with(CANARY, run.folder) == []
        assert CANARY not in run.output + repr(run.recorded)
    found = {file.suffix for file in files_with("End run", demo_runs["success"].folder)}
    assert found >= {".log", ".zip"}  # what is there is found
    assert files_with(CANARY, demo_runs.ledger) == []
    assert any(".db" in file.suffix for file in files_with(demo_runs["success"].model_id, demo_runs.ledger))


@pytest.mark.nvflare_job
def test_fatal(demo_runs: DemoRuns) -> None:
    run = demo_runs["fatal"]
    assert {number for _, number in metrics(run.evidence, GLOBAL_ACCURACY)} == {1, 2}
    with archive_of(run) as archive:
        assert b"Fatal system error" in archive.read("log.txt")


@pytest.mark.nvflare_job
def test_abort(demo_runs: DemoRuns) -> None:
    with archive_of(demo_runs["abort"]) as archive:
        assert b"asked to abort" in archive.read("log.txt")


@pytest.mark.nvflare_job
def test_upload_failure(demo_runs: DemoRuns) -> None:
    run = demo_runs["upload-failure"]
    assert run.evidence.archives == []
    assert {r.code for r in run.evidence.bucket if r.method in {"PUT", "POST"}} == {403}
    kept = run.folder / "workspace" / "server" / "simulate_job" / MODEL_FILE
    assert kept.is_file()  # what could not be uploaded is still there


@pytest.mark.nvflare_job
def test_hub_outage(demo_runs: DemoRuns) -> None:
    run = demo_runs["hub-outage"]
    ((_, end),) = run.evidence.outages
    assert end is not None
    late = {r.status for r in run.evidence.hub if r.kind == "status" and r.time > end}
    assert late == {"RESULTS_UPLOADED"}
    # Not only the status survives the outage: every round's metric arrives, too.
    assert {number for _, number in metrics(run.evidence, GLOBAL_ACCURACY)} == {1, 2, 3, 4, 5}
    log = (run.folder / "workspace" / "server" / "simulate_job" / "log.txt").read_text()
    assert "End run" in log


@pytest.mark.nvflare_job
def test_the_ledger_after_each_scenario_holds_the_runs_up_to_it(demo_runs: DemoRuns) -> None:
    for number, run in enumerate(demo_runs, 1):
        with Ledger(run.ledger_after, read_only=True) as ledger:
            rows = ledger.runs()
            assert len(rows) == number
            row = ledger.run(run.run_id)
            assert row is not None
            assert row["final_status"] == str(SCENARIOS[run.scenario].final)


@pytest.mark.nvflare_job
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_run_is_one_whole_trace(demo_runs: DemoRuns, scenario: str) -> None:
    run = demo_runs[scenario]
    assert check_trace(run.spans, run.run_id).name == "flip.run"
    assert {run.protocol for run in demo_runs} == {"grpc", "http/protobuf"}
    assert CANARY not in repr(run.spans)


@pytest.mark.nvflare_job
def test_scatter_and_gather_with_the_newer_contract(tmp_path: Path) -> None:
    out = io.StringIO()
    evidence, summary = runner.stage(
        "success",
        folder=tmp_path / "demo",
        ledger_dir=tmp_path / "ledger",
        workflow="sag",
        contract="2026-10",
        pace=0.0,
        console=Console(file=out, width=160),
    )
    assert summary.differences == [], out.getvalue()
    statuses = [r.status for r in evidence.hub if r.kind == "status" and r.accepted]
    assert list(dict.fromkeys(statuses)) == ["INITIATED", "PREPARED", "RUNNING", "RESULTS_UPLOADED"]
    events = [r.payload for r in evidence.hub if r.kind == "logs" and r.payload is not None]
    started = [(p["event_type"], p["global_round"]) for p in events if p["event_type"] == "ROUND_STARTED"]
    assert started == [("ROUND_STARTED", number) for number in range(1, ROUNDS + 1)]
    assert Counter(p["event_type"] for p in events)["CLIENT_RESULT_RECEIVED"] == 3 * ROUNDS


SIM_ENV = """
import sys
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.job_config.api import FedJob
from nvflare.recipe.sim_env import SimEnv
from flip_observability.demo.trainer import NumpyPersistor, Trainer
from flip_observability.nvflare.components import PersistToS3AndCleanup, ServerEventHandler, ValidationJsonGenerator

model_id, root = sys.argv[1:]
job = FedJob(name="plain-fedavg", min_clients=2)
job.to_server(FedAvg(num_clients=2, num_rounds=2, persistor_id="persistor"))
job.to_server(NumpyPersistor(), id="persistor")
job.to_server(ValidationJsonGenerator(), id="json_generator")
job.to_server(PersistToS3AndCleanup(model_id=model_id), id="persist_and_cleanup")
job.to_server(ServerEventHandler(model_id=model_id), id="flip_server_event_handler")
job.to_clients(Trainer(), tasks=["train"])
SimEnv(clients=["site-1", "site-2"], workspace_root=root).deploy(job)
"""


@pytest.mark.smoke
@pytest.mark.nvflare_job
def test_modern_fedavg_in_sim_env(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SIM_ENV)
    with EmbeddedHub(model_ids=[MODEL]) as hub, EmbeddedBucket() as bucket:
        environment = {
            **os.environ,
            **bucket.environment,
            "LOCAL_DEV": "false",
            "FLIP_API_INTERNAL_URL": hub.url,
            "INTERNAL_SERVICE_KEY": hub.key,
            "UPLOADED_FEDERATED_DATA_BUCKET": bucket.destination,
            "FLIP_OBSERVABILITY_DIR": str(tmp_path / "ledger"),
        }
        done = subprocess.run(
            [sys.executable, str(script), MODEL, str(tmp_path / "simulation")],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert hub.statuses(MODEL) == ["TRAINING_STARTED", "RESULTS_UPLOADED"], done.stdout[-3000:]
        assert [item.key.split("/")[:2] for item in bucket.objects()] == [["demo", MODEL]]
        assert all(record.accepted for record in hub.records)
        assert hub.key not in done.stdout


@pytest.mark.nvflare_job
def test_run_demo_returns_1_when_the_records_were_tampered_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge sees the embedded hub's records: one that was made to differ fails the demo."""
    monkeypatch.setattr(
        EmbeddedHub, "records", property(lambda hub: [r for r in hub._records if r.status != "STOPPED"])
    )
    monkeypatch.setattr(runner, "DELIVERY_SECONDS", 2.0)  # for a status that it will never see
    out = io.StringIO()
    code = runner.run_demo(
        "abort",
        folder=tmp_path / "demo",
        ledger_dir=tmp_path / "ledger",
        pace=0.0,
        console=Console(file=out, width=160),
    )
    assert code == 1
    assert "differs: the hub holds no final status, it must hold STOPPED" in out.getvalue()


def test_an_unknown_scenario_is_refused() -> None:
    with pytest.raises(runner.DemoError, match="success, fatal"):
        runner.run_demo("nonsense")


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(runner.DemoError, match=r"scikit-learn.*flip-observability\[demo\]"):
        runner.run_demo("success")


def test_the_users_own_settings_do_not_lead_the_demo_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "production")
    monkeypatch.setenv("INTERNAL_SERVICE_KEY", "of-production")
    assert not [name for name in runner.job_environment({"LOCAL_DEV": "false"}) if name.startswith("AWS_")]
    assert "INTERNAL_SERVICE_KEY" not in runner.job_environment({})
    monkeypatch.setenv("FLIP_OBSERVABILITY_DIR", str(tmp_path))
    assert runner._default_ledger() == tmp_path
    monkeypatch.delenv("FLIP_OBSERVABILITY_DIR")
    assert runner._default_ledger() == Path("demo-run/observability")


def test_the_job_is_what_a_flip_server_would_be_given(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", MODEL, SCENARIOS["fatal"])
    server = json.loads((job / "app/config/config_fed_server.json").read_text())
    ids = [component["id"] for component in server["components"]]
    assert ids[-3:] == ["json_generator", "persist_and_cleanup", "flip_server_event_handler"]
    assert "mishap" in ids
    plain = write_job(tmp_path / "plain", MODEL, SCENARIOS["success"])
    assert "mishap" not in (plain / "app/config/config_fed_server.json").read_text()


def test_a_scenario_that_lost_a_site_leaves_nothing_behind(tmp_path: Path) -> None:
    log = tmp_path / "fatal" / "job.log"
    assert not has_lost_a_site(log)
    log.parent.mkdir()
    log.write_text("INFO - Simulate Run client: site-2\n")
    assert not has_lost_a_site(log)
    log.write_text("SimulatorClientRunner - ERROR - Communication error with client site-2: Connection reset by peer\n")
    assert has_lost_a_site(log)
    with Ledger(tmp_path / "ledger") as ledger:
        Run(ledger)
    before = copy_ledger(tmp_path / "ledger", tmp_path / "after" / "success")
    with Ledger(tmp_path / "ledger") as ledger:
        Run(ledger)
    _forget(tmp_path, "fatal", before)
    assert not log.parent.exists()
    with Ledger(tmp_path / "ledger", read_only=True) as ledger:
        assert len(ledger.runs()) == 1
