"""All scenarios of the demo, run once per test session into one ledger, and shared by every test that looks at them.

The fixture ``demo_runs`` gives them. Run as a program, this plays one scenario and writes down what was recorded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from flip_observability.demo import runner
from flip_observability.demo.bucket import BucketRecord
from flip_observability.demo.hub import HubRecord
from flip_observability.demo.job import has_lost_a_site
from flip_observability.demo.scenarios import SCENARIOS
from flip_observability.demo.verdict import Archive, Evidence
from flip_observability.ledger import FILE_NAME
from otlp_sink import OtlpSink, Received, from_json, to_json

CANARY = "canary-of-service-key-and-bucket"
"""Every secret of hub and bucket in these runs. It must be nowhere but in the runs' environment."""
PROTOCOLS = ("grpc", "http/protobuf")
SCENARIO_SECONDS = 300.0
ATTEMPTS = 3
SHARED = "FLIP_TEST_RUNS"
"""Environment variable with a folder in which several sessions of pytest share the runs, as `make test-all` has it."""


@dataclass(frozen=True)
class DemoRun:
    """One scenario that has been played.

    Attributes:
        scenario: its name.
        run_id: of the run, which is its trace id when the hyphens are taken out.
        model_id: of its model.
        folder: of the demo: the job, its log, the simulator's workspace, and the archive's copy.
        ledger_after: folder with a copy of the ledger as it was when this scenario had ended.
        uri: address of the archive; empty when there is none.
        checksum: of the archive, as the bucket held it.
        archive: the archive's copy; None when there is none.
        output: what the demo showed on the terminal.
        began: seconds since the epoch.
        ended: seconds since the epoch.
        recorded: evidence of hub and bucket as JSON: ``hub``, ``bucket``, ``archives``, ``outages``, ….
        protocol: by which its spans were exported over OTLP: ``grpc`` and ``http/protobuf`` take turns.
        spans: what was received.
    """

    scenario: str
    run_id: str
    model_id: str
    folder: Path
    ledger_after: Path
    uri: str
    checksum: str
    archive: Path | None
    output: str
    began: float
    ended: float
    recorded: Mapping[str, Any]
    protocol: str
    spans: list[Received]

    @cached_property
    def evidence(self) -> Evidence:
        """The same as the objects that the demo's judge looks at."""
        return Evidence(
            **{
                **self.recorded,
                "hub": [HubRecord(**record) for record in self.recorded["hub"]],
                "bucket": [BucketRecord(**record) for record in self.recorded["bucket"]],
                "archives": [Archive(**item | {"files": tuple(item["files"])}) for item in self.recorded["archives"]],
                "outages": [tuple(outage) for outage in self.recorded["outages"]],
            }
        )

    @property
    def statuses(self) -> list[str]:
        """What the hub accepted, in order, each once."""
        records = [record for record in self.evidence.hub if record.kind == "status" and record.accepted]
        return list(dict.fromkeys(record.status for record in records))


@dataclass(frozen=True)
class DemoRuns:
    """All scenarios, in the order in which they were played.

    Attributes:
        ledger: the folder of the ledger that holds them all. Copy it (:meth:`copy_of_ledger`) before changing it.
    """

    ledger: Path
    runs: tuple[DemoRun, ...]

    def __getitem__(self, scenario: str) -> DemoRun:
        return next(run for run in self.runs if run.scenario == scenario)

    def __iter__(self) -> Iterator[DemoRun]:
        return iter(self.runs)

    def copy_of_ledger(self, target: Path) -> Path:
        """A copy of the whole ledger in a folder of the caller's, to observe or change. Returns the folder."""
        return copy_ledger(self.ledger, target)


def copy_ledger(source: Path, target: Path) -> Path:
    """Copy the ledger of one folder into another, whoever is writing into it. Returns the other folder."""
    target.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (
        contextlib.closing(sqlite3.connect(source / FILE_NAME)) as old,
        contextlib.closing(sqlite3.connect(target / FILE_NAME)) as new,
    ):
        old.backup(new)
    (target / FILE_NAME).chmod(0o600)
    return target


@pytest.fixture(scope="session")
def demo_runs(tmp_path_factory: pytest.TempPathFactory) -> DemoRuns:
    """Every scenario of the demo. The first test that asks plays them, whatever worker or session it is in."""
    if SHARED in os.environ:
        base = Path(os.environ[SHARED])
    else:
        base = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            base = base.parent  # the workers have folders of their own in one of the session
    folder = base / "demo-runs"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _play_all(folder)
    return _load(folder)


