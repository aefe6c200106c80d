"""The demo: a hub, a bucket, a real federated job between them, watched, and judged by the hub and the bucket alone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.text import Text

from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.demo.hub import Contract, EmbeddedHub
from flip_observability.demo.job import Workflow, has_lost_a_site, kill_job, prepare_workspace, write_job
from flip_observability.demo.scenarios import OUTAGE_DONE, OUTAGE_REQUEST, SCENARIOS, Scenario
from flip_observability.demo.verdict import Archive, Evidence, inspect_archive, judge
from flip_observability.demo.view import Glance, LedgerReader, Summary, View, is_over, summarise
from flip_observability.hub import Dispatcher, HubTransport
from flip_observability.ledger import Ledger, LedgerError
from flip_observability.settings import Settings
from flip_observability.tracing import shared

DEFAULT_FOLDER = Path("demo-run")
JOB_SECONDS = 240.0
"""After this the job's process is killed: the simulator must not hold the demo for ever."""
DELIVERY_SECONDS = 60.0
"""For what is still in the outbox when the job's process has ended."""
FLUSH_SECONDS = 5.0
"""For the spans of those deliveries, where a collector is configured."""
_LOOK_SECONDS = 0.25
_PACKAGES = {"moto": "moto[server]", "flask": "moto[server]", "numpy": "numpy", "sklearn": "scikit-learn"}
_FORGET = ("AWS_", "FLIP_HUB", "FLIP_API", "INTERNAL_SERVICE_KEY", "UPLOADED_FEDERATED")
"""Beginnings of variables of the user's own environment that must not lead the demo to other places."""


class DemoError(Exception):
    """The demo cannot be run. The text says what to do."""


@dataclass(frozen=True)
class _Demo:
    """What one demo is made of."""

    scenario: Scenario
    model_id: str
    contract: Contract
    folder: Path
    ledger: Path
    hub: EmbeddedHub
    bucket: EmbeddedBucket

    @property
    def log(self) -> Path:
        return self.folder / "job.log"

    @property
    def control(self) -> Path:
        return self.folder / "control"

    def variables(self) -> dict[str, str]:
        """The environment variables of the job, as a FLIP server has them."""
        return {
            "LOCAL_DEV": "false",
            "FLIP_API_INTERNAL_URL": self.hub.url,
            "INTERNAL_SERVICE_KEY_HEADER": self.hub.header,
            "INTERNAL_SERVICE_KEY": self.hub.key,
            "FLIP_HUB_CONTRACT": self.contract,
            "UPLOADED_FEDERATED_DATA_BUCKET": self.bucket.destination,
            "FLIP_OBSERVABILITY_DIR": str(self.ledger),
            **self.bucket.environment,
        }


def run_demo(
    scenario: str,
    *,
    folder: Path | None = None,
    ledger_dir: Path | None = None,
    workflow: Workflow = "fedavg",
    contract: Contract = "2026-05",
    pace: float = 1.0,
    console: Console | None = None,
) -> int:
    """Run a scenario and say how it went.

    Args:
        scenario: a name of :data:`~flip_observability.demo.scenarios.SCENARIOS`.
        folder: for the job, its log and the simulator's workspace; made. A new one below ``./demo-run`` when None.
        ledger_dir: the ledger's folder; ``FLIP_OBSERVABILITY_DIR``, else ``./demo-run/observability``, when None.
        workflow: NVFLARE's ``fedavg`` or ``sag`` (ScatterAndGather).
        contract: of the embedded hub.
        pace: seconds that a round of training is made to last on the largest site.
        console: to show it on; standard output when None.

    Returns:
        0 when the hub and the bucket hold what the scenario must give, otherwise 1.

    Raises:
        DemoError: an unknown scenario, or packages of the ``demo`` extra are missing.
    """
    _, summary = stage(
        scenario,
        folder=folder,
        ledger_dir=ledger_dir,
        workflow=workflow,
        contract=contract,
        pace=pace,
        console=console or Console(highlight=False),
    )
    return 1 if summary.differences else 0


