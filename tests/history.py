"""Runs for tests, written into a real ledger as a server writes them: folded, one transaction per event."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from flip_observability.constants import FlareEvents, FlipEvents, OwnEvents
from flip_observability.ledger import Entry, Ledger, OutboxItem
from flip_observability.lifecycle import Event, RunState, Scalar


@dataclass
class Run:
    """A run that happens step by step. Times are seconds after ``begin``."""

    ledger: Ledger
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    model_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    begin: float = field(default_factory=lambda: time.time() - 600)
    net_id: str = "net-1"
    run_dir: str = "/nowhere"
    tells_hub: bool = True
    now: float = 0.0

    def __post_init__(self) -> None:
        self._state = RunState(self.run_id)
        columns = {"job_id": self.run_id, "model_id": self.model_id, "net_id": self.net_id, "run_dir": self.run_dir}
        self.ledger.append(Entry(self.run_id, self.begin, run=columns))

    def at(self, seconds: float, name: str, **attrs: Scalar) -> None:
        self.now = seconds
        event = Event(name, self.begin + seconds, attrs)
        effects = self._state.apply(event)
        outbox: tuple[OutboxItem, ...] = ()
        if effects.status is not None and self.tells_hub:
            outbox = (OutboxItem(self.model_id, "status", {"status": effects.status.value}, effects.final),)
        final = effects.status.value if effects.final and effects.status else None
        self.ledger.append(
            Entry(
                self.run_id,
                event.time,
                event,
                tuple(effects.facts),
                self._state.columns(),
                effects.problems,
                final,
                "job" if final else None,
                outbox,
            )
        )

    def tell(self, kind: str, payload: Mapping[str, object]) -> None:
        item = OutboxItem(self.model_id, kind, payload)
        self.ledger.append(Entry(self.run_id, self.begin + self.now, outbox=(item,)))

    def deliver(self, after: float = 2.0, outcome: str = "200") -> None:
        """Let the hub, or who stands in for it, accept everything that waits."""
        while rows := self.ledger.lease("test", self.begin + self.now, 10.0, 100):
            for row in rows:
                self.ledger.settle(row, now=row.created + after, state="delivered", outcome=outcome)

    def reject(self, outcome: str = "422") -> None:
        """Let the hub refuse everything that waits."""
        while rows := self.ledger.lease("test", self.begin + self.now, 10.0, 100):
            for row in rows:
                problem = "hub_rejected" if row.kind == "status" else None
                self.ledger.settle(row, now=row.created + 1, state="rejected", outcome=outcome, problem=problem)

    def train(self, seconds_by_client: Mapping[str, float], rounds: int = 2, workflow: str = "controller") -> None:
        """A federated training: every client takes its time, a round lasts as long as the slowest and a second."""
        self.at(0, FlareEvents.START_RUN)
        self.at(1, FlipEvents.TRAINING_INITIATED)
        self.at(2, FlareEvents.INITIAL_MODEL_LOADED)
        self.at(3, FlareEvents.START_WORKFLOW, workflow=workflow)
        self.at(3, FlareEvents.TRAINING_STARTED)
        start = 4.0
        for number in range(1, rounds + 1):
            self.play_round(number, rounds, start, seconds_by_client)
            start += max(seconds_by_client.values()) + 1
        self.at(start, FlareEvents.END_WORKFLOW)

    def play_round(self, number: int, rounds: int, start: float, seconds_by_client: Mapping[str, float]) -> None:
        self.at(start, FlareEvents.ROUND_STARTED, round=number, total_rounds=rounds)
        for client in seconds_by_client:
            self.at(
                start, FlareEvents.AFTER_TASK_DATA_FILTER, client=client, task="train", task_id=f"{client}-{number}"
            )
        for client, seconds in sorted(seconds_by_client.items(), key=lambda item: item[1]):
            task_id = f"{client}-{number}"
            self.at(
                start + seconds, FlareEvents.BEFORE_PROCESS_SUBMISSION, client=client, task_id=task_id, return_code="OK"
            )
            self.at(start + seconds, FlareEvents.AFTER_CONTRIBUTION_ACCEPT, client=client, accepted=True)

    def finish(self, status: str = "RESULTS_UPLOADED") -> None:
        after = self.now
        self.at(after + 1, FlareEvents.ABOUT_TO_END_RUN)
        self.at(after + 1, FlipEvents.RESULTS_UPLOAD_STARTED)
        if status == "RESULTS_UPLOADED":
            self.at(after + 3, FlipEvents.RESULTS_UPLOAD_COMPLETED, bytes=2_048, files=3)
            receipt = {
                "results_uri": f"s3://results/{self.model_id}/20250601_120000.zip",
                "results_bytes": 2_048,
                "results_files": 3,
                "results_crc32": "3610a686",
            }
            self.ledger.append(Entry(self.run_id, self.begin + after + 3, run=receipt))
        else:
            self.at(after + 3, OwnEvents.UPLOAD_FAILED, reason="access_denied", exception_type="ResultsUploadError")
        self.at(after + 4, FlareEvents.END_RUN, status=status)
