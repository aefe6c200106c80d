"""A whole job, with our components and without: the CPU time of its server."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Effort, Figure, spread
from flip_observability.demo import job
from flip_observability.demo.scenarios import SCENARIOS

ROUNDS = 50
MODEL_ID = "0f8fad5b-d9cb-469f-a165-70867728950e"
OURS = ("json_generator", "persist_and_cleanup", "flip_server_event_handler")
REPLACED = ("run_log", "persistor", "global_evaluator")
"""What belongs to the demo's own small model."""
PAUSE_SECONDS = 0.5
"""How long a site waits that asks too early: a quarter of NVFLARE's, so that the benchmark waits less."""


@dataclass(frozen=True)
class Seconds:
    """CPU time of a server.

    Args:
        process: all of it, imports included.
        ours: what our imports, events and threads took of it.
    """

    process: float
    ours: float

    @classmethod
    def of(cls, looks: Sequence[Mapping[str, float]]) -> Seconds:
        """That of all rounds, from what the clocks said at each round's start and at the end.

        A quick look has fewer rounds; what comes once (imports, the upload) must not stand for all of them.
        """
        first, last, end = looks[0], looks[-2], looks[-1]
        more = (ROUNDS - len(looks) + 1) / (len(looks) - 2)
        return cls(**{clock: end[clock] + more * (last[clock] - first[clock]) for clock in end})


def write_job(folder: Path, rounds: int, cpu: Path, *, observed: bool) -> None:
    """The demo's job with a model of real size, with our components or without, and with clocks."""
    job.write_job(folder, MODEL_ID, SCENARIOS["success"])
    config = folder / "app" / "config"
    server = _load(config / "config_fed_server.json")
    server["server"] = {"task_request_interval": PAUSE_SECONDS}
    server["workflows"][0]["args"]["num_rounds"] = rounds
    ours = [item for item in server["components"] if observed and item["id"] in OURS]
    server["components"] = [
        _component("accounts", "Accounts", paths=[item["path"] for item in ours]),
        _component("persistor", "Persistor"),
        *ours,
        _component("cpu", "CpuTime", file=str(cpu)),
    ]
    _save(config / "config_fed_server.json", server)
    client = _load(config / "config_fed_client.json")
    client["executors"][0]["executor"] = _component("trainer", "Trainer")
    _save(config / "config_fed_client.json", client)


def _component(name: str, kind: str, **args: Any) -> dict[str, Any]:
    return {"id": name, "path": f"benchmarks.model.{kind}", "args": args}


def _load(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _save(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def _run(rounds: int, *, observed: bool) -> Seconds:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cpu, bucket = folder / "cpu", folder / "bucket"
        write_job(folder / "job", rounds, cpu, observed=observed)
        job.prepare_workspace(folder / "workspace")
        resources = folder / "workspace" / "local" / "resources.json"
        allowed = _load(resources)
        allowed["class_allow_list"].append("benchmarks.")
        _save(resources, allowed)
        variables = {
            "LOCAL_DEV": "true",
            "UPLOADED_FEDERATED_DATA_BUCKET": bucket.as_uri(),
            "FLIP_OBSERVABILITY_DIR": str(folder / "ledger"),
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
        looks = json.loads(cpu.read_text(encoding="utf-8"))
        assert len(looks) == rounds + 1
        assert bool(list(bucket.glob("*/*.zip"))) == observed, "the results are there exactly when we are"
        seconds = Seconds.of(looks)
        assert (seconds.ours > 0) == observed
        return seconds


def measure(effort: Effort) -> Iterable[Figure]:
    """Jobs with and without in turn: what the clocks of our events and threads say ÷ the server's time without us.

    The two servers' own times are given beside it. Their difference is no figure: two servers that do the same differ
    by more than we take.
    """
    rounds = effort.of(ROUNDS, 5)
    observed = [_run(rounds, observed=True)]
    bare = [_run(rounds, observed=False)]
    observed += [_run(rounds, observed=True) for _ in range(effort.of(1, 0))]
    # A server's own time differs by a tenth from run to run: of those with us it is known, too, as what is not ours.
    without = statistics.median([s.process for s in bare] + [s.process - s.ours for s in observed])
    yield spread(
        "job_overhead_percent",
        [100 * seconds.ours / without for seconds in observed],
        rounds=rounds,
        ours_cpu_s=[round(seconds.ours, 3) for seconds in observed],
        server_with_us_cpu_s=[round(seconds.process, 2) for seconds in observed],
        server_without_us_cpu_s=[round(seconds.process, 2) for seconds in bare],
    )