def stage(
    scenario: str,
    *,
    folder: Path | None,
    ledger_dir: Path | None,
    workflow: Workflow,
    contract: Contract,
    pace: float,
    console: Console,
) -> tuple[Evidence, Summary]:
    """Run a scenario and return what the hub and the bucket recorded; arguments and errors as :func:`run_demo`."""
    if scenario not in SCENARIOS:
        raise DemoError(f"There is no scenario {scenario!r}. There are: {', '.join(SCENARIOS)}")
    _require_packages()
    chosen, model_id = SCENARIOS[scenario], str(uuid.uuid4())
    folder = _make_folder(folder, scenario)
    ledger = (ledger_dir or _default_ledger()).resolve()
    with (
        _no_proxy(),
        EmbeddedHub(contract) as hub,
        EmbeddedBucket(refusing=chosen.refusing) as bucket,
    ):
        demo = _Demo(chosen, model_id, contract, folder, ledger, hub, bucket)
        demo.control.mkdir()
        write_job(folder / "job", model_id, chosen, workflow=workflow, pace=pace, control_dir=demo.control)
        prepare_workspace(folder / "workspace")
        view = View(console, chosen)
        with LedgerReader(ledger, model_id) as reader:
            with view.shown():
                view.say(f"scenario {chosen.name}: {chosen.story}")
                view.say(f"starting a federation of a server and three sites (log: {demo.log})")
                _run_job(demo, view, reader)
                _deliver_the_rest(demo, view, reader)
            report, _ = reader.read()
        run_id = report.run.run_id if report else ""
        evidence, summary = _conclude(demo, run_id)
        summarise(console, summary)
        if summary.differences:
            _show_log_tail(demo, console)
        return evidence, summary


# -- the job -----------------------------------------------------------------------------------------------------------


def _run_job(demo: _Demo, view: View, reader: LedgerReader) -> None:
    command = [
        sys.executable,
        "-m",
        "flip_observability.demo.job",
        str(demo.folder / "job"),
        str(demo.folder / "workspace"),
    ]
    with demo.log.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=job_environment(demo.variables()),
            start_new_session=True,
        )
        try:
            _watch(demo, view, reader, process)
        finally:
            kill_job(process)


def job_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what could lead the demo to real hubs and buckets, and with ``variables``."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_FORGET)} | dict(variables)