def _play_all(folder: Path) -> None:
    folder.mkdir()
    before: Path | None = None
    for name, protocol in zip(SCENARIOS, itertools.cycle(PROTOCOLS), strict=False):
        sink = play(folder, name, partial(OtlpSink, protocol), before=before)
        (folder / f"{name}.spans.json").write_text(to_json(sink.spans))
        before = copy_ledger(folder / "ledger", folder / "after" / name)


def play(
    folder: Path,
    name: str,
    make_sink: Callable[[], OtlpSink],
    *,
    before: Path | None = None,
    program: Path = Path(__file__),
) -> OtlpSink:
    """Play a scenario in a process of its own, and begin anew when the simulator loses a site.

    Args:
        folder: for what it leaves; its ledger is in ``folder / "ledger"``.
        name: of the scenario.
        make_sink: the collector that it exports its spans to; a new one for each beginning.
        before: folder with a copy of the ledger as it was before; None when there was none.
        program: this file, or one that does the same and more.

    Returns:
        The collector that heard of the run that was played to its end; it has been stopped.
    """
    for _ in range(ATTEMPTS):
        with make_sink() as sink:
            lost_a_site = _play_in_a_process(folder, name, sink.environment, program)
        if not lost_a_site:
            break
        _forget(folder, name, before)
    return sink


def _play_in_a_process(folder: Path, name: str, environment: Mapping[str, str], program: Path) -> bool:
    """Returns whether the simulator could not start one of the sites, in which case the scenario was broken off."""
    output = folder / f"{name}.out"
    with output.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(program), name, str(folder)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    deadline, lost_a_site = time.monotonic() + SCENARIO_SECONDS, False
    try:
        while process.poll() is None and time.monotonic() < deadline and not lost_a_site:
            time.sleep(0.2)
            lost_a_site = has_lost_a_site(folder / name / "job.log")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # so that it ends its job's processes, too
            process.wait(60)
    lost_a_site = has_lost_a_site(folder / name / "job.log")
    if process.returncode and not lost_a_site:
        (folder / f"{name}.failed").write_text(output.read_text(errors="replace")[-6_000:])
    return lost_a_site


def _forget(folder: Path, name: str, before: Path | None) -> None:
    """Make everything as it was before a scenario was begun."""
    shutil.rmtree(folder / name)
    shutil.rmtree(folder / "ledger", ignore_errors=True)
    if before is not None:
        copy_ledger(before, folder / "ledger")


def _load(folder: Path) -> DemoRuns:
    runs = []
    for name, protocol in zip(SCENARIOS, itertools.cycle(PROTOCOLS), strict=False):
        spans = from_json((folder / f"{name}.spans.json").read_text())
        runs.append(load_run(folder, name, protocol, spans))
    return DemoRuns(folder / "ledger", tuple(runs))


def load_run(folder: Path, name: str, protocol: str, spans: list[Received]) -> DemoRun:
    """What :func:`play` has played. Fails the test when it did not end as it must."""
    for failure in sorted(folder.glob("*.failed")):
        pytest.fail(f"The demo of {failure.stem} failed:\n{failure.read_text()}")
    data = json.loads((folder / f"{name}.json").read_text())
    data |= {"folder": Path(data["folder"]), "archive": Path(data["archive"]) if data["archive"] else None}
    return DemoRun(**data, ledger_after=folder / "after" / name, protocol=protocol, spans=spans)


def main(name: str, folder: Path) -> int:
    """Play a scenario in this process and write down what was recorded."""
    import secrets

    secrets.token_urlsafe = lambda nbytes=None: CANARY
    out, began = io.StringIO(), time.time()
    evidence, summary = runner.stage(
        name,
        folder=folder / name,
        ledger_dir=folder / "ledger",
        workflow="fedavg",
        contract="2026-05",
        pace=0.0,
        console=Console(file=out, width=160),
    )
    sys.stdout.write(out.getvalue())
    data = {
        "scenario": name,
        "run_id": summary.run_id,
        "model_id": evidence.model_id,
        "folder": str(folder / name),
        "uri": summary.uri,
        "checksum": summary.checksum,
        "archive": str(summary.copy) if summary.copy else None,
        "output": out.getvalue(),
        "began": began,
        "ended": time.time(),
        "recorded": dataclasses.asdict(evidence),
    }
    (folder / f"{name}.json").write_text(json.dumps(data))
    return 1 if summary.differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
