"""What a drill is, and the one judge of all of them, who looks at what hub and bucket hold and at nothing we say."""

from __future__ import annotations

import io
import itertools
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flip_observability.constants import FINAL_STATUSES, FlareEvents
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.demo.scenarios import GLOBAL_METRICS_FILE, MODEL_FILE
from flip_observability.demo.trainer import accuracy, load_data

if TYPE_CHECKING:
    from drills.stage import Stage

DELAY_SECONDS = 30.0
"""From the fault, or from the recovery, until the hub has the final status."""
HEARTBEAT_SECONDS = 120.0
"""What comes on top where nothing but a heartbeat can tell."""
RESULTS_SECONDS = 60.0
SETTLE_SECONDS = 1.5
"""For a second final status, which must not come."""
EVENT_SECONDS = 2.0
END_RUN_SECONDS = 20.0

FINALS = frozenset(map(str, FINAL_STATUSES))
_RANK = {"PENDING": 0, "INITIATED": 1, "PREPARED": 2, "TRAINING_STARTED": 3, "RUNNING": 3} | dict.fromkeys(FINALS, 4)

Archive = Mapping[str, bytes]


@dataclass
class Run:
    """One run of a drill, and what must become of it.

    Args:
        model_id: by which the hub and the bucket know it.
        job_id: of the files that the stopwatch wrote.
        since: epoch seconds of the fault, or of the recovery.
        hub: what was told.
        archives: reads the archives that the bucket, or folder, holds for a model: key to content.
        finals: the final statuses that are right; the drill's own when None.
        results: whether there must be an archive; the drill's own when None.
        models: whether the archive must have the last persisted model.
    """

    model_id: str
    job_id: str
    since: float
    hub: EmbeddedHub
    archives: Callable[[str], Mapping[str, bytes]]
    finals: frozenset[str] | None = None
    results: bool | None = None
    models: bool = True


@dataclass(frozen=True)
class Drill:
    """Something that is broken on purpose.

    Args:
        name: on the command line and in the table.
        group: of the documentation.
        broken: what is broken, in a few words.
        play: breaks it and returns the runs to be judged.
        finals: the final statuses that are right.
        results: True when the bucket must hold the results, False when it must not, None when either is right.
        quick: whether it belongs to the quick subset.
        seconds: within which the hub must have the final status, after the fault or the recovery.
        slow_upload: whether END_RUN may take longer than usual.
    """

    name: str
    group: str
    broken: str
    play: Callable[[Stage], Sequence[Run]]
    finals: frozenset[str] = frozenset()
    results: bool | None = None
    quick: bool = False
    seconds: float = DELAY_SECONDS
    slow_upload: bool = False


@dataclass
class Outcome:
    """How a drill went: what was seen, and what differs from what must be."""

    drill: Drill
    seed: int
    statuses: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    took: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.differences

    @property
    def verdict(self) -> str:
        if self.skipped:
            return f"skipped: {self.skipped}"
        return "pass" if self.passed else "FAIL"


class Skip(Exception):  # noqa: N818 - not an error
    """This machine cannot do it; the text says why."""


def judge(drill: Drill, runs: Sequence[Run], stage: Stage, outcome: Outcome) -> None:
    """Wait for what must come, and write down what differs."""
    for run in runs:
        wait_for_final(drill, run)
    time.sleep(SETTLE_SECONDS)
    for run in runs:
        _judge_statuses(drill, run, outcome)
        _judge_results(drill, run, stage, outcome)
        _judge_threads(drill, run, stage.times, outcome)
    outcome.differences += [f"{what} holds a secret" for what in sorted(stage.leaks())]
    outcome.differences += [f"an upload of {key} was left unfinished" for key in stage.unfinished_uploads()]
    outcome.notes += stage.notes


def wait_for_final(drill: Drill, run: Run) -> None:
    left = run.since + drill.seconds + 10.0 - time.time()
    run.hub.wait(lambda hub: bool(_finals(hub, run.model_id)), timeout=max(0.0, left))


def _finals(hub: EmbeddedHub, model_id: str) -> list[str]:
    return list(dict.fromkeys(status for status in hub.statuses(model_id) if status in FINALS))


