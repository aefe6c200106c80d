"""The demo's NVFLARE job: written as a job folder, run by NVFLARE's simulator in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import psutil

from flip_observability.component_paths import CLASS_OF
from flip_observability.demo.scenarios import Scenario

Workflow = Literal["fedavg", "sag"]

ROUNDS = 5
CLIENTS = 3
_TRAINER = "flip_observability.demo.trainer"
_COMPONENTS = "flip_observability.nvflare.components"


def write_job(
    folder: Path,
    model_id: str,
    scenario: Scenario,
    *,
    workflow: Workflow = "fedavg",
    pace: float = 0.0,
    control_dir: Path | None = None,
) -> Path:
    """Write the job folder.

    Args:
        folder: is made; its name is the job's name.
        model_id: the UUID that the hub knows the model by.
        scenario: decides which mishap is part of the job.
        workflow: ``fedavg`` for NVFLARE's FedAvg on the Model Controller API, ``sag`` for ScatterAndGather.
        pace: seconds that a round of training lasts on the largest site.
        control_dir: where the job asks the demo for an outage of the hub.

    Returns:
        The folder.
    """
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    _write(folder / "meta.json", _meta(folder.name))
    _write(config / "config_fed_server.json", _server(model_id, scenario, workflow, control_dir))
    _write(config / "config_fed_client.json", _client(pace))
    return folder


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _component(component_id: str, path: str, **args: Any) -> dict[str, Any]:
    return {"id": component_id, "path": path, "args": args}


def _meta(name: str) -> dict[str, Any]:
    return {"name": name, "min_clients": CLIENTS, "resource_spec": {}, "deploy_map": {"app": ["@ALL"]}}


def _server(model_id: str, scenario: Scenario, workflow: Workflow, control_dir: Path | None) -> dict[str, Any]:
    components = [
        _component("run_log", f"{_TRAINER}.RunLog"),
        _component("persistor", f"{_TRAINER}.NumpyPersistor"),
        _component("global_evaluator", f"{_TRAINER}.GlobalEvaluator", model_id=model_id, persistor_id="persistor"),
    ]
    if workflow == "sag":
        components += [
            _component(
                "shareable_generator",
                "nvflare.app_common.shareablegenerators.full_model_shareable_generator.FullModelShareableGenerator",
            ),
            _component(
                "aggregator",
                "nvflare.app_common.aggregators.intime_accumulate_model_aggregator.InTimeAccumulateWeightedAggregator",
                expected_data_kind="WEIGHTS",
            ),
        ]
    if scenario.mishap:
        components.append(
            _component(
                "mishap",
                "flip_observability.demo.mishap.Mishap",
                kind=scenario.mishap,
                round_number=scenario.mishap_round,
                control_dir=str(control_dir or ""),
            )
        )
    components += [
        _component(
            "json_generator",
            f"{_COMPONENTS}.ValidationJsonGenerator",
            results_dir="cross_site_val",
            json_file_name="cross_val_results.json",
        ),
        _component(
            "persist_and_cleanup",
            f"{_COMPONENTS}.PersistToS3AndCleanup",
            model_id=model_id,
            persistor_id="persistor",
        ),
        _component("flip_server_event_handler", f"{_COMPONENTS}.ServerEventHandler", model_id=model_id),
    ]
    return {"format_version": 2, "workflows": [_WORKFLOWS[workflow]], "components": components}


_WORKFLOWS: dict[Workflow, dict[str, Any]] = {
    "fedavg": _component(
        "fedavg",
        "flip_observability.demo.workflows.AnnouncedFedAvg",
        num_clients=CLIENTS,
        num_rounds=ROUNDS,
        persistor_id="persistor",
    ),
    "sag": _component(
        "scatter_and_gather",
        "flip_observability.demo.workflows.AnnouncedScatterAndGather",
        min_clients=CLIENTS,
        num_rounds=ROUNDS,
        wait_time_after_min_received=0,
        aggregator_id="aggregator",
        persistor_id="persistor",
        shareable_generator_id="shareable_generator",
        train_task_name="train",
    ),
}


def _client(pace: float) -> dict[str, Any]:
    executor = {"path": f"{_TRAINER}.Trainer", "args": {"pace": pace}}
    return {"format_version": 2, "executors": [{"tasks": ["train"], "executor": executor}], "components": []}


def prepare_workspace(workspace: Path) -> Path:
    """Make the simulator's workspace, whose sites allow this package's components (as a real server must, too)."""
    from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

    local = workspace / "local"
    local.mkdir(parents=True)
    allowed = [*DEFAULT_CLASS_ALLOW_LIST, *CLASS_OF, "flip_observability.demo."]
    _write(local / "resources.json", {"format_version": 2, "class_allow_list": allowed, "components": []})
    return workspace


def run_dir(workspace: Path) -> Path:
    """The server's run directory below a simulator workspace."""
    return workspace / "server" / "simulate_job"


def has_lost_a_site(log: Path) -> bool:
    """Whether NVFLARE's simulator could not start one of its sites: the federation would wait for it for ever.

    It picks a free port for each site and uses it a moment later, when somebody else may have it; and it forks from a
    process with many threads, which can kill the child at its birth. Both happen on busy machines.
    """
    try:
        text = log.read_bytes()
    except FileNotFoundError:
        return False
    return any(sign in text for sign in (b"Communication error with client", b"Subprocess died for client"))


def kill_job(process: subprocess.Popen[bytes], grace: float = 0.0) -> None:
    """End a job that was started in a session of its own, and wait for it.

    Args:
        process: of this module's command line.
        grace: seconds between SIGTERM and SIGKILL; at once SIGKILL when 0.
    """
    sites: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        sites = psutil.Process(process.pid).children(recursive=True)  # NVFLARE gives each site a session, too
    if grace:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for site in sites:
        with contextlib.suppress(psutil.NoSuchProcess):
            site.kill()
    process.wait()


def main(argv: list[str] | None = None) -> int:
    """Run a job folder in the simulator: ``python -m flip_observability.demo.job JOB WORKSPACE``."""
    parser = argparse.ArgumentParser(prog="python -m flip_observability.demo.job")
    parser.add_argument("job", type=Path)
    parser.add_argument("workspace", type=Path)
    args = parser.parse_args(argv)

    from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner

    runner = SimulatorRunner(
        job_folder=str(args.job.resolve()),
        workspace=str(args.workspace.resolve()),
        n_clients=CLIENTS,
        threads=CLIENTS,
    )
    return int(runner.run() or 0)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code & 0xFF)  # NVFLARE leaves threads behind that would hold the interpreter
