"""``flip-obs run finalize``: what it does, and above all what it refuses."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import Result, flip_obs
from flip_observability.constants import FlareEvents, OwnEvents
from flip_observability.ledger import Entry, Ledger
from flip_observability.process import current_process
from history import Run


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger") as ledger:
        yield ledger


def finalize(run: Run, status: str, *options: str, answer: str = "") -> Result:
    assert run.ledger.directory is not None
    return flip_obs(
        "--dir", run.ledger.directory, "run", "finalize", run.run_id, "--status", status, *options, answer=answer
    )


def begin(ledger: Ledger, *, alive: bool = False) -> Run:
    run = Run(ledger)
    run.train({"site-1": 2.0}, 1)
    run.at(run.now + 1, FlareEvents.ROUND_STARTED, round=2)
    here = current_process()
    process = here if alive else dataclasses.replace(here, start_ticks=1)  # this pid, but long before
    ledger.append(Entry(run.run_id, 1.0, run=process.columns()))
    return run


def final(run: Run) -> tuple[str | None, str | None]:
    row = run.ledger.run(run.run_id)
    assert row is not None
    return row["final_status"], row["final_by"]


def told(run: Run) -> list[str]:
    return [row.payload["status"] for row in run.ledger.outbox(run_id=run.run_id, kind="status") if row.final]


def test_it_asks_and_gives_the_run_its_final_status(ledger: Ledger) -> None:
    run = begin(ledger)
    refused = finalize(run, "error", answer="n\n")
    assert (refused.returncode, final(run)) == (1, (None, None))
    done = finalize(run, "error", answer="y\n")
    assert (done.returncode, final(run)) == (0, ("ERROR", "operator"))
    assert told(run) == ["ERROR"]
    assert "no observer tells the hub" in done.stderr
    row = ledger.run(run.run_id)
    assert row is not None
    assert row["problems"].keys() == {"orphaned"}
    assert row["intent"] == "SALVAGE"  # the next observer brings what is left
    names = [event["name"] for event in ledger.events(run.run_id)]
    assert names[-2:] == [OwnEvents.ORPHANED, OwnEvents.FINAL_STATUS]


def test_twice_is_as_good_as_once(ledger: Ledger) -> None:
    run = begin(ledger)
    for _ in range(2):
        assert finalize(run, "STOPPED", "--yes").returncode == 0
    assert told(run) == ["STOPPED"]
    assert [event["name"] for event in ledger.events(run.run_id)].count(OwnEvents.FINAL_STATUS) == 1
    facts = [fact[0] for event in ledger.events(run.run_id) for fact in event["facts"]]
    assert [facts.count(name) for name in ("run_finished", "abort", "orphaned")] == [1, 1, 0]


@pytest.mark.parametrize(("accepted", "text"), [(True, "cannot be contradicted"), (False, "not accepted yet")])
def test_it_contradicts_no_other_final_status(ledger: Ledger, accepted: bool, text: str) -> None:
    run = begin(ledger)
    run.finish("RESULTS_UPLOADED")
    if accepted:
        run.deliver()
    refused = finalize(run, "ERROR", "--yes")
    assert refused.returncode == 1
    assert text in refused.stderr
    assert final(run) == ("RESULTS_UPLOADED", "job")
    assert told(run) == ["RESULTS_UPLOADED"]


def test_it_contradicts_nothing_that_the_hub_was_told_outside_the_run(ledger: Ledger) -> None:
    from flip_observability.ledger import OutboxItem

    run = begin(ledger)
    ledger.append(Entry(None, time.time(), outbox=(OutboxItem(run.model_id, "status", {"status": "STOPPED"}, True),)))
    run.now = 700.0
    run.deliver()
    refused = finalize(run, "ERROR", "--yes")
    assert refused.returncode == 1
    assert "has accepted STOPPED" in refused.stderr
    assert final(run) == (None, None)
    assert finalize(run, "STOPPED", "--yes").returncode == 0


def test_a_run_that_goes_on_is_not_ended_unless_that_is_meant(ledger: Ledger) -> None:
    run = begin(ledger, alive=True)
    refused = finalize(run, "STOPPED", "--yes")
    assert refused.returncode == 1
    assert "lives" in refused.stderr
    assert final(run) == (None, None)
    assert finalize(run, "STOPPED", "--yes", "--running").returncode == 0
    assert final(run) == ("STOPPED", "operator")
    run.finish("RESULTS_UPLOADED")  # what its process says later is history, and no news for the hub
    assert final(run) == ("STOPPED", "operator")
    assert told(run) == ["STOPPED"]


def test_a_process_elsewhere_lives_as_long_as_its_heart_beats(ledger: Ledger) -> None:
    run = begin(ledger)
    elsewhere = dataclasses.replace(current_process(), pid_ns="pid:[1]").columns()
    ledger.append(Entry(run.run_id, 1.0, run={**elsewhere, "heartbeat": time.time() - 30}))
    assert "lives" in finalize(run, "ERROR", "--yes").stderr
    ledger.append(Entry(run.run_id, 1.0, run={"heartbeat": time.time() - 130}))
    assert finalize(run, "ERROR", "--yes").returncode == 0


def test_a_history_that_cannot_be_read_is_no_obstacle(ledger: Ledger) -> None:
    run = begin(ledger)
    ledger._db.execute("UPDATE events SET attrs = '{\"round\": 1e999}' WHERE name = '_round_started'")
    done = finalize(run, "ERROR", "--yes")
    assert done.returncode == 0
    assert "cannot be read" in done.stderr
    assert final(run) == ("ERROR", "operator")
    assert told(run) == ["ERROR"]


@pytest.mark.parametrize("status", ["TRAINING_STARTED", "nonsense", ""])
def test_only_final_statuses_are_final(ledger: Ledger, status: str) -> None:
    run = begin(ledger)
    assert finalize(run, status, "--yes").returncode == 2
    assert final(run) == (None, None)
