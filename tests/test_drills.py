"""The quick drills, and their judge: every drill is worth as much as the judge's ability to say no."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import requests
from drills import ROOT, report
from drills.judge import Drill, Outcome, Run, Skip, judge
from drills.runner import choose, play
from drills.stage import Shared, Stage
from drills.table import DRILLS

from flip_observability.demo.hub import EmbeddedHub
from flip_observability.demo.scenarios import GLOBAL_METRICS_FILE, MODEL_FILE
from flip_observability.demo.trainer import accuracy, initial_weights, load_data

SEED = 4711
QUICK = choose(DRILLS, [], quick=True)
ON_THE_SITE = ("kill-in-training", "kill-in-upload")
"""Quick drills that share one NVFLARE site."""

# -- the quick drills --------------------------------------------------------------------------------------------------


def passes(outcome: Outcome) -> None:
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.differences == []


@pytest.mark.system
@pytest.mark.nvflare_job
@pytest.mark.timeout(420)
def test_quick_drills_on_a_real_site(tmp_path: Path) -> None:
    with Shared(tmp_path / "site") as shared:
        for drill in QUICK:
            if drill.name in ON_THE_SITE:
                passes(play(drill, shared, SEED, full=False))


@pytest.mark.system
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [drill.name for drill in QUICK if drill.name not in ON_THE_SITE])
def test_quick_drills(name: str, tmp_path: Path) -> None:
    with Shared(tmp_path / "site") as shared:
        passes(play(next(drill for drill in QUICK if drill.name == name), shared, SEED, full=False))


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table() -> None:
    assert len({drill.name for drill in DRILLS}) == len(DRILLS)
    assert {drill.group for drill in DRILLS} >= {"deaths", "aborts"}
    assert set(ON_THE_SITE) <= {drill.name for drill in QUICK}
    assert choose(DRILLS, ["aborts"], quick=True) == [drill for drill in DRILLS if drill.group == "aborts"]
    assert choose(DRILLS, ["nonsense"], quick=False) == []


def test_every_drill_is_named_in_the_documentation() -> None:
    text = report.DOCS.read_text()
    assert report.BEGIN in text
    assert report.END in text
    missing = [drill.name for drill in DRILLS if f"`{drill.name}`" not in text]
    assert missing == []


def test_the_command_line() -> None:
    def drills(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "drills", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    listed = drills("--list", "--only", "deaths")
    assert listed.returncode == 0
    assert "kill-in-training" in listed.stdout
    assert "abort-twice" not in listed.stdout
    unknown = drills("--only", "nonsense")
    assert unknown.returncode == 2
    assert "nonsense" in unknown.stderr
    none = drills("--times", "0")
    assert none.returncode == 2
    assert "--times: 0" in none.stderr


# -- the judge ---------------------------------------------------------------------------------------------------------

SECRET = "a-service-key-4711"


@dataclass
class Scene:
    """What a drill may leave behind, and what the judge says of it."""

    hub: EmbeddedHub
    times: Path
    model_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    job_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    since: float = field(default_factory=time.time)
    archives: dict[str, bytes] = field(default_factory=dict)
    persisted: int = 0
    leaking: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()

    def say(self, *statuses: str) -> None:
        for status in statuses:
            url = f"{self.hub.url}/model/{self.model_id}/status/{status}"
            assert requests.put(url, headers={self.hub.header: self.hub.key}, timeout=5).status_code == 200

    def hold(self, event: str, seconds: float) -> None:
        with (self.times / f"{self.job_id}.jsonl").open("a") as file:
            file.write(json.dumps({"what": "event", "name": event, "seconds": seconds}) + "\n")

    def judged(self, **changes: Any) -> list[str]:
        wanted: dict[str, Any] = {"finals": frozenset({"ERROR"}), "results": True, **changes}
        drill = Drill("a-drill", "a-group", "something", lambda _: [], **wanted)
        run = Run(self.model_id, self.job_id, self.since, self.hub, lambda _: self.archives)
        scene, times = self, self.times

        class Judged:
            notes: tuple[str, ...] = ()

            def __init__(self) -> None:
                self.times = times

            def persisted(self, job_id: str) -> int:
                return scene.persisted

            def secret_in(self, data: bytes) -> bool:
                return SECRET.encode() in data

            def leaks(self) -> tuple[str, ...]:
                return scene.leaking

            def unfinished_uploads(self) -> tuple[str, ...]:
                return scene.unfinished

        outcome = Outcome(drill, SEED)
        judge(drill, [run], cast("Stage", Judged()), outcome)
        return outcome.differences


def archive(rounds: int = 1, *, model: Any = None, secret: str = "") -> bytes:
    """Results as the demo's job leaves them."""
    weights = initial_weights()
    lines = [json.dumps({"round": n + 1, "accuracy": accuracy(weights, load_data()["server"])}) for n in range(rounds)]
    stored, content = io.BytesIO(), io.BytesIO()
    np.savez(stored, weights=weights if model is None else model)
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(MODEL_FILE, stored.getvalue())
        file.writestr(GLOBAL_METRICS_FILE, "\n".join(lines))
        file.writestr("log.txt", f"a log {secret}")
    return content.getvalue()


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr("drills.judge.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("drills.judge.RESULTS_SECONDS", 0.2)
    with EmbeddedHub() as hub:
        yield Scene(hub, tmp_path, archives={"a.zip": archive()}, persisted=1)


def test_the_judge_is_content_with_what_is_right(scene: Scene) -> None:
    scene.hold("_end_run", 3.0)
    scene.hold("_round_started", 0.3)
    scene.say("INITIATED", "TRAINING_STARTED", "ERROR", "ERROR")
    assert scene.judged() == []


def _too_late(scene: Scene) -> None:
    scene.since -= 31.0
    scene.say("ERROR")


def _damaged(scene: Scene) -> None:
    scene.say("ERROR")
    content = bytearray(scene.archives["a.zip"])
    content[60] ^= 0xFF
    scene.archives["a.zip"] = bytes(content)


def _with(**values: Any) -> Callable[[Scene], None]:
    def change(scene: Scene) -> None:
        scene.say("ERROR")
        for name, value in values.items():
            setattr(scene, name, value)

    return change


def _held(event: str, seconds: float) -> Callable[[Scene], None]:
    def change(scene: Scene) -> None:
        scene.say("ERROR")
        scene.hold(event, seconds)

    return change


WRONG: dict[str, tuple[Callable[[Scene], None], str]] = {
    "none": (lambda scene: setattr(scene, "since", scene.since - 39.5), "final status is nothing"),
    "another": (lambda scene: scene.say("STOPPED"), "final status is STOPPED"),
    "two": (lambda scene: scene.say("ERROR", "STOPPED"), "final status is ERROR, STOPPED"),
    "backwards": (lambda scene: scene.say("TRAINING_STARTED", "INITIATED", "ERROR"), "INITIATED after"),
    "after the end": (lambda scene: scene.say("ERROR", "TRAINING_STARTED"), "TRAINING_STARTED after ERROR"),
    "too late": (_too_late, "at most 30 s"),
    "no results": (_with(archives={}), "no results"),
    "no zip": (_with(archives={"a.zip": b"nonsense"}), "no zip file"),
    "damaged": (_damaged, "a.zip"),
    "an old model": (_with(persisted=5), "it holds round 1, though 5"),
    "another model": (_with(archives={"a.zip": archive(model=np.ones(31))}), "not that of round 1"),
    "no model": (_with(archives={"a.zip": b"PK\x05\x06" + bytes(18)}), "the model is missing"),
    "a secret in the results": (_with(archives={"a.zip": archive(secret=SECRET)}), "a secret in log.txt"),
    "a secret elsewhere": (_with(leaking=("the log",)), "the log holds a secret"),
    "an upload left over": (_with(unfinished=("a.zip",)), "left unfinished"),
    "a thread held": (_held("_round_started", 2.5), "_round_started held"),
    "an endless end": (_held("_end_run", 21.0), "_end_run held"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_judge_says_no(scene: Scene, what: str) -> None:
    change, complaint = WRONG[what]
    change(scene)
    differences = scene.judged()
    assert differences
    assert all(complaint in difference for difference in differences)


def test_the_judge_says_no_to_results_that_there_cannot_be(scene: Scene) -> None:
    scene.say("ERROR")
    assert "cannot be" in scene.judged(results=False)[0]


def test_a_drill_that_raises_has_failed_and_one_that_cannot_be_played_is_skipped(tmp_path: Path) -> None:
    def raises(stage: Stage) -> list[Run]:
        raise TimeoutError("nothing happened")

    def impossible(stage: Stage) -> list[Run]:
        raise Skip("not on this machine")

    def leaves_a_mess(stage: Stage) -> list[Run]:
        stage._stack.callback(lambda: 1 // 0)
        return []

    with Shared(tmp_path) as shared:
        messy = play(Drill("c", "g", "", leaves_a_mess), shared, 1, full=False)
        assert "ZeroDivisionError" in messy.differences[0]
        failed = play(Drill("a", "g", "", raises), shared, 1, full=False)
        skipped = play(Drill("b", "g", "", impossible), shared, 1, full=False)
    assert "TimeoutError" in failed.differences[0]
    assert (failed.verdict, failed.passed) == ("FAIL", False)
    assert (skipped.verdict, skipped.passed) == ("skipped: not on this machine", True)


@pytest.mark.system
def test_the_seed_decides_the_moments(tmp_path: Path) -> None:
    drawn: list[float] = []

    def draws(stage: Stage) -> list[Run]:
        drawn.append(stage.rng.random())
        return []

    with Shared(tmp_path) as shared:
        for name, seed in (("a", 1), ("a", 1), ("a", 2), ("b", 1)):
            play(Drill(name, "g", "", draws), shared, seed, full=False)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_the_table_replaces_the_one_in_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = tmp_path / "reliability.md"
    docs.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "DOCS", docs)
    drill = Drill("a-drill", "g", "this | that", lambda _: [])
    outcome = Outcome(drill, 7, ["ERROR", "ERROR"], [1.0, 3.0], ["1", "none"], took=1.0)
    for _ in range(2):
        report.write_docs([outcome])
    lines = docs.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    line = "| a-drill | this \\| that | 7 | 2 x ERROR | 1.0 to 3.0, median 2.0 | 1 archive | pass |"
    assert [text for text in lines if "a-drill" in text] == [line]
