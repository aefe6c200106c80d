"""The NVFLARE site of the drills: parent, clients and jobs are real processes, and die as such."""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from nvflare.fuel.flare_api.flare_api import Session

from drills import ROOT
from drills.components import FOLDER_VARIABLE
from drills.judge import Run, read_times
from drills.pages import sum_of
from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.demo.hub import EmbeddedHub
from otlp_sink import OtlpSink
from poc import Poc
from s3_faults import FaultProxy
from waiting import wait_for

HANDLER = "flip_server_event_handler"
Change = Callable[[dict[str, Any], dict[str, Any]], None]


class Site(Poc):
    """A server with one client, all of our parts installed, and a proxy that can do harm before the bucket.

    Args:
        home: an empty folder.
        hub, bucket, sink: already running; the sink takes the traces.
    """

    def __init__(self, home: Path, hub: EmbeddedHub, bucket: EmbeddedBucket, sink: OtlpSink) -> None:
        super().__init__(home, hub, bucket, clients=1)
        self.sink = sink
        self.runs: list[Run] = []
        self.times = home / "times"
        self.times.mkdir()
        self.proxy = FaultProxy(_address(bucket))
        self.variables = {
            "AWS_ENDPOINT_URL_S3": self.proxy.url,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            FOLDER_VARIABLE: str(self.times),
            **sink.environment,
        }
        self._session: Session | None = None
        self._stack = contextlib.ExitStack()
        for file in (self.server_kit / "local").glob("resources.json*"):
            resources = json.loads(file.read_text())
            resources["class_allow_list"] = [*resources.get("class_allow_list", []), "drills."]
            for part in resources["components"]:
                if part["id"] == "job_scheduler":
                    part["args"] |= {"max_jobs": 4, "min_schedule_interval": 1.0, "max_schedule_interval": 2.0}
                    part["args"]["max_schedule_count"] = 4
            file.write_text(json.dumps(resources))

    @classmethod
    @contextlib.contextmanager
    def running(cls, home: Path) -> Iterator[Site]:
        """A site with everything started; it ends with the context."""
        home.mkdir(parents=True, exist_ok=True)
        name = f"drills-{uuid.uuid4().hex[:8]}"
        with EmbeddedHub() as hub, EmbeddedBucket(name) as bucket, OtlpSink("http/protobuf") as sink:
            site = cls(home, hub, bucket, sink)
            with site:
                site.start_all()
                try:
                    yield site
                finally:
                    site.disconnect()
                    site.proxy.stop()

    # -- administration ----------------------------------------------------------------------------------------------

    @property
    def admin(self) -> Session:
        """An administrator's session."""
        if self._session is None:
            self._session = self._stack.enter_context(self.session(seconds=90))
        return self._session

    def disconnect(self) -> None:
        """End the administrator's session."""
        self._session = None
        with contextlib.suppress(Exception):
            self._stack.close()
        self._stack = contextlib.ExitStack()

    def ensure_running(self) -> None:
        """Start again what a drill has killed."""
        self.heal()
        for name in ("server", *self.clients):
            if self.processes[name].poll() is not None:
                self.disconnect()
                self.start_server() if name == "server" else self.start(name)
        _ = self.admin

    def heal(self) -> None:
        """No faults any more."""
        self.hub.heal()
        self.hub.up()
        self.bucket.refusing = False
        self.proxy.faults.clear()
        self.proxy.stopping.set()
        self.proxy.stopping.clear()

    # -- jobs --------------------------------------------------------------------------------------------------------

    def run_job(self, *changes: Change, rounds: int = 60, pace: float = 0.4, scenario: str = "success") -> Run:
        """Submit a job with the stopwatch in it. Its fault is to be dated by the drill."""
        model_id = str(uuid.uuid4())

        def change(meta: dict[str, Any], server: dict[str, Any]) -> None:
            part(server, HANDLER)["path"] = "drills.components.ServerEventHandler"
            for each in changes:
                each(meta, server)

        return self.run_folder(
            self.write_job(model_id, rounds=rounds, pace=pace, scenario=scenario, change=change), model_id
        )

    def run_folder(self, job: Path, model_id: str) -> Run:
        """Submit a job's folder."""
        job_id = str(self.admin.submit_job(str(job)))
        self.runs.append(Run(model_id, job_id, time.time(), self.hub, self.read_archives))
        return self.runs[-1]

    def wait_for_death(self, job_id: str, seconds: float = 90.0) -> float:
        """When the job's process killed itself (epoch seconds)."""

        def death() -> float | None:
            times = [line["time"] for line in read_times(self.times, job_id) if line["what"] == "death"]
            return times[0] if times else None

        return float(wait_for(death, seconds, "the death of the job's process"))

    def wait_for_event(self, job_id: str, name: str, seconds: float = 120.0) -> None:
        """Until the ledger has an event of the run."""
        wait_for(lambda: self.run(job_id) is not None and name in self.events(job_id), seconds, name)

    def kill_job(self, job_id: str) -> float:
        """SIGKILL the server's process of a job. Returns when (epoch seconds)."""
        process = self.wait_for_job_process(job_id)
        process.kill()
        return time.time()

    def kill_server(self, *jobs: str) -> None:
        """SIGKILL the parent, and wait until the processes of these jobs have gone after it."""
        found = [process for job in jobs if (process := self.job_process(job)) is not None]
        self.disconnect()
        self.kill("server")
        _, alive = psutil.wait_procs(found, timeout=60)
        assert not alive, "a job process outlives its parent"

    def read_archives(self, model_id: str) -> dict[str, bytes]:
        """Content of every archive of a model."""
        client = self.bucket.client()
        return {
            key: client.get_object(Bucket=self.bucket.name, Key=key)["Body"].read() for key in self.archives(model_id)
        }

    def page(self) -> str:
        """The observer's metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have these labels."""
        return sum_of(self.page(), name, **labels)

    # -- for the judge -----------------------------------------------------------------------------------------------

    @property
    def secrets(self) -> list[str]:
        return [self.hub.key, self.bucket.environment["AWS_SECRET_ACCESS_KEY"]]

    def unfinished_uploads(self) -> list[str]:
        """Keys of multipart uploads that nobody ended."""
        return self.bucket.unfinished_uploads()

    def texts(self) -> Mapping[str, bytes]:
        """What was logged, served and told."""
        found = {f"the log of {name}": self.log(name).encode() for name in self.processes}
        found["what the hub was told"] = repr([record.payload for record in self.hub.records]).encode()
        found["the spans"] = repr(self.sink.spans).encode()
        with contextlib.suppress(OSError):
            found["the metrics"] = self.page().encode()
        return found


def part(server: dict[str, Any], name: str) -> dict[str, Any]:
    """A component of a job's server configuration."""
    return next(each for each in server["components"] if each["id"] == name)


def with_component(path: str, *, before: bool = True, **args: Any) -> Change:
    """A change of a job: one more component, before or after our handler."""

    def change(_: dict[str, Any], server: dict[str, Any]) -> None:
        place = server["components"].index(part(server, HANDLER)) + (0 if before else 1)
        server["components"].insert(
            place, {"id": f"drill_{path.lower()}_{place}", "path": f"drills.components.{path}", "args": args}
        )

    return change


def with_meta(**values: Any) -> Change:
    """A change of a job: values of its ``meta.json``."""
    return lambda meta, _: meta.update(values)


def _address(bucket: EmbeddedBucket) -> tuple[str, int]:
    host, _, port = bucket.endpoint_url.removeprefix("http://").partition(":")
    return host, int(port)