def _watch(demo: _Demo, view: View, reader: LedgerReader, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + JOB_SECONDS
    while process.poll() is None:
        if time.monotonic() > deadline:
            view.say(f"the job did not end within {JOB_SECONDS:.0f} s and is killed")
            return
        if has_lost_a_site(demo.log):
            view.say("NVFLARE's simulator could not start one of its sites: the job is killed. Please run it again")
            return
        _grant_outage(demo, view)
        _look(demo, view, reader)
        time.sleep(_LOOK_SECONDS)
    _look(demo, view, reader)


def _grant_outage(demo: _Demo, view: View) -> None:
    done = demo.control / OUTAGE_DONE
    if done.exists() or not (demo.control / OUTAGE_REQUEST).exists():
        return
    # What the run said before the outage is to arrive before it, so that the story is the same each time.
    demo.hub.wait(lambda hub: bool({"TRAINING_STARTED", "RUNNING"} & set(hub.statuses(demo.model_id))), timeout=10.0)
    demo.hub.down()
    view.say("the hub is down")
    done.touch()


def _look(demo: _Demo, view: View, reader: LedgerReader) -> None:
    report, accuracy = reader.read()
    view.update(Glance(report, accuracy, demo.hub.records, demo.hub.is_up, demo.bucket.records))


# -- afterwards --------------------------------------------------------------------------------------------------------


def _deliver_the_rest(demo: _Demo, view: View, reader: LedgerReader) -> None:
    """What the observer does on a server: deliver what the job's process left in the outbox."""
    if not demo.hub.is_up:
        demo.hub.up()
        view.say("the run has ended, the hub is back")
    try:
        ledger = Ledger(demo.ledger)
    except LedgerError as error:
        view.say(f"{error}")
        return
    with ledger:
        settings = Settings(**demo.variables())  # type: ignore[arg-type]
        transport = HubTransport(settings)
        dispatcher = Dispatcher(ledger, transport, settings)
        # An observer that had seen the outage would find the hub well with its next probe, and release what waits.
        ledger.release_backoff(time.time())
        deadline = time.monotonic() + DELIVERY_SECONDS
        while _waiting(ledger, demo) and time.monotonic() < deadline:
            dispatcher.run_once()
            _look(demo, view, reader)
            if _waiting(ledger, demo):
                time.sleep(_LOOK_SECONDS)
        transport.close()
        shared(settings).flush(FLUSH_SECONDS)
    _look(demo, view, reader)


def _waiting(ledger: Ledger, demo: _Demo) -> bool:
    """Whether the hub is still to hear something: a row of the outbox, or the final status of a run that has begun."""
    if any(row.model_id == demo.model_id for row in ledger.outbox(states=["pending"])):
        return True
    return ledger.open_run_of_model(demo.model_id) is not None and not is_over(demo.hub.statuses(demo.model_id))


def _conclude(demo: _Demo, run_id: str) -> tuple[Evidence, Summary]:
    archives: list[Archive] = []
    copy: Path | None = None
    for item in demo.bucket.objects():
        copy = demo.bucket.download(item.key, demo.folder / f"results-{len(archives) + 1}.zip")
        archives.append(inspect_archive(item.key, copy))
    evidence = Evidence(
        model_id=demo.model_id,
        contract=demo.contract,
        hub=demo.hub.records,
        outages=demo.hub.outages,
        archives=archives,
        unfinished=demo.bucket.unfinished_uploads(),
        bucket=demo.bucket.records,
        prefix=demo.bucket.prefix,
    )
    first = archives[0] if archives else None
    summary = Summary(
        scenario=demo.scenario,
        run_id=run_id,
        statuses=demo.hub.statuses(demo.model_id),
        uri=f"s3://{demo.bucket.name}/{first.key}" if first else "",
        size=first.size if first else 0,
        checksum=demo.bucket.checksum(first.key) if first else "",
        copy=copy,
        ledger=demo.ledger,
        log=demo.log,
        differences=judge(demo.scenario, evidence),
    )
    return evidence, summary


def _show_log_tail(demo: _Demo, console: Console) -> None:
    lines = demo.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    console.print(Text("\nThe end of the job's log:\n" + "\n".join(lines)), soft_wrap=True)


# -- preparations ------------------------------------------------------------------------------------------------------


def _require_packages() -> None:
    missing = sorted({package for module, package in _PACKAGES.items() if find_spec(module) is None})
    if missing:
        raise DemoError(
            f"The demo needs {', '.join(missing)}. Install the demo extra: pip install 'flip-observability[demo]'"
        )


def _make_folder(folder: Path | None, scenario: str) -> Path:
    if folder is None:
        folder = DEFAULT_FOLDER / f"{time.strftime('%Y%m%d_%H%M%S')}-{scenario}-{os.getpid()}"
    folder = folder.resolve()
    folder.mkdir(parents=True)
    return folder


def _default_ledger() -> Path:
    return Path(os.environ.get("FLIP_OBSERVABILITY_DIR") or DEFAULT_FOLDER / "observability")


@contextlib.contextmanager
def _no_proxy() -> Iterator[None]:
    """A proxy of the user's cannot reach servers that live in this process."""
    before = {name: os.environ.get(name) for name in ("NO_PROXY", "no_proxy")}
    for name, value in before.items():
        os.environ[name] = ",".join(filter(None, [value, "127.0.0.1", "localhost"]))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
