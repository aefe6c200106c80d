"""From ledger rows to what a person sees."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from flip_observability import report, tables
from flip_observability.constants import FlareEvents, FlipEvents, OwnEvents
from flip_observability.hub import LocalHub
from flip_observability.ledger import Ledger
from history import Run


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger(None) as ledger:
        yield ledger


def near(value: object) -> Any:
    return pytest.approx(value)


def _report(run: Run, now: float | None = None) -> report.RunReport:
    row = run.ledger.run(run.run_id)
    assert row is not None
    events, outbox = run.ledger.events(run.run_id), run.ledger.outbox(run_id=run.run_id)
    return report.run_report(row, events, outbox, run.begin + run.now if now is None else now)


def test_a_finished_run_from_its_first_event_to_its_receipt(ledger: Ledger) -> None:
    run = Run(ledger)
    run.train({"site-1": 2, "site-2": 5}, rounds=3)
    run.finish()
    run.deliver(after=2.0)
    shown = _report(run)

    assert shown.run.status == "RESULTS_UPLOADED"
    assert shown.run.final
    assert shown.run.final_by == "job"
    assert shown.run.seconds == near(run.now)
    assert (shown.run.round, shown.run.total_rounds, shown.run.clients) == (3, 3, 2)
    assert shown.run.results is not None
    assert (shown.run.results.bytes, shown.run.results.files, shown.run.results.crc32) == (2_048, 3, "3610a686")
    assert [(line.round, line.total_rounds, line.workflow, line.state) for line in shown.rounds] == [
        (number, 3, "controller", "done") for number in (1, 2, 3)
    ]
    assert [line.seconds for line in shown.rounds] == near([6, 6, 6])
    assert [(line.returned, line.clients) for line in shown.rounds] == [(2, 2)] * 3
    assert [(line.state, line.seconds) for line in shown.uploads] == [("done", near(2))]
    assert len(shown.events) == len(ledger.events(run.run_id))
    assert shown.events[0].name == "start_run"


def test_the_slowest_client_comes_first(ledger: Ledger) -> None:
    run = Run(ledger)
    run.train({"fast": 2, "slow": 5, "middle": 3}, rounds=2)
    clients = _report(run).clients
    assert [(line.client, line.tasks) for line in clients] == [("slow", 2), ("middle", 2), ("fast", 2)]
    assert [line.median_seconds for line in clients] == near([5, 3, 2])
    assert clients[0].slowest_round == 1


def test_each_status_with_what_the_hub_said(ledger: Ledger) -> None:
    run = Run(ledger)
    run.train({"site-1": 2}, rounds=1)
    run.deliver(after=2.0)
    run.finish("ERROR")
    run.reject("422")
    lines = _report(run).statuses
    assert [line.status for line in lines] == ["INITIATED", "PREPARED", "TRAINING_STARTED", "ERROR"]
    assert [line.hub.state for line in lines] == ["accepted", "accepted", "accepted", "rejected"]
    assert lines[0].time is not None
    assert lines[0].hub.at is not None
    assert (lines[0].hub.at - lines[0].time).total_seconds() == near(2)
    assert lines[3].final
    assert lines[3].hub.answer == "422"


def test_a_status_that_no_message_tells_was_not_sent(ledger: Ledger) -> None:
    run = Run(ledger, tells_hub=False)
    run.train({"site-1": 2}, rounds=1)
    shown = _report(run)
    assert [line.hub.state for line in shown.statuses] == ["not sent"] * 3
    assert shown.run.hub.state == "not sent"


def test_without_a_hub_nobody_has_accepted_anything(ledger: Ledger) -> None:
    run = Run(ledger)
    run.at(0, FlareEvents.START_RUN)
    run.at(1, FlipEvents.TRAINING_INITIATED)
    run.deliver(outcome=LocalHub().send(ledger.outbox()[0]).outcome)
    shown = _report(run)
    assert {line.hub.state for line in shown.statuses} == {shown.run.hub.state} == {"no hub"}
    console = Console(width=200)
    with console.capture() as page:
        console.print(tables.report_page(shown, all_events=False))
        console.print(tables.runs_table([shown.run], 200))
    assert "no hub (LOCAL_DEV), " in page.get()
    assert "accepted" not in page.get()


def test_a_pending_message_says_how_often_and_when_again(ledger: Ledger) -> None:
    run = Run(ledger)
    run.at(0, FlareEvents.START_RUN)
    run.at(1, FlipEvents.TRAINING_INITIATED)
    (row,) = ledger.lease("test", run.begin + 1, 10, 10)
    due = run.begin + 100
    ledger.settle(row, now=run.begin + 2, state=None, outcome="503", next_attempt=due)
    hub = _report(run).statuses[0].hub
    assert (hub.state, hub.attempts, hub.answer, hub.at) == ("pending", 1, "503", None)
    assert hub.next_attempt == report.moment(due)


def test_what_a_running_run_is_in_is_open(ledger: Ledger) -> None:
    run = Run(ledger)
    run.train({"site-1": 2, "site-2": 3}, rounds=1)
    run.at(20, FlareEvents.ROUND_STARTED, round=2, total_rounds=5)
    run.at(21, FlareEvents.AFTER_TASK_DATA_FILTER, client="site-1", task="train", task_id="t")
    shown = _report(run, now=run.begin + 31)
    assert not shown.run.final
    assert shown.run.seconds == near(31)
    assert (shown.rounds[-1].state, shown.rounds[-1].seconds) == ("open", near(11))
    assert (shown.tasks[-1].state, shown.tasks[-1].seconds) == ("open", near(10))
    by_client = {line.client: line for line in shown.clients}
    assert (by_client["site-1"].unfinished, by_client["site-2"].unfinished) == (1, 0)
    assert by_client["site-1"].median_seconds == near(2), "a task that has not returned is no measurement"


def test_what_a_dead_process_left_open_was_cut_off(ledger: Ledger) -> None:
    run = Run(ledger)
    run.at(0, FlareEvents.START_RUN)
    run.at(1, FlareEvents.ROUND_STARTED, round=1, total_rounds=5)
    run.at(2, FlareEvents.AFTER_TASK_DATA_FILTER, client="site-1", task="train", task_id="t")
    run.at(9, OwnEvents.ORPHANED)
    run.at(9, OwnEvents.FINAL_STATUS, status="ERROR")
    shown = _report(run)
    assert [line.state for line in shown.rounds] == ["cut off"]
    assert [line.state for line in shown.tasks] == ["cut off"]
    assert shown.clients[0].median_seconds is None
    assert "orphaned" in shown.run.problems


def test_a_round_in_which_the_run_failed_is_not_done(ledger: Ledger) -> None:
    run = Run(ledger)
    run.train({"site-1": 2}, rounds=1)
    run.at(20, FlareEvents.ROUND_STARTED, round=2, total_rounds=5)
    run.at(21, FlareEvents.FATAL_SYSTEM_ERROR, exception_type="RuntimeError")
    run.at(22, FlareEvents.END_WORKFLOW)
    run.finish("ERROR")
    assert [line.state for line in _report(run).rounds] == ["done", "cut off"]


def test_a_result_that_comes_after_its_round_has_its_true_time(ledger: Ledger) -> None:
    run = Run(ledger)
    run.at(0, FlareEvents.START_RUN)
    run.at(1, FlareEvents.ROUND_STARTED, round=1, total_rounds=2)
    run.at(1, FlareEvents.AFTER_TASK_DATA_FILTER, client="site-1", task="train", task_id="a")
    run.at(5, FlareEvents.ROUND_STARTED, round=2, total_rounds=2)
    run.at(11, FlareEvents.BEFORE_PROCESS_SUBMISSION, client="site-1", task_id="a", return_code="OK")
    (task,) = _report(run).tasks
    assert (task.state, task.round, task.seconds) == ("late", 1, near(10))


def test_a_task_that_a_client_could_not_do_has_failed(ledger: Ledger) -> None:
    run = Run(ledger)
    run.at(0, FlareEvents.START_RUN)
    run.at(1, FlareEvents.AFTER_TASK_DATA_FILTER, client="site-1", task="train", task_id="a")
    run.at(3, FlareEvents.BEFORE_PROCESS_SUBMISSION, client="site-1", task_id="a", return_code="EXECUTION_EXCEPTION")
    shown = _report(run)
    assert (shown.tasks[0].state, shown.tasks[0].return_code) == ("failed", "EXECUTION_EXCEPTION")
    assert shown.clients[0].failed == 1


def test_a_failed_upload_says_why(ledger: Ledger) -> None:
    run = Run(ledger)
    run.train({"site-1": 2}, rounds=1)
    run.finish("ERROR")
    shown = _report(run)
    assert [(line.state, line.reason) for line in shown.uploads] == [("failed", "access_denied")]
    assert shown.run.results is None


def test_a_registered_run_without_an_event(ledger: Ledger) -> None:
    shown = _report(Run(ledger))
    assert (shown.run.status, shown.run.seconds, shown.run.started) == (None, None, None)
    assert not any((shown.rounds, shown.clients, shown.statuses, shown.tasks, shown.uploads, shown.events))


def test_the_text_of_a_log_is_not_shown(ledger: Ledger) -> None:
    run = Run(ledger)
    run.tell("log", {"client": "site-1", "log": "ACC-4711 of J. Doe"})
    (row,) = ledger.outbox()
    line = report.outbox_line(row)
    assert line.content == {"client": "site-1"}
    assert "4711" not in report.to_json(line)


def test_a_status_is_overtaken_by_a_later_one_that_the_hub_has_or_will_get(ledger: Ledger) -> None:
    run = Run(ledger)
    run.at(0, FlareEvents.START_RUN)
    run.at(1, FlipEvents.TRAINING_INITIATED)
    run.reject()
    initiated = ledger.outbox()[0]
    assert not report.overtaken(initiated, ledger.outbox())
    run.at(2, FlareEvents.INITIAL_MODEL_LOADED)
    assert report.overtaken(initiated, ledger.outbox())
    run.reject()
    assert not report.overtaken(initiated, ledger.outbox()), "the hub has taken neither"
    run.finish()
    run.reject()
    rows = ledger.outbox()
    assert report.overtaken(initiated, rows), "a final status must not wait behind an earlier one"
    assert not report.overtaken(rows[-1], rows)


def test_json_has_iso_times_and_nothing_that_json_or_a_terminal_chokes_on(ledger: Ledger) -> None:
    run = Run(ledger, begin=1_700_000_000.25)
    run.at(0, FlareEvents.START_RUN)
    run.at(1, FlipEvents.SEND_RESULT, client="\x1b]0;evil\x07\u202e\x9b31m", value=math.nan)
    text = report.to_json(_report(run))
    assert text.isascii()
    assert not set(text) & {chr(code) for code in range(32) if code != 10}
    whole = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert whole["run"]["started"] == "2023-11-14T22:13:20.250+00:00"
    assert whole["events"][1]["attrs"] == {"client": "\x1b]0;evil\x07\u202e\x9b31m", "value": "nan"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("site-1", "site-1"),
        ("Zürich ☃", "Zürich ☃"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202eabc", "\\u202eabc"),
        ("\ud800", "\\ud800"),
        ("x" * 10_000, "x" * 199 + "…"),
        (4711, "4711"),
    ],
)
def test_safe_text(text: object, shown: str) -> None:
    assert report.safe(text) == shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3_600, "1 h 0 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (1_023, "1023 B"), (1_024, "1.0 KiB"), (5 << 30, "5.0 GiB"), (5 << 50, "5120.0 TiB")],
)
def test_sizes(count: int | None, text: str) -> None:
    assert report.size(count) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, -1e300])
def test_what_is_no_time_is_shown_as_none(value: float) -> None:
    assert report.moment(value) is None
    assert report.local_time(report.moment(value)) == "-"


def test_local_time_is_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Zurich")
    time.tzset()
    try:
        assert report.local_time(report.moment(1_700_000_000)) == "2023-11-14 23:13:20"
    finally:
        monkeypatch.undo()
        time.tzset()
