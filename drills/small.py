"""A small site: a real hub and bucket, a real ledger, and jobs that are processes of their own, without a federation.

What needs no server and no clients is drilled here: a job starts in a moment, does event by event what it is told, and
can be killed between any two of them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from drills.components import FOLDER_VARIABLE
from drills.judge import FINALS, Run
from drills.pages import sum_of
from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.demo.hub import Contract, EmbeddedHub
from flip_observability.doctor import CHECKS, Finding, Patient, examine
from flip_observability.ledger import FILE_NAME, Ledger
from poc import wait_until
from s3_faults import FaultProxy

START_SECONDS = 90.0
ANSWER_SECONDS = 400.0
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["drills.small_job", "boto3"])


class Process:
    """A process of a small site, told what to do over a pipe.

    Args:
        target, arguments: its function, which gets the pipe as its last argument. It says hello first.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=target, args=(*arguments, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.hello: Any = self._receive(START_SECONDS)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def tell(self, *command: Any) -> None:
        """Ask for something, and do not wait."""
        self._pipe.send(command)

    def answer(self) -> Any:
        """What the oldest question that is still open was answered with."""
        return self._receive(ANSWER_SECONDS)[1]

    def ask(self, *command: Any) -> Any:
        """Ask for something, and wait for the answer."""
        self.tell(*command)
        return self.answer()

    def kill(self, number: int = signal.SIGKILL) -> float:
        """End it without a word. Returns when (epoch seconds)."""
        os.kill(self.pid, number)
        now = time.time()
        self._process.join(20)
        return now

    def leave(self) -> None:
        """Let it end by itself."""
        with contextlib.suppress(OSError):
            self.tell("exit")
        self._process.join(20)

    def close(self) -> None:
        """End it, however it is."""
        if self._process.is_alive():
            self._process.kill()
            self._process.join(20)
        self._pipe.close()

    def _receive(self, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            raise TimeoutError("a process of the drill did not answer")
        return self._pipe.recv()


class Job(Process):
    """A job of a small site, which has begun nothing yet.

    Args:
        site: where.
        spec: a :class:`drills.small_job.JobSpec`.
    """

    def __init__(self, site: SmallSite, spec: Any) -> None:
        from drills.small_job import run_job  # not before the fork server has it

        self.site, self.model_id, self.job_id = site, str(spec.model_id), str(spec.job_id)
        self.run_dir = Path(spec.root) / self.job_id
        self.rounds = 0
        super().__init__(run_job, spec)

    def begin(self) -> Job:
        """Everything that precedes the first round."""
        self.ask("begin")
        return self

    def train(self, rounds: int = 1) -> Job:
        """Have some rounds."""
        for _ in range(rounds):
            self.rounds += 1
            self.ask("round", self.rounds)
        return self

    def end(self, *, abort: bool = False) -> float:
        """END_RUN. Returns the seconds that it took."""
        return float(self.ask("end", abort))

    def run(self, since: float | None = None, **expected: Any) -> Run:
        """The run, to be judged; ``since`` the fault or the recovery, which is now when None."""
        when = time.time() if since is None else since
        return Run(self.model_id, self.job_id, when, self.site.hub, self.site.archives, **expected)

    @property
    def told(self) -> list[str]:
        """The final statuses that the hub has accepted."""
        return [status for status in self.site.hub.statuses(self.model_id) if status in FINALS]

    @property
    def row(self) -> dict[str, Any]:
        """Its row in the ledger."""
        with Ledger(self.site.ledger_dir, read_only=True) as ledger:
            return ledger.run(self.job_id) or {}


class SmallSite:
    """What runs tell something to, in this process; jobs and observers are processes of their own.

    Args:
        home: an empty folder.
        times: where jobs write down how long they held a thread.
        contract, host: of the hub.
        hub_url: what the processes are told instead of the hub's own URL: something in front of it.
        ledger_dir: the ledger's folder.
        results: a folder for the results, in place of the bucket.
        variables: more of the environment of its processes.
        network: the name space of the network that they live in.
    """

    def __init__(
        self,
        home: Path,
        times: Path,
        *,
        contract: Contract = "2026-05",
        host: str = "127.0.0.1",
        hub_url: str = "",
        ledger_dir: Path | None = None,
        results: Path | None = None,
        variables: Mapping[str, str] | None = None,
        network: str = "",
    ) -> None:
        (home / "tmp").mkdir(parents=True)
        self.home, self.times, self.network, self.results = home, times, network, results
        self.ledger_dir = ledger_dir or home / "ledger"
        self.canary = f"Edeltraud Beispiel, accession {uuid.uuid4().hex[:12]}"
        self.hub = EmbeddedHub(contract, host=host)
        self.bucket = EmbeddedBucket(f"drills-{uuid.uuid4().hex[:8]}")
        self.log = home / "log.txt"
        self._hub_url, self._more = hub_url, dict(variables or {})
        self._stack = contextlib.ExitStack()
        self._processes: list[Process] = []
        self._ports: list[int] = []

    def __enter__(self) -> SmallSite:
        self._stack.enter_context(self.hub)
        self._stack.enter_context(self.bucket)
        host, _, port = self.bucket.endpoint_url.removeprefix("http://").partition(":")
        self.proxy = FaultProxy((host, int(port)))
        self._stack.callback(self.proxy.stop)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.close()
        self._stack.close()

    @property
    def variables(self) -> dict[str, str]:
        """What its processes are told."""
        return {
            **self.bucket.environment,
            "AWS_ENDPOINT_URL_S3": self.proxy.url,
            "LOCAL_DEV": "false",
            "FLIP_API_INTERNAL_URL": self._hub_url or self.hub.url,
            "INTERNAL_SERVICE_KEY": self.hub.key,
            "UPLOADED_FEDERATED_DATA_BUCKET": self.results.as_uri() if self.results else self.bucket.destination,
            "FLIP_HUB_CONTRACT": self.hub.contract,
            "FLIP_OBSERVABILITY_DIR": str(self.ledger_dir),
            "NET_ID": "net-1",
            FOLDER_VARIABLE: str(self.times),
            "TMPDIR": str(self.home / "tmp"),
            **self._more,
        }

    # -- processes ---------------------------------------------------------------------------------------------------

    def job(self, *, variables: Mapping[str, str] | None = None, **options: Any) -> Job:
        """Start a job process. ``options`` are those of its specification."""
        from drills.small_job import JobSpec

        job_id = str(uuid.uuid4())
        given: dict[str, Any] = {"job_id": job_id, "model_id": str(uuid.uuid4()), "root": self.home / job_id}
        given |= {"network": self.network, "log": self.log, "environment": {**self.variables, **(variables or {})}}
        job = Job(self, JobSpec(**given | options))
        self._processes.append(job)
        return job

    def observer(self, archives: Mapping[str, Path] | None = None) -> Process:
        """Start an observer with a sentinel; it has the ledger when this returns.

        Args:
            archives: job id to archive, for one in a server that has these in its store.
        """
        from drills.small_job import ObserverSpec, observe

        self.ledger_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        spec = ObserverSpec(self.ledger_dir, self.variables, self.log, self.network, archives)
        observer = Process(observe, spec)
        self._processes.append(observer)
        self._ports.append(observer.hello)
        return observer

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The ledger, locked by a process that does not let go."""
        from drills.small_job import hold_lock

        keeper = Process(hold_lock, self.ledger_dir / FILE_NAME)
        self._processes.append(keeper)
        try:
            yield
        finally:
            keeper.leave()

    def readable_by(self, uid: int, paths: list[Path]) -> list[Path]:
        """Which of these files a process of another user can read."""
        from drills.small_job import read_as

        reader = Process(read_as, uid, paths)
        self._processes.append(reader)
        reader.leave()
        return list(reader.hello)

    # -- what became of it -------------------------------------------------------------------------------------------

    def archives(self, model_id: str) -> dict[str, bytes]:
        """Content of every archive of a model."""
        if self.results is not None:
            return {path.name: path.read_bytes() for path in (self.results / model_id).glob("*.zip")}
        client = self.bucket.client()
        keys = [item.key for item in self.bucket.objects() if f"/{model_id}/" in item.key]
        return {key: client.get_object(Bucket=self.bucket.name, Key=key)["Body"].read() for key in keys}

    def page(self, path: str = "/metrics") -> str:
        """A page of the latest observer."""
        url = f"http://127.0.0.1:{self._ports[-1]}{path}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have these labels."""
        return sum_of(self.page(), name, **labels)

    def wait_for_metric(self, name: str, least: float = 1.0, **labels: str) -> None:
        """Wait until a metric has come to a value."""

        def there() -> bool:
            with contextlib.suppress(OSError):
                return self.metric(name, **labels) >= least
            return False

        wait_until(there, 30, f"{name} {labels}")

    def doctor(self, check: str) -> Finding:
        """What ``flip-obs doctor`` finds in the ledger."""
        (report,) = examine(Patient(self.ledger_dir), {check: CHECKS[check]})
        return report.finding

    # -- for the judge -----------------------------------------------------------------------------------------------

    def unfinished_uploads(self) -> list[str]:
        """Keys of multipart uploads that nobody ended."""
        return self.bucket.unfinished_uploads()

    @property
    def secrets(self) -> list[str]:
        return [self.hub.key, self.bucket.environment["AWS_SECRET_ACCESS_KEY"], self.canary]

    def texts(self) -> Mapping[str, bytes]:
        """What was logged, served and told."""
        found = {"what the hub was told": repr([record.payload for record in self.hub.records]).encode()}
        if self.log.exists():
            found["the log"] = self.log.read_bytes()
        if self._ports:
            with contextlib.suppress(OSError):
                found["the metrics"] = self.page().encode()
        return found
