"""A real job whose controller tells the hub of results and metrics by itself, as FLIP's do: nothing is told twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import pytest

from flip_observability.demo.hub import EmbeddedHub
from flip_observability.demo.job import CLIENTS, ROUNDS, has_lost_a_site, kill_job, prepare_workspace, write_job
from flip_observability.demo.runner import job_environment
from flip_observability.demo.scenarios import SCENARIOS

CONTROLLERS = "flip.nvflare.controllers"
SITES = [f"site-{number + 1}" for number in range(CLIENTS)]
JOB_SECONDS = 240
ATTEMPTS = 3


def write_controllers(folder: Path) -> Path:
    """Make a package of FLIP's name that has a controller."""
    package = folder / Path(*CONTROLLERS.split("."))
    package.mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "stand_in_controller.py", package / "stand_in.py")
    return folder


def write_files(folder: Path, model: str) -> None:
    """The demo's job with that controller, and a workspace that allows it."""
    config = (
        write_job(folder / "job", model, SCENARIOS["success"], workflow="sag") / "app/config/config_fed_server.json"
    )
    server = json.loads(config.read_text())
    server["workflows"][0]["path"] = f"{CONTROLLERS}.stand_in.StandIn"
    config.write_text(json.dumps(server))
    resources = prepare_workspace(folder / "workspace") / "local" / "resources.json"
    content = json.loads(resources.read_text())
    content["class_allow_list"].append(f"{CONTROLLERS}.")
    resources.write_text(json.dumps(content))


def run(folder: Path, hub: EmbeddedHub, model: str) -> bool:
    """Whether the job has run to its end; False when the simulator lost a site, which says nothing about us."""
    write_files(folder, model)
    variables = {
        "LOCAL_DEV": "false",
        "FLIP_API_INTERNAL_URL": hub.url,
        "INTERNAL_SERVICE_KEY_HEADER": hub.header,
        "INTERNAL_SERVICE_KEY": hub.key,
        "FLIP_HUB_CONTRACT": "2026-10",
        "FLIP_OBSERVABILITY_DIR": str(folder / "ledger"),
        "UPLOADED_FEDERATED_DATA_BUCKET": (folder / "bucket").as_uri(),
        "PYTHONPATH": str(write_controllers(folder / "path")),
        "STAND_IN_MODEL": model,
        "OTEL_SDK_DISABLED": "true",
    }
    log = folder / "log.txt"
    command = [sys.executable, "-m", "flip_observability.demo.job", str(folder / "job"), str(folder / "workspace")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=job_environment(variables),
            start_new_session=True,
        )
        try:
            process.wait(JOB_SECONDS)
        except subprocess.TimeoutExpired:
            assert has_lost_a_site(log), log.read_text(errors="replace")[-4_000:]
        finally:
            kill_job(process)
    return not has_lost_a_site(log)


@pytest.mark.nvflare_job
def test_rounds_are_told_once_and_what_the_controller_tells_is_not_told_again(tmp_path: Path) -> None:
    for attempt in range(ATTEMPTS):
        model, folder = str(uuid.uuid4()), tmp_path / str(attempt)
        folder.mkdir()
        with EmbeddedHub("2026-10") as hub:
            if not run(folder, hub, model):
                continue
            log = (folder / "log.txt").read_text(errors="replace")[-4_000:]
            assert hub.statuses(model)[-1:] == ["RESULTS_UPLOADED"], log
            assert all(record.accepted for record in hub.records), [record.problem for record in hub.records]
            events = Counter((p["event_type"], p["global_round"]) for p in hub.payloads(model, "logs"))
            rounds = range(1, ROUNDS + 1)
            assert events == Counter(
                {("ROUND_STARTED", number): 1 for number in rounds}
                | {("ROUND_AGGREGATED", number): 1 for number in rounds}
                | {("CLIENT_RESULT_RECEIVED", number): CLIENTS for number in rounds}
            )
            points = [p for p in hub.payloads(model, "metrics") if p["fl_client_name"] in SITES]
            assert {p["x_label"] for p in points} == {"stand-in"}
            labels = {p["label"] for p in points}
            assert labels
            assert Counter((p["fl_client_name"], p["label"]) for p in points) == Counter(
                {(site, label): ROUNDS for site in SITES for label in labels}
            )
            return
    pytest.fail(f"the simulator lost a site {ATTEMPTS} times")