def _judge_statuses(drill: Drill, run: Run, outcome: Outcome) -> None:
    wanted = drill.finals if run.finals is None else run.finals
    accepted = [r for r in run.hub.records if r.accepted and r.kind == "status" and r.model_id == run.model_id]
    names = [record.status for record in accepted]
    finals = _finals(run.hub, run.model_id)
    outcome.statuses.append(finals[0] if finals else "none")
    for before, after in itertools.pairwise(names):
        if _RANK[after] < _RANK[before]:
            outcome.differences.append(f"{run.model_id}: {after} after {before}")
    if len(finals) != 1 or finals[0] not in wanted:
        found, right = ", ".join(finals) or "nothing", " or ".join(sorted(wanted))
        outcome.differences.append(f"{run.model_id}: the hub's final status is {found}, it must be {right}")
    if finals:
        at = next(record.time for record in accepted if record.status in FINALS)
        outcome.seconds.append(round(at - run.since, 1))
        if at - run.since > drill.seconds:
            outcome.differences.append(
                f"{run.model_id}: the final status took {at - run.since:.1f} s, at most {drill.seconds:.0f} s are right"
            )


# -- results -----------------------------------------------------------------------------------------------------------


def _judge_results(drill: Drill, run: Run, stage: Stage, outcome: Outcome) -> None:
    wanted = drill.results if run.results is None else run.results
    patient = wanted is True and bool(_finals(run.hub, run.model_id))
    deadline = time.monotonic() + (RESULTS_SECONDS if patient else 0.0)
    while not (found := run.archives(run.model_id)) and time.monotonic() < deadline:
        time.sleep(0.3)
    outcome.results.append(f"{len(found)}" if found else "none")
    if wanted is True and not found:
        outcome.differences.append(f"{run.model_id}: the bucket holds no results")
    if wanted is False and found:
        outcome.differences.append(f"{run.model_id}: the bucket holds results that there cannot be")
    for key, content in found.items():
        outcome.differences += [f"{key}: {problem}" for problem in _examine(content, run, stage)]


def _examine(content: bytes, run: Run, stage: Stage) -> list[str]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            broken = archive.testzip()
            if broken is not None:
                return [f"{broken} is damaged"]
            members = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    except zipfile.BadZipFile:
        return ["is no zip file"]
    problems = [f"holds a secret in {name}" for name, data in members.items() if stage.secret_in(data)]
    if run.models:
        problems += _examine_model(members, stage.persisted(run.job_id))
    return problems


def _examine_model(members: Archive, persisted: int) -> list[str]:
    """Whether the model in an archive is the last one that was persisted, by how well it does on held-out samples."""
    if persisted == 0:
        return []
    if MODEL_FILE not in members:
        return [f"the model is missing, though {persisted} were persisted"]
    lines = [json.loads(line) for line in members.get(GLOBAL_METRICS_FILE, b"").splitlines()]
    # The measurement of a model follows its event; a process can die between the two.
    if len(lines) < persisted - 1:
        return [f"it holds round {len(lines)}, though {persisted} were persisted"]
    with np.load(io.BytesIO(members[MODEL_FILE])) as stored:
        found = accuracy(stored["weights"], load_data()["server"])
    if len(lines) == persisted and abs(found - lines[-1]["accuracy"]) > 1e-9:
        return [f"the model is not that of round {len(lines)}"]
    return []


# -- NVFLARE's threads -------------------------------------------------------------------------------------------------


def _judge_threads(drill: Drill, run: Run, folder: Path, outcome: Outcome) -> None:
    for line in read_times(folder, run.job_id):
        if line["what"] != "event":
            continue
        end = line["name"] == FlareEvents.END_RUN
        most = END_RUN_SECONDS if end else EVENT_SECONDS
        if line["seconds"] > most and not (end and drill.slow_upload):
            outcome.differences.append(f"{run.model_id}: {line['name']} held a thread for {line['seconds']:.1f} s")


def read_times(folder: Path, job_id: str) -> Iterable[dict[str, Any]]:
    """What the components of a job wrote down."""
    file = folder / f"{job_id}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
