"""A whole job, with our components and without: the CPU time of its server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext

from benchmarks.measure import ROOT, Effort, Figure, spread, turns
from flip_observability.demo import job
from flip_observability.demo.scenarios import SCENARIOS

ROUNDS = 50
MODEL_ID = "0f8fad5b-d9cb-469f-a165-70867728950e"
OURS = ("json_generator", "persist_and_cleanup", "flip_server_event_handler")


class CpuTime(FLComponent):
    """Writes the CPU seconds that the server's process took until END_RUN is over, imports included (listed last)."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self._file = file

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Look at the clock at the end of the run."""
        if event_type == EventType.END_RUN:
            Path(self._file).write_text(str(_cpu_seconds()), encoding="utf-8")


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _seconds(rounds: int, *, observed: bool) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cpu, ledger = folder / "cpu", folder / "ledger"
        job.write_job(folder / "job", MODEL_ID, SCENARIOS["success"])
        config = folder / "job" / "app" / "config" / "config_fed_server.json"
        server = json.loads(config.read_text())
        server["workflows"][0]["args"]["num_rounds"] = rounds
        if not observed:
            server["components"] = [item for item in server["components"] if item["id"] not in OURS]
        server["components"].append({"id": "cpu", "path": "benchmarks.jobs.CpuTime", "args": {"file": str(cpu)}})
        config.write_text(json.dumps(server))
        job.prepare_workspace(folder / "workspace")
        resources = folder / "workspace" / "local" / "resources.json"
        allowed = json.loads(resources.read_text())
        allowed["class_allow_list"].append("benchmarks.")
        resources.write_text(json.dumps(allowed))
        bucket = folder / "bucket"
        variables = {
            "LOCAL_DEV": "true",
            "UPLOADED_FEDERATED_DATA_BUCKET": bucket.as_uri(),
            "FLIP_OBSERVABILITY_DIR": str(ledger),
            "PYTHONPATH": str(ROOT),
        }
        with (folder / "log").open("wb") as log:
            subprocess.run(
                [sys.executable, "-m", "flip_observability.demo.job", str(folder / "job"), str(folder / "workspace")],
                env={**os.environ, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        assert cpu.exists(), (folder / "log").read_text()[-3_000:]
        assert bool(list(bucket.glob("*/*.zip"))) == observed, "the results are there exactly when we are"
        return float(cpu.read_text())


def measure(effort: Effort) -> Iterable[Figure]:
    """Jobs in turn, with and without."""
    rounds = effort.of(ROUNDS, 5)
    pairs = turns(lambda: _seconds(rounds, observed=True), lambda: _seconds(rounds, observed=False), effort.of(3, 2))
    yield spread(
        "job_overhead_percent",
        [100 * (mine / without - 1) for mine, without in pairs],
        with_us_cpu_s=[round(mine, 2) for mine, _ in pairs],
        without_cpu_s=[round(without, 2) for _, without in pairs],
    )
