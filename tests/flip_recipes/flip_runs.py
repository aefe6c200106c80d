"""Whole runs of FLIP's job types in NVFLARE's simulator, by FLIP's own recipes: as they are, and adopted.

FLIP's code runs in an environment of its own (``scripts/flip-env.sh``), in other processes than the tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.demo.hub import HubRecord
from flip_observability.demo.job import has_lost_a_site, kill_job
from recording_hub import Call, RecordingHub, calls

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
SCRIPT = REPOSITORY / "scripts" / "flip-env.sh"
SITES = 2
RUN_SECONDS = 240.0
ATTEMPTS = 3
"""NVFLARE's simulator now and then loses a site when it starts, and the run then waits for ever: it is begun anew."""
PASSED_ON = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE")
"""What a run gets of the environment of the tests; nothing that somebody has set for a server of theirs."""


@dataclass(frozen=True)
class Flip:
    """Where FLIP's code is, and a copy of this package installed for it.

    Attributes:
        python: of the environment that ``scripts/flip-env.sh`` makes.
        package: folder with this package as its wheel installs it, to be put on the path.
    """

    python: Path
    package: Path

    def run(self, *command: str | Path, environment: Mapping[str, str] | None = None) -> str:
        """Run a command to its end and return what it printed.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(
            [str(part) for part in (self.python, *command)],
            env={**base_environment(), "PYTHONPATH": str(self.package), **(environment or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout[-2_000:]}\n{done.stderr[-4_000:]}"
        return done.stdout

    def flip_obs(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> str:
        """Run ``flip-obs`` as it is installed beside FLIP's code."""
        return self.run("-m", "flip_observability.cli", *arguments, environment=environment)


