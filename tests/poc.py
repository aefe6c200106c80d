"""A whole FLIP site for drills: ``nvflare poc`` server and clients that can really die, a hub, a bucket."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from nvflare.fuel.flare_api.flare_api import Session

from command_line import flip_obs
from flare_system import FlareSystem
from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.demo.job import write_job
from flip_observability.demo.runner import job_environment
from flip_observability.demo.scenarios import SCENARIOS
from flip_observability.ledger import FILE_NAME, Ledger, LedgerError
from waiting import free_port, wait_for

wait_until = wait_for
"""The name by which who uses a site knows it."""
FINAL = frozenset({"RESULTS_UPLOADED", "ERROR", "STOPPED", "RESULTS_UPLOAD_FAILED"})


class Poc(FlareSystem):
    """Server and clients with this package installed, in front of an embedded hub and bucket.

    Args:
        home: an empty folder, for everything.
        hub, bucket: already running.
        clients: how many sites.
        observed: whether the server's parent has the observer.
    """

    def __init__(
        self, home: Path, hub: EmbeddedHub, bucket: EmbeddedBucket, clients: int = 2, *, observed: bool = True
    ) -> None:
        super().__init__(home, clients)
        self.home, self.hub, self.bucket = home, hub, bucket
        self.ledger_dir = home / "ledger"
        self.port = free_port()
        self.variables: dict[str, str] = {}
        self._orphans: list[psutil.Process] = []
        assert flip_obs("install", self.server_kit).returncode == 0
        observer = self.server_kit / "local" / "flip_observability__p_resources.json"
        content = json.loads(observer.read_text())
        content["components"][0]["args"] = {"port": self.port}
        observer.write_text(json.dumps(content))
        if not observed:
            observer.unlink()
        # What installing allows are our components alone: the demo's job has a workflow and a trainer of its own, too.
        for kit in (self.server_kit, *(self.kits / name for name in self.clients)):
            for file in (kit / "local").glob("resources.json*"):
                resources = json.loads(file.read_text())
                resources["class_allow_list"] = [*resources.get("class_allow_list", []), "flip_observability.demo."]
                file.write_text(json.dumps(resources))

    @property
    def environment(self) -> dict[str, str]:
        """What the server's processes are told."""
        return {
            "LOCAL_DEV": "false",
            "NET_ID": "poc",
            "FLIP_API_INTERNAL_URL": self.hub.url,
            "INTERNAL_SERVICE_KEY_HEADER": self.hub.header,
            "INTERNAL_SERVICE_KEY": self.hub.key,
            "FLIP_HUB_CONTRACT": self.hub.contract,
            "UPLOADED_FEDERATED_DATA_BUCKET": self.bucket.destination,
            "FLIP_OBSERVABILITY_DIR": str(self.ledger_dir),
            **self.bucket.environment,
            **self.variables,
        }

    def start_server(self) -> None:
        self.start("server", job_environment(self.environment))

    def start_all(self) -> None:
        self.start_server()
        for name in self.clients:
            self.start(name)

    # -- jobs --------------------------------------------------------------------------------------------------------

    def write_job(
        self,
        model_id: str,
        *,
        rounds: int = 5,
        pace: float = 1.0,
        scenario: str = "success",
        change: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
    ) -> Path:
        """The demo's job, for this system's clients.

        Args:
            model_id: the model's UUID.
            rounds: of training.
            pace: seconds that a round lasts.
            scenario: of the demo, which decides the mishap.
            change: may change the job's meta and the server's configuration.
        """
        folder = self.home / "jobs" / f"job-{uuid.uuid4().hex[:6]}"
        write_job(folder, model_id, SCENARIOS[scenario], pace=pace)
        meta_file, server_file = folder / "meta.json", folder / "app" / "config" / "config_fed_server.json"
        meta, server = json.loads(meta_file.read_text()), json.loads(server_file.read_text())
        meta |= {"min_clients": len(self.clients), "custom_props": {"model_id": model_id}}
        server["workflows"][0]["args"] |= {"num_clients": len(self.clients), "num_rounds": rounds}
        if change is not None:
            change(meta, server)
        meta_file.write_text(json.dumps(meta))
        server_file.write_text(json.dumps(server))
        return folder

    def submit(self, session: Session, model_id: str, **options: Any) -> str:
        """Submit the demo's job (options as for :meth:`write_job`) and return its id."""
        return str(session.submit_job(str(self.write_job(model_id, **options))))

    def job_process(self, job_id: str, site: str = "server") -> psutil.Process | None:
        """The process that runs a job at a site, when there is one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.processes[site].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if job_id in " ".join(child.cmdline()):
                        return child
        return None

    def wait_for_job_process(self, job_id: str, seconds: float = 30.0) -> psutil.Process:
        found = wait_until(lambda: self.job_process(job_id), seconds, "a process of the job")
        assert isinstance(found, psutil.Process)
        return found

    def wait_for_round(self, job_id: str, number: int, seconds: float = 60.0) -> None:
        """Until the ledger has heard of the beginning of a round (1-based)."""
        wait_until(lambda: ((self.run(job_id) or {}).get("round") or 0) >= number, seconds, f"round {number}")

    # -- what became of it -------------------------------------------------------------------------------------------

    def run(self, run_id: str) -> dict[str, Any] | None:
        """The ledger's row of a run."""
        if not (self.ledger_dir / FILE_NAME).exists():
            return None
        try:
            with Ledger(self.ledger_dir, read_only=True) as ledger:
                return ledger.run(run_id)
        except LedgerError:
            return None  # it is only just being made

    def events(self, run_id: str) -> list[str]:
        with Ledger(self.ledger_dir, read_only=True) as ledger:
            return [row["name"] for row in ledger.events(run_id)]

    def final_statuses(self, model_id: str) -> list[str]:
        """The distinct final statuses that the hub has accepted, in order."""
        return list(dict.fromkeys(status for status in self.hub.statuses(model_id) if status in FINAL))

    def wait_for_final(self, model_id: str, seconds: float) -> tuple[str, float]:
        """The first final status that the hub accepted, and after how many seconds from now."""
        begun = time.monotonic()
        assert self.hub.wait(lambda _: bool(self.final_statuses(model_id)), timeout=seconds), self.log("server")[
            -6_000:
        ]
        return self.final_statuses(model_id)[0], time.monotonic() - begun

    def archives(self, model_id: str) -> list[str]:
        """Keys of the archives of a model in the bucket."""
        return [item.key for item in self.bucket.objects() if f"/{model_id}/" in item.key]

    # -- deaths ------------------------------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """SIGKILL one of our processes alone; what it started goes on."""
        process = self.processes[name]
        self._orphans += psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)

    def stop(self) -> None:
        super().stop()
        for orphan in self._orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
        psutil.wait_procs(self._orphans, timeout=10)

    def __enter__(self) -> Poc:
        return self


@contextlib.contextmanager
def poc_site(home: Path, clients: int = 2, **options: Any) -> Iterator[Poc]:
    """A site with hub and bucket; everything ends with it."""
    with EmbeddedHub() as hub, EmbeddedBucket() as bucket, Poc(home, hub, bucket, clients, **options) as poc:
        yield poc
