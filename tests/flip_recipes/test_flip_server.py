"""FLIP's own job on a real server with this package in it: a whole run, one that is aborted, one whose process dies."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from comparison import differences
from flip_observability.demo.bucket import EmbeddedBucket
from flip_runs import HERE, Flip, Outcome, base_environment, flip
from poc import Poc
from recording_hub import RecordingHub
from waiting import wait_for

__all__ = ["flip"]

pytestmark = [pytest.mark.flip, pytest.mark.nvflare_job]


class FlipServer(Poc):
    """A server and two sites that run with FLIP's code; the server's parent has the observer."""

    def __enter__(self) -> FlipServer:
        return self

    def __init__(self, flip: Flip, home: Path, hub: RecordingHub, bucket: EmbeddedBucket) -> None:
        super().__init__(home, hub, bucket)
        self.flip, self.python = flip, str(flip.python)
        self.hold = home / "hold"
        (home / "images" / "poc").mkdir(parents=True)

    @property
    def environment(self) -> dict[str, str]:
        told = {name: value for name, value in super().environment.items() if name != "FLIP_HUB_CONTRACT"}
        return {
            **told,
            "PYTHONPATH": str(self.flip.package),
            "IMAGES_DIR": str(self.home / "images"),
            "FLIP_TEST_HOLD": str(self.hold),
            "OMP_NUM_THREADS": "1",
        }

    def start_all(self) -> None:
        for name in ("server", *self.clients):
            self.start(name, {**base_environment(), **self.environment})

    def submit_flip_job(self, kind: str, model_id: str, *, adopted: bool = True) -> str:
        """Export a recipe, adopt the job if that is wanted, submit it. Returns the job's id."""
        written = self.flip.run(HERE / "write_job.py", kind, self.home / f"job-{model_id}", model_id)
        job = written.splitlines()[-1]
        if adopted:
            self.flip.flip_obs("adopt", "--yes", job)
        with self.session() as session:
            return str(session.submit_job(job))

    def wait_for_second_round(self, model_id: str) -> None:
        """Until both sites' first results are in; training then waits for :attr:`hold` to go."""
        wait_for(lambda: len(self._results(model_id)) >= 2, 120, f"two results\n{self.log('server')[-4_000:]}")
        time.sleep(3)  # the round that follows has begun and its model is saved

    def outcome(self, kind: str, model_id: str, *, adopted: bool) -> Outcome:
        """Run a job to its end, and what hub and bucket have of it then."""
        began = time.monotonic()
        job_id = self.submit_flip_job(kind, model_id, adopted=adopted)
        self.wait_for_final(model_id, 180)
        with self.session() as session:
            session.monitor_job(job_id, timeout=60)
        objects = {key: self._object(key) for key in self.archives(model_id)}
        records = [record for record in self.hub.records if record.model_id == model_id]
        return Outcome(model_id, self.home, records, objects, time.monotonic() - began, self.log("server"))

    def _object(self, key: str) -> bytes:
        return self.bucket.client().get_object(Bucket=self.bucket.name, Key=key)["Body"].read()

    def _results(self, model_id: str) -> list[object]:
        events = [body.get("event_type") for body in self.hub.payloads(model_id, "logs")]
        return [event for event in events if event == "CLIENT_RESULT_RECEIVED"]


@pytest.fixture(scope="module")
def server(flip: Flip, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlipServer]:
    with (
        RecordingHub() as hub,
        EmbeddedBucket() as bucket,
        FlipServer(flip, tmp_path_factory.mktemp("server"), hub, bucket) as system,
    ):
        system.start_all()
        yield system


@pytest.fixture
def model_id(server: FlipServer) -> Iterator[str]:
    server.hold.unlink(missing_ok=True)
    yield str(uuid.uuid4())
    server.hold.unlink(missing_ok=True)


def test_a_whole_run(server: FlipServer, model_id: str) -> None:
    stock = server.outcome("standard", str(uuid.uuid4()), adopted=False)
    adopted = server.outcome("standard", model_id, adopted=True)
    print(f"on a server: FLIP's own {stock.seconds:.1f} s, adopted {adopted.seconds:.1f} s")
    found = differences("standard", stock, adopted)
    assert not found, "\n".join(found)
    assert adopted.statuses == ["INITIATED", "PREPARED", "RUNNING", "RESULTS_UPLOADED"]


def test_a_run_that_a_person_aborts(server: FlipServer, model_id: str) -> None:
    server.hold.touch()
    job_id = server.submit_flip_job("standard", model_id)
    server.wait_for_second_round(model_id)
    with server.session() as session:
        session.abort_job(job_id)
    server.hold.unlink()
    assert server.wait_for_final(model_id, 120)[0] == "STOPPED", server.log("server")[-6_000:]
    wait_for(lambda: server.archives(model_id), 60, "the results")
    assert server.final_statuses(model_id) == ["STOPPED"]


def test_a_run_whose_process_is_killed(server: FlipServer, model_id: str) -> None:
    server.hold.touch()
    job_id = server.submit_flip_job("standard", model_id)
    server.wait_for_second_round(model_id)
    server.wait_for_job_process(job_id).kill()
    assert server.wait_for_final(model_id, 120)[0] == "ERROR", server.log("server")[-6_000:]
    server.hold.unlink()
    wait_for(lambda: server.archives(model_id), 60, "the results")
    assert server.final_statuses(model_id) == ["ERROR"]