def base_environment() -> dict[str, str]:
    """What the processes of a run get of the environment of the tests."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


@pytest.fixture(scope="session")
def flip(tmp_path_factory: pytest.TempPathFactory) -> Flip:
    """FLIP's environment. A test that needs it skips where it is missing, and says how to make it."""
    found = subprocess.run([SCRIPT, "--python"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("FLIP's environment is not there: make it with scripts/flip-env.sh, or run make test-flip")
    package = tmp_path_factory.mktemp("package")
    here = Flip(Path(found.stdout.strip()), package)
    # A copy without what editors and builds leave; pip builds in the folder that it is given.
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    offline = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    here.run("-m", "pip", "install", *offline, "--target", package, source)
    return here


@dataclass(frozen=True)
class Outcome:
    """What is left of a run.

    Attributes:
        records: what the hub was sent, in order.
        archives: every object of the bucket, by its key.
        seconds: from the simulator's start to its end.
        log: what the simulator printed.
        advice: what ``flip-obs adopt`` printed; empty for a run that was not adopted.
    """

    model_id: str
    folder: Path
    records: list[HubRecord]
    archives: Mapping[str, bytes]
    seconds: float
    log: str
    advice: str = ""

    @property
    def calls(self) -> list[Call]:
        return calls(self.records)

    @property
    def statuses(self) -> list[str]:
        return [record.status for record in self.records if record.accepted and record.kind == "status"]

    @cached_property
    def members(self) -> dict[str, bytes]:
        """The files in the run's only archive."""
        assert len(self.archives) == 1, f"not one archive: {sorted(self.archives)}"
        (content,) = self.archives.values()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert archive.testzip() is None
            return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}

    def json(self, member: str) -> Any:
        return json.loads(self.members[member])


@dataclass
class Site:
    """A hub, a bucket and a job between them, before, while and after it runs.

    Attributes:
        kind: the job type.
        adopted: whether the job was adopted.
    """

    flip: Flip
    kind: str
    adopted: bool
    folder: Path
    hub: RecordingHub
    bucket: EmbeddedBucket
    variables: Mapping[str, str] = field(default_factory=dict)
    model_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    advice: str = ""

    @property
    def log(self) -> Path:
        return self.folder / "simulator.log"

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    @property
    def hold(self) -> Path:
        """While this file is there, training waits in its second round (diffusion: in its second phase)."""
        return self.folder / "hold"

    @property
    def environment(self) -> dict[str, str]:
        """What a FLIP server and its clients have in theirs."""
        home = self.folder / "home"
        images = self.folder / "images"
        (images / "net").mkdir(parents=True, exist_ok=True)
        home.mkdir(exist_ok=True)
        return {
            "HOME": str(home),
            "LOCAL_DEV": "false",
            "NET_ID": "net",
            "IMAGES_DIR": str(images),
            "FLIP_API_INTERNAL_URL": self.hub.url,
            "INTERNAL_SERVICE_KEY_HEADER": self.hub.header,
            "INTERNAL_SERVICE_KEY": self.hub.key,
            "UPLOADED_FEDERATED_DATA_BUCKET": self.bucket.destination,
            "FLIP_OBSERVABILITY_DIR": str(self.folder / "ledger"),
            "FLIP_TEST_HOLD": str(self.hold),
            "OMP_NUM_THREADS": "1",
            **self.bucket.environment,
            **self.variables,
        }

    def start(self) -> None:
        """Write the job, adopt it where that is wanted, and start the simulator."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        printed = self.flip.run(HERE / "write_job.py", self.kind, self.folder / "job", self.model_id)
        job = Path(printed.splitlines()[-1])
        if self.adopted:
            self.advice = self.flip.flip_obs("adopt", "--yes", job)
        command = [self.flip.python.with_name("nvflare"), "simulator", job, "-w", self.workspace]
        command += ["-n", str(SITES), "-t", str(SITES)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.folder,
                env={**base_environment(), "PYTHONPATH": str(self.flip.package), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.began = time.monotonic()

    def wait(self, condition: Callable[[], bool] = lambda: False) -> bool:
        """Wait until the run has ended or the condition holds. Returns whether a site was lost instead."""
        assert self.process is not None
        while self.process.poll() is None and not condition():
            if has_lost_a_site(self.log):
                return True
            assert time.monotonic() - self.began < RUN_SECONDS, f"does not end:\n{self.tail()}"
            time.sleep(0.1)
        return False

    def kill(self) -> None:
        """SIGKILL for the simulator and its sites."""
        if self.process is not None:
            kill_job(self.process)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6_000:]

    def outcome(self) -> Outcome:
        """What hub and bucket hold now."""
        client = self.bucket.client()
        found = {
            item.key: client.get_object(Bucket=self.bucket.name, Key=item.key)["Body"].read()
            for item in self.bucket.objects()
        }
        return Outcome(
            self.model_id,
            self.folder,
            self.hub.records,
            found,
            time.monotonic() - self.began,
            self.log.read_text(errors="replace"),
            self.advice,
        )


@contextlib.contextmanager
def site(flip: Flip, kind: str, adopted: bool, folder: Path, **variables: str) -> Iterator[Site]:
    """A hub, a bucket and a job that has not been started; whatever runs is killed at the end."""
    with RecordingHub() as hub, EmbeddedBucket() as bucket:
        place = Site(flip, kind, adopted, folder, hub, bucket, variables)
        try:
            yield place
        finally:
            place.kill()


def begin(place: Site, condition: Callable[[], bool] = lambda: False, *, held: bool = False) -> None:
    """Start the job and wait until it has ended or the condition holds.

    Args:
        place: of the job.
        condition: when to return before the end.
        held: whether training is to wait in its second round.
    """
    for _ in range(ATTEMPTS):
        place.start()
        if held:
            place.hold.touch()
        if not place.wait(condition):
            return
        place.kill()
    pytest.fail(f"NVFLARE's simulator has lost a site {ATTEMPTS} times:\n{place.tail()}")


def whole_run(flip: Flip, kind: str, folder: Path, *, adopted: bool, **variables: str) -> Outcome:
    """A run from its start to its end by itself."""
    with site(flip, kind, adopted, folder, **variables) as place:
        begin(place)
        return place.outcome()


@contextlib.contextmanager
def observed(place: Site) -> Iterator[None]:
    """``flip-obs serve`` beside a site, as it runs beside a FLIP server."""
    command = [str(place.flip.python), "-m", "flip_observability.cli", "serve", "--port", "0"]
    with (place.folder / "observer.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=place.folder,
            env={**base_environment(), "PYTHONPATH": str(place.flip.package), **place.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)
