"""A small site of real parts: event handler and persist component in a process of their own, and an observer's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from drills import ROOT
from drills.components import FOLDER_VARIABLE
from drills.judge import FINALS, Run
from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.demo.hub import Contract, EmbeddedHub
from flip_observability.demo.runner import job_environment
from flip_observability.ledger import FILE_NAME, Ledger, LedgerError
from poc import wait_until
from s3_faults import FaultProxy

CANARY = "Edeltraud Beispiel, accession 7731-0042"
"""A patient, who is named wherever the job's own code can fail."""
STEP_SECONDS = 120.0


@dataclass(frozen=True)
class BenchOptions:
    """What a bench is made of.

    Args:
        contract: of the hub.
        host: the address of the hub.
        hub_url: what the processes are told instead of the hub's own URL (something in front of it).
        ledger: the ledger's folder; one of the bench's own when None.
        results: where results go; the bucket when None.
        variables: more of the processes' environment.
        prefix: of the processes' command lines: another user, another network.
    """

    contract: Contract = "2026-05"
    host: str = "127.0.0.1"
    hub_url: str = ""
    ledger: Path | None = None
    results: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()


class Bench:
    """Hub, bucket with a proxy before it, ledger, job processes, observers.

    Args:
        home: an empty folder.
        times: where the stopwatch writes.
        options: see there.
    """

    def __init__(self, home: Path, times: Path, options: BenchOptions) -> None:
        home.mkdir(parents=True)
        self.home, self.times, self.options = home, times, options
        self.ledger_dir = options.ledger or home / "ledger"
        self.hub = EmbeddedHub(options.contract, host=options.host)
        self.bucket = EmbeddedBucket(f"drills-{uuid.uuid4().hex[:8]}")
        self.variables: dict[str, str] = {}
        self.jobs: list[Job] = []
        self._stack = contextlib.ExitStack()
        self._children: list[subprocess.Popen[bytes]] = []
        self._pages: list[bytes] = []
        self.port = 0

    def __enter__(self) -> Bench:
        self._stack.enter_context(self.hub)
        self._stack.enter_context(self.bucket)
        host, _, port = self.bucket.endpoint_url.removeprefix("http://").partition(":")
        self.proxy = FaultProxy((host, int(port)))
        self._stack.callback(self.proxy.stop)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(child.pid)
                for victim in [*process.children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        victim.kill()
        for child in self._children:
            child.wait(10)
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    pipe and pipe.close()
        self.hub.heal()
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """What the processes are told."""
        results = self.options.results
        return job_environment(
            {
                "LOCAL_DEV": "false",
                "NET_ID": "bench",
                "FLIP_API_INTERNAL_URL": self.options.hub_url or self.hub.url,
                "INTERNAL_SERVICE_KEY_HEADER": self.hub.header,
                "INTERNAL_SERVICE_KEY": self.hub.key,
                "FLIP_HUB_CONTRACT": self.hub.contract,
                "UPLOADED_FEDERATED_DATA_BUCKET": results.as_uri() if results else self.bucket.destination,
                "FLIP_OBSERVABILITY_DIR": str(self.ledger_dir),
                **self.bucket.environment,
                "AWS_ENDPOINT_URL_S3": self.proxy.url,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
                FOLDER_VARIABLE: str(self.times),
                **self.options.variables,
                **self.variables,
            }
        )

    # -- processes ---------------------------------------------------------------------------------------------------

    def start(self, name: str, *command: str, talks: bool = False) -> subprocess.Popen[bytes]:
        """Start a process of the bench; what it logs goes to a file."""
        with (self.home / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                [*self.options.prefix, sys.executable, "-u", *command],
                env=self.environment,
                cwd=self.home,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else log,
                stderr=log,
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def serve(self) -> subprocess.Popen[bytes]:
        """An observer, as ``flip-obs serve``; returns when it has the ledger."""
        self.ledger_dir.mkdir(parents=True, exist_ok=True)
        self.port = _free_port()
        child = self.start("serve", "-m", "flip_observability.cli", "serve", "--port", str(self.port))
        wait_until(lambda: child.poll() is not None or self.is_observed(), 60, "the observer")
        assert child.poll() is None, self.log("serve")[-2_000:]
        return child

    def is_observed(self) -> bool:
        """Whether a living observer has the ledger."""
        with contextlib.suppress(LedgerError), Ledger(self.ledger_dir, read_only=True) as ledger:
            return ledger.live_observer(time.time()) is not None
        return False

    def job(self, *options: str, model_id: str | None = None) -> Job:
        """A job process, which has not begun yet (options of ``python -m drills.worker``)."""
        job = Job(self, model_id or str(uuid.uuid4()), *options)
        self.jobs.append(job)
        return job

    def log(self, name: str) -> str:
        """What a process logged."""
        return (self.home / f"{name}.log").read_text(errors="replace")

    # -- what became of it -------------------------------------------------------------------------------------------

    def row(self, run_id: str) -> dict[str, Any]:
        """The ledger's row of a run."""
        with Ledger(self.ledger_dir, read_only=True) as ledger:
            return ledger.run(run_id) or {}

    def read_archives(self, model_id: str) -> dict[str, bytes]:
        """Content of every archive of a model."""
        if self.options.results is not None:
            return {path.name: path.read_bytes() for path in (self.options.results / model_id).glob("*.zip")}
        client = self.bucket.client()
        keys = [item.key for item in self.bucket.objects() if f"/{model_id}/" in item.key]
        return {key: client.get_object(Bucket=self.bucket.name, Key=key)["Body"].read() for key in keys}

    def metrics(self) -> str:
        """The observer's page."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as page:
            text = page.read()
        self._pages.append(text)
        return str(text.decode())

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have these labels."""
        total = 0.0
        for line in self.metrics().splitlines():
            key, _, value = line.rpartition(" ")
            if key.partition("{")[0] == name and all(f'{label}="{text}"' in key for label, text in labels.items()):
                total += float(value)
        return total

    def flip_obs(self, *arguments: str) -> str:
        """The output of the command line."""
        done = subprocess.run(
            [sys.executable, "-m", "flip_observability.cli", *arguments],
            env=self.environment,
            cwd=self.home,
            capture_output=True,
            timeout=60,
            check=False,
        )
        return done.stdout.decode() + done.stderr.decode()

    # -- for the judge -----------------------------------------------------------------------------------------------

    @property
    def secrets(self) -> list[str]:
        return [self.hub.key, self.bucket.environment["AWS_SECRET_ACCESS_KEY"], CANARY]

    def unfinished_uploads(self) -> list[str]:
        """Keys of multipart uploads that nobody ended."""
        return self.bucket.unfinished_uploads()

    def texts(self) -> Mapping[str, bytes]:
        """What was logged, served and told."""
        found = {path.name: path.read_bytes() for path in self.home.glob("*.log")}
        found["what the hub was told"] = repr([record.payload for record in self.hub.records]).encode()
        found["the metrics"] = b"".join(self._pages)
        return found


class Job:
    """A job process: it does one step after the other, as it is told.

    Args:
        bench: where.
        model_id: of the model.
        options: of ``python -m drills.worker``.
    """

    def __init__(self, bench: Bench, model_id: str, *options: str) -> None:
        self.bench, self.model_id, self.job_id = bench, model_id, str(uuid.uuid4())
        self.name = f"job-{len(bench.jobs) + 1}"
        root = bench.home / self.name
        command = ("-m", "drills.worker", str(root), self.job_id, model_id, *options)
        self.process = bench.start(self.name, *command, talks=True)

    def tell(self, step: str) -> None:
        """Ask for a step; do not wait for it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{step}\n".encode())
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait until the oldest step that was asked for is done."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the job process ended: {self.bench.log(self.name)[-3_000:]}"
        return dict(json.loads(line))

    def do(self, *steps: str) -> None:
        """Do steps: ``start``, ``round``, ``abort``, ``panic``, ``end``."""
        for step in steps:
            self.tell(step)
            self.answer()

    def leave(self) -> None:
        """End, as NVFLARE ends its job processes."""
        self.tell("leave")
        self.process.wait(STEP_SECONDS)

    def kill(self) -> float:
        """SIGKILL. Returns when (epoch seconds)."""
        children = psutil.Process(self.process.pid).children(recursive=True) if self.bench.options.prefix else []
        for child in children:
            child.send_signal(signal.SIGKILL)
        self.process.kill()
        self.process.wait(10)
        return time.time()

    def run(self, since: float | None = None, **expected: Any) -> Run:
        """The run, to be judged."""
        since = time.time() if since is None else since
        return Run(self.model_id, self.job_id, since, self.bench.hub, self.bench.read_archives, **expected)

    @property
    def told(self) -> list[str]:
        """The final statuses that the hub has accepted."""
        return [status for status in self.bench.hub.statuses(self.model_id) if status in FINALS]

    @property
    def row(self) -> dict[str, Any]:
        """Its row in the ledger."""
        return self.bench.row(self.job_id)

    @property
    def run_dir(self) -> Path:
        """Where its files are."""
        return self.bench.home / self.name / self.job_id


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the ledger's write lock."""
    import sqlite3

    db = sqlite3.connect(directory / FILE_NAME, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        db.execute("ROLLBACK")
        db.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
