"""Adoption on a real server: kit installed, job adopted, run to its end, hub told, metrics served, and undone."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import uuid
import zipfile
from pathlib import Path
from typing import Any

import pytest
from nvflare.fuel.flare_api.flare_api import Session

from command_line import flip_obs
from flare_system import FlareSystem, write_flip_job
from flip_observability.demo.hub import EmbeddedHub
from server_kit import snapshot
from waiting import free_port, wait_for


def run(session: Session, job: Path, seconds: float = 60.0) -> tuple[str, str]:
    """Submit a job and wait for its end: its id and status."""
    job_id = session.submit_job(str(job))
    session.monitor_job(job_id, timeout=seconds, poll_interval=0.5)
    return job_id, str(session.get_job_meta(job_id).get("status"))


def page(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return ""


def listening_on(kit: Path, port: int) -> None:
    """Give the observer a port of its own, as an administrator would."""
    file = kit / "local" / "flip_observability__p_resources.json"
    content: dict[str, Any] = json.loads(file.read_text())
    content["components"][0]["args"] = {"port": port}
    file.write_text(json.dumps(content, indent=2))


@pytest.mark.smoke
@pytest.mark.nvflare_job
@pytest.mark.timeout(300)
def test_a_server_and_a_job_are_adopted_run_and_undone(tmp_path: Path) -> None:
    model, port = str(uuid.uuid4()), free_port()
    job = write_flip_job(tmp_path / "job", model)
    job_before = snapshot(job)
    assert flip_obs("adopt", job, "--yes").returncode == 0
    with EmbeddedHub(model_ids=[model]) as hub, FlareSystem(tmp_path) as system:
        kit_before = snapshot(system.server_kit)
        environment = {
            "LOCAL_DEV": "false",
            "NET_ID": "adopted",
            "FLIP_API_INTERNAL_URL": hub.url,
            "INTERNAL_SERVICE_KEY": hub.key,
            "INTERNAL_SERVICE_KEY_HEADER": hub.header,
            "UPLOADED_FEDERATED_DATA_BUCKET": (tmp_path / "bucket").as_uri(),
            "FLIP_OBSERVABILITY_DIR": str(tmp_path / "ledger"),
        }
        assert flip_obs("install", system.server_kit).returncode == 0
        listening_on(system.server_kit, port)
        system.start("server", environment)
        system.start("site-1")
        with system.session() as session:
            job_id, status = run(session, job)
            assert status == "FINISHED:COMPLETED", system.log("server")[-4_000:]
            assert hub.wait(lambda h: h.statuses(model)[-1:] == ["RESULTS_UPLOADED"])
            assert hub.statuses(model) == ["PREPARED", "TRAINING_STARTED", "RESULTS_UPLOADED"]
            wanted = 'flip_runs_finished_total{net_id="adopted",status="RESULTS_UPLOADED"} 1.0'
            wait_for(lambda: wanted in page(f"http://127.0.0.1:{port}/metrics"), 20, "the run in the metrics")
        archives = list((tmp_path / "bucket" / model).glob("*.zip"))
        assert len(archives) == 1
        with zipfile.ZipFile(archives[0]) as archive:
            assert archive.testzip() is None
            assert {"log.txt", "models/server.npy"} <= set(archive.namelist())
        shown = flip_obs("--dir", tmp_path / "ledger", "runs", "--json")
        assert [(line["run_id"], line["status"]) for line in json.loads(shown.stdout)] == [(job_id, "RESULTS_UPLOADED")]
        system.stop()
        assert hub.key not in system.log("server")
        assert flip_obs("install", system.server_kit, "--undo").returncode == 0
        after = snapshot(system.server_kit)
        kit = {name: entry for name, entry in after.items() if name.startswith(("local", "startup"))}
        assert kit == {name: entry for name, entry in kit_before.items() if name.startswith(("local", "startup"))}
        assert flip_obs("adopt", job, "--undo", "--yes").returncode == 0
        signed = {name: entry for name, entry in snapshot(job).items() if ".__nvfl_" not in name}
        assert signed == job_before  # but for the signatures that NVFLARE leaves in a folder that is submitted


@pytest.mark.nvflare_job
@pytest.mark.timeout(300)
def test_a_server_that_was_not_told_refuses_our_components_until_it_is(tmp_path: Path) -> None:
    """The allow list is read for every job: this part of the installation needs no restart."""
    model = str(uuid.uuid4())
    job = write_flip_job(tmp_path / "job", model)
    assert flip_obs("adopt", job, "--yes").returncode == 0
    with FlareSystem(tmp_path) as system:
        environment = {
            "LOCAL_DEV": "true",
            "UPLOADED_FEDERATED_DATA_BUCKET": (tmp_path / "bucket").as_uri(),
            "FLIP_OBSERVABILITY_DIR": str(tmp_path / "ledger"),
        }
        system.start("server", environment)
        system.start("site-1")
        with system.session() as session:
            _, status = run(session, job)
            assert status != "FINISHED:COMPLETED"
            assert "is not in allow_list" in system.log("server")
            assert flip_obs("install", system.server_kit).returncode == 0
            _, status = run(session, job)
            assert status == "FINISHED:COMPLETED", system.log("server")[-4_000:]
        assert len(list((tmp_path / "bucket" / model).glob("*.zip"))) == 1
