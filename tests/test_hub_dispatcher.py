"""The dispatcher: a real hub, a real ledger, and hours of simulated outage."""

from __future__ import annotations

import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flip_observability import hub as hub_module
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.hub import (
    CONTRACTS,
    FIRST_BACKOFF,
    LEASE_SECONDS,
    MAX_PROBE_SECONDS,
    MAX_ROW_SECONDS,
    Dispatcher,
    HubTransport,
    LocalHub,
    Reply,
    _counted,
)
from flip_observability.ledger import Entry, Ledger, OutboxItem, OutboxRow
from flip_observability.settings import Settings
from waiting import wait_for

T0 = 1_000_000.0
"""The simulated clock's beginning."""
HOUR = 3_600.0


@pytest.fixture
def hub() -> Iterator[EmbeddedHub]:
    with EmbeddedHub() as server:
        yield server


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path) as opened:
        yield opened


def settings_for(hub: EmbeddedHub | None, **more: Any) -> Settings:
    values: dict[str, Any] = {"LOCAL_DEV": False, "INTERNAL_SERVICE_KEY": "k"}
    if hub is not None:
        values |= {"FLIP_API_INTERNAL_URL": hub.url, "INTERNAL_SERVICE_KEY": hub.key, "FLIP_HUB_CONTRACT": hub.contract}
    return Settings.model_validate(values | more)


def dispatcher_for(hub: EmbeddedHub, ledger: Ledger, **more: Any) -> Dispatcher:
    settings = settings_for(hub, **more)
    return Dispatcher(ledger, HubTransport(settings), settings, rng=random.Random(7))


def add(
    ledger: Ledger,
    model_id: str,
    kind: str,
    when: float,
    *,
    run_id: str | None = None,
    final: bool = False,
    **payload: Any,
) -> str:
    item = OutboxItem(model_id, kind, payload, final)
    assert ledger.append(Entry(run_id, when, outbox=(item,)))
    return item.uid


def status(ledger: Ledger, model_id: str, value: str, when: float, **more: Any) -> str:
    return add(ledger, model_id, "status", when, status=value, **more)


def metric(ledger: Ledger, model_id: str, number: int, when: float) -> str:
    return add(ledger, model_id, "metric", when, client="site-1", round=number, label="L", value=float(number))


def row_of(ledger: Ledger, uid: str) -> OutboxRow:
    row = ledger.outbox_row(uid)
    assert row is not None
    return row


def rounds(hub: EmbeddedHub, model_id: str) -> list[int]:
    key = "globalRound" if hub.contract == "2026-05" else "global_round"
    return [int(payload[key]) for payload in hub.payloads(model_id, "metrics")]


def facts(ledger: Ledger, name: str) -> Counter[tuple[str, str]]:
    """Sums of the facts of a name, by kind and outcome."""
    sums: Counter[tuple[str, str]] = Counter()
    for event in ledger.events():
        for fact, value, labels in event["facts"]:
            if fact == name:
                sums[labels["kind"], labels.get("outcome", "")] += value
    return sums


def simulate(dispatcher: Dispatcher, begin: float, end: float, step: float = 1.0) -> float:
    now = begin
    while now < end:
        dispatcher.run_once(now)
        now += step
    return now


def new_id() -> str:
    return str(uuid.uuid4())


# -- a hub that is well ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contract", list(CONTRACTS))
def test_everything_is_delivered_in_order_and_counted(contract: Any, ledger: Ledger) -> None:
    model, run = new_id(), new_id()
    with EmbeddedHub(contract) as hub:
        for value in ("INITIATED", "PREPARED", "TRAINING_STARTED"):
            status(ledger, model, value, T0, run_id=run)
        for number in range(20):
            metric(ledger, model, number, T0)
        add(ledger, model, "log", T0, client=None, log="text")
        if CONTRACTS[contract].takes_events:
            add(ledger, model, "event", T0, client=None, event_type="ROUND_STARTED", round=1, details={}, success=True)
        rows = len(ledger.outbox())
        assert dispatcher_for(hub, ledger).run_once(T0 + 2) == rows
        training = "RUNNING" if contract == "2026-10" else "TRAINING_STARTED"
        assert hub.statuses(model) == ["INITIATED", "PREPARED", training]
        assert rounds(hub, model) == list(range(20))
        assert len(hub.payloads(model, "logs")) == rows - 23
        assert all(record.accepted for record in hub.records)
    assert facts(ledger, "hub_request")["status", "delivered"] == 3
    assert facts(ledger, "hub_request")["metric", "delivered"] == 20
    assert facts(ledger, "hub_delivery_lag")["status", ""] == 6.0  # three times two seconds
    assert ledger.next_due() is None


def test_a_thread_of_its_own_delivers_at_once_and_what_other_processes_add(hub: EmbeddedHub, tmp_path: Path) -> None:
    model = new_id()
    with Ledger(tmp_path) as ours, Ledger(tmp_path) as theirs:
        dispatcher = dispatcher_for(hub, ours)
        dispatcher.start()
        dispatcher.start()  # once is enough
        first = status(theirs, model, "INITIATED", time.time())
        assert dispatcher.wait_for(first, 30)
        second = status(theirs, model, "ERROR", time.time(), final=True)
        assert hub.wait(lambda h: h.statuses(model) == ["INITIATED", "ERROR"])  # nobody nudged it
        assert dispatcher.wait_for(second, 30)
        dispatcher.stop(30)
        third = status(theirs, new_id(), "ERROR", time.time())
        assert not dispatcher.wait_for(third, 1.2)
        dispatcher.start()
        assert dispatcher.wait_for(third, 30)
        dispatcher.stop(30)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flip-hub")]


def test_a_large_backlog_of_many_models(hub: EmbeddedHub, ledger: Ledger) -> None:
    models = [new_id() for _ in range(30)]
    for number in range(15):
        for model in models:
            metric(ledger, model, number, T0)
    dispatcher = dispatcher_for(hub, ledger)
    assert dispatcher.run_once(T0) == 450
    for model in models:
        assert rounds(hub, model) == list(range(15))


def test_waiting_ends_as_soon_as_it_is_in_vain(hub: EmbeddedHub, ledger: Ledger) -> None:
    dispatcher = dispatcher_for(hub, ledger)
    dispatcher.start()
    hub.fail_with(422)
    refused = status(ledger, new_id(), "ERROR", time.time())
    assert not dispatcher.wait_for(refused, 500)  # or the test's own time is over
    assert not dispatcher.wait_for("unknown", 0.3)
    dispatcher.stop(30)


# -- a hub that is ill -------------------------------------------------------------------------------------------------


def test_an_hour_without_a_hub(hub: EmbeddedHub, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    models = [new_id() for _ in range(5)]
    for model in models:
        status(ledger, model, "INITIATED", T0)
        metric(ledger, model, 1, T0)
        metric(ledger, model, 2, T0)
    hub.down()
    dispatcher = dispatcher_for(hub, ledger)
    attempts = [0]
    for second in range(int(HOUR)):
        dispatcher.run_once(T0 + second)
        attempts.append(sum(row.attempts for row in ledger.outbox()))
        if second == 1_800:
            status(ledger, models[0], "ERROR", T0 + second, final=True)
    tried = [second for second in range(int(HOUR)) if attempts[second + 1] > attempts[second]]
    gaps = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert max(gaps) <= MAX_PROBE_SECONDS + 1
    assert len(tried) < 1_500  # backed off
    assert all(attempts[s + 1] - attempts[s] == 1 for s in tried[1:])  # one row at a time
    assert len([event for event in ledger.events() if event["name"] == "flip.hub_request"]) < 200  # not one per attempt
    # Bounded in number, right in sum: as far as it is known before the rows are delivered.
    counted = sum(n for (_, outcome), n in facts(ledger, "hub_request").items() if outcome == "retried")
    assert counted == sum(_counted(row.attempts) for row in ledger.outbox())
    assert not caplog.text.count("ERROR")
    hub.up()
    end = T0 + HOUR
    while dispatcher.hub_is_ill and end < T0 + HOUR + MAX_PROBE_SECONDS:
        end += 1
        dispatcher.run_once(end)
    assert not dispatcher.hub_is_ill
    assert ledger.next_due() is None  # the first success has released all others
    assert hub.statuses(models[0]) == ["ERROR"]  # what came before is superseded
    for model in models[1:]:
        assert hub.statuses(model) == ["INITIATED"]
        assert rounds(hub, model) == [1, 2]
    counts = facts(ledger, "hub_request")
    # Delivery counts itself as the last attempt, and what the twenties had not counted yet.
    delivered = sum(n for (_, outcome), n in counts.items() if outcome == "delivered")
    retried = sum(n for (_, outcome), n in counts.items() if outcome == "retried")
    superseded = [row for row in ledger.outbox() if row.state == "superseded"]
    assert delivered == 15
    uncounted = sum(row.attempts - _counted(row.attempts) for row in superseded)
    assert retried + delivered + uncounted == sum(row.attempts for row in ledger.outbox())


@pytest.mark.parametrize("code", [401, 403, 429, 500, 502, 503, 504])
def test_a_code_that_means_an_ill_hub(code: int, hub: EmbeddedHub, ledger: Ledger) -> None:
    models = [new_id() for _ in range(12)]
    for model in models:
        status(ledger, model, "INITIATED", T0)
        metric(ledger, model, 1, T0)
    hub.fail_with(code)
    dispatcher = dispatcher_for(hub, ledger)
    dispatcher.run_once(T0)
    ill_at_first = dispatcher.hub_is_ill
    assert ill_at_first
    seen = len(hub.records)
    assert seen <= 8  # what was under way, and nothing more
    dispatcher.run_once(T0 + FIRST_BACKOFF)
    assert len(hub.records) == seen + 1  # that they all failed at once counts as one failure
    simulate(dispatcher, T0 + 1, T0 + 61)
    assert seen < len(hub.records) < seen + 40
    hub.heal()
    simulate(dispatcher, T0 + 61, T0 + 61 + MAX_PROBE_SECONDS + 1)
    assert not dispatcher.hub_is_ill
    for model in models:
        assert hub.statuses(model) == ["INITIATED"]
        assert rounds(hub, model) == [1]


def test_a_wrong_key_is_said_and_mended(hub: EmbeddedHub, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    model = new_id()
    status(ledger, model, "INITIATED", T0)
    wrong = "wrong-key-123456"
    settings = settings_for(hub, INTERNAL_SERVICE_KEY=wrong)
    ill = Dispatcher(ledger, HubTransport(settings), settings)
    simulate(ill, T0, T0 + 60)
    assert hub.statuses(model) == []
    assert caplog.text.count("INTERNAL_SERVICE_KEY") == 1  # once a minute, not once a probe
    assert wrong not in caplog.text
    assert simulate(dispatcher_for(hub, ledger), T0 + 60, T0 + 120)  # another process, with the right one
    assert hub.statuses(model) == ["INITIATED"]


@pytest.mark.parametrize("header", ["600", "date"])
def test_retry_after_is_honoured(header: str, hub: EmbeddedHub, ledger: Ledger) -> None:
    model = new_id()
    status(ledger, model, "INITIATED", T0)
    value = formatdate(time.time() + 630, usegmt=True) if header == "date" else header  # the clock of dates is real
    hub.fail_with(429, {"Retry-After": value}, times=1)
    dispatcher = dispatcher_for(hub, ledger)
    simulate(dispatcher, T0, T0 + 590)
    assert len(hub.records) == 1
    uid = status(ledger, new_id(), "ERROR", T0 + 590, final=True)
    assert not dispatcher.wait_for(uid, 0.2)  # not even for one who waits
    dispatcher.run_once(T0 + 591)
    assert len(hub.records) == 1
    simulate(dispatcher, T0 + 600, T0 + 660)
    assert hub.statuses(model) == ["INITIATED"]


def test_who_waits_makes_an_ill_hub_be_asked_at_once(hub: EmbeddedHub, ledger: Ledger) -> None:
    clock = [time.time()]
    settings = settings_for(hub)
    dispatcher = Dispatcher(ledger, HubTransport(settings), settings, clock=lambda: clock[0], rng=_Latest())
    hub.down()
    uid = status(ledger, new_id(), "ERROR", clock[0], final=True)
    for _ in range(10):
        dispatcher.run_once()
        clock[0] += MAX_PROBE_SECONDS
    dispatcher.run_once()
    hub.up()
    dispatcher.start()  # its clock stands still: by itself it would never ask again
    assert dispatcher.wait_for(uid, 30)
    dispatcher.stop(30)


class _Latest(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


def test_an_ill_hub_is_not_probed_while_a_call_is_under_way(ledger: Ledger) -> None:
    slow, fast = new_id(), new_id()
    asked: list[str] = []
    answer, failed = threading.Event(), threading.Event()

    class Hub:
        def send(self, row: OutboxRow) -> Reply:
            asked.append(row.model_id)
            if row.model_id == fast:
                failed.set()
                return Reply(500)
            answer.wait(60)
            return Reply(200)

    clock = [T0]
    status(ledger, slow, "ERROR", T0, final=True)
    uid = status(ledger, fast, "INITIATED", T0)
    dispatcher = Dispatcher(ledger, Hub(), settings_for(None), clock=lambda: clock[0])
    dispatcher.start()
    assert failed.wait(60)
    while not row_of(ledger, uid).attempts:
        time.sleep(0.01)
    clock[0] += 10  # less than the slow one's lease
    for _ in range(20):
        dispatcher.nudge()
        time.sleep(0.01)
    assert sorted(asked) == sorted([slow, fast])
    answer.set()
    while len(asked) < 3:
        time.sleep(0.01)
    dispatcher.stop(30)
    assert asked[2] == fast


def test_a_call_that_hangs_is_waited_for_and_not_watched(ledger: Ledger) -> None:
    asked: list[str] = []
    probing, answer = threading.Event(), threading.Event()

    class Hub:
        def send(self, row: OutboxRow) -> Reply:
            asked.append(row.uid)
            if len(asked) == 1:
                return Reply(500)
            probing.set()
            answer.wait(60)
            return Reply(200)

    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return time.time()

    status(ledger, new_id(), "INITIATED", time.time())
    dispatcher = Dispatcher(ledger, Hub(), settings_for(None), clock=clock)
    dispatcher.start()
    assert probing.wait(60)
    before = looks
    time.sleep(0.5)
    assert looks - before < 20, "it looks again and again although only an answer can change anything"
    answer.set()
    dispatcher.stop(30)


def test_who_waits_for_nobody_needs_no_thread_for_a_call(ledger: Ledger) -> None:
    threads: list[str] = []

    class Hub(LocalHub):
        def send(self, row: OutboxRow) -> Reply:
            threads.append(threading.current_thread().name)
            return super().send(row)

    uids = [status(ledger, new_id(), "INITIATED", time.time()) for _ in range(3)]
    dispatcher = Dispatcher(ledger, Hub(), settings_for(None))
    dispatcher.start()
    assert all(dispatcher.wait_for(uid, 60) for uid in uids)
    dispatcher.stop(30)
    assert threads == ["flip-hub-dispatcher"] * 3


def test_a_row_is_sent_again_when_it_is_time_and_not_when_the_outbox_is_polled(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "POLL_SECONDS", 600.0)
    replies = [Reply(408), Reply(408), Reply(200)]

    class Hub:
        def send(self, row: OutboxRow) -> Reply:
            return replies.pop(0)

    uid = status(ledger, new_id(), "INITIATED", time.time())
    dispatcher = Dispatcher(ledger, Hub(), settings_for(None))
    dispatcher.start()
    wait_for(lambda: row_of(ledger, uid).state == "delivered", 60, "the third try")
    dispatcher.stop(30)


def test_one_row_that_makes_the_hub_fail_does_not_stop_the_others(hub: EmbeddedHub, ledger: Ledger) -> None:
    bad, good = new_id(), [new_id() for _ in range(20)]
    status(ledger, bad, "ERROR", T0, final=True)
    for model in good:
        status(ledger, model, "INITIATED", T0)
        for number in range(3):
            metric(ledger, model, number, T0)
    dispatcher = Dispatcher(ledger, _FailsFor(hub, bad), settings_for(hub), rng=random.Random(7))
    simulate(dispatcher, T0, T0 + 300)
    for model in good:
        assert hub.statuses(model) == ["INITIATED"]
        assert rounds(hub, model) == [0, 1, 2]
    assert [row.model_id for row in ledger.outbox(states=["pending"])] == [bad]


class _FailsFor:
    """The hub, but for one model of which it fails: the embedded one cannot."""

    def __init__(self, hub: EmbeddedHub, model_id: str) -> None:
        self._hub, self._model_id = HubTransport(settings_for(hub)), model_id

    def send(self, row: OutboxRow) -> Reply:
        return Reply(500) if row.model_id == self._model_id else self._hub.send(row)


# -- rows that have trouble of their own -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [301, 302, 307, 404, 408, 409])
def test_a_final_status_is_tried_for_days_and_alone(code: int, hub: EmbeddedHub, ledger: Ledger) -> None:
    stuck, others = new_id(), new_id()
    uid = status(ledger, stuck, "ERROR", T0, final=True)
    hub.fail_with(code, {"Location": "http://127.0.0.1:9/"}, kinds={"status"})
    dispatcher = dispatcher_for(hub, ledger)
    dispatcher.run_once(T0)
    tries = [len(hub.records)]
    for second in range(1, 600):
        if second % 100 == 0:
            metric(ledger, others, second, T0 + second)
        before = len([record for record in hub.records if record.kind == "status"])
        dispatcher.run_once(T0 + second)
        if len([record for record in hub.records if record.kind == "status"]) > before:
            tries.append(second)
    assert max(b - a for a, b in itertools.pairwise(tries)) <= MAX_ROW_SECONDS + 1
    assert rounds(hub, others) == [100, 200, 300, 400, 500]
    assert not dispatcher.hub_is_ill
    simulate(dispatcher, T0 + 600, T0 + 10 * 24 * HOUR, HOUR)
    dispatcher.run_once(T0 + 10 * 24 * HOUR)
    assert row_of(ledger, uid).state == "pending"
    hub.heal()
    dispatcher.run_once(T0 + 10 * 24 * HOUR + 61)
    assert hub.statuses(stuck) == ["ERROR"]


def test_a_row_that_times_out_holds_its_own_lane_only(hub: EmbeddedHub, ledger: Ledger) -> None:
    model = new_id()
    hub.fail_with(408, kinds={"metrics"}, times=3)
    for number in range(3):
        metric(ledger, model, number, T0)
    status(ledger, model, "INITIATED", T0)
    dispatcher = dispatcher_for(hub, ledger)
    dispatcher.run_once(T0)
    assert hub.statuses(model) == ["INITIATED"]
    assert rounds(hub, model) == []
    simulate(dispatcher, T0 + 1, T0 + 60)
    assert rounds(hub, model) == [0, 1, 2]
    assert facts(ledger, "hub_request")["metric", "retried"] == 3


def test_a_row_is_left_alone_for_as_long_as_the_hub_asks(hub: EmbeddedHub, ledger: Ledger) -> None:
    model = new_id()
    metric(ledger, model, 1, T0)
    hub.fail_with(408, {"Retry-After": "300"}, times=1)
    dispatcher = dispatcher_for(hub, ledger)
    simulate(dispatcher, T0, T0 + 299, 5)
    assert len(hub.records) == 1
    dispatcher.run_once(T0 + 301)
    assert rounds(hub, model) == [1]


@pytest.mark.parametrize(("code", "final"), [(400, True), (422, True), (422, False), (404, False), (302, False)])
def test_what_is_rejected_is_noted_and_not_sent_again(
    code: int, final: bool, hub: EmbeddedHub, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    model, run = new_id(), new_id()
    ledger.append(Entry(run, T0, run={"model_id": model}))
    uid = status(ledger, model, "ERROR", T0, run_id=run, final=final)
    hub.fail_with(code)
    dispatcher = dispatcher_for(hub, ledger)
    simulate(dispatcher, T0, T0 + 5)
    assert len(hub.records) == 1
    assert (row_of(ledger, uid).state, row_of(ledger, uid).outcome) == ("rejected", str(code))
    run_row = ledger.run(run)
    assert run_row is not None
    assert run_row["problems"] == {"hub_rejected": T0}
    assert facts(ledger, "hub_request") == {("status", "rejected"): 1}
    message = f"The hub rejected a status of model {model} with {code}."
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR] == [message]


def test_the_text_of_a_log_is_kept_only_until_the_hub_has_it(hub: EmbeddedHub, ledger: Ledger) -> None:
    payload = {"client": "site-1", "log": "cannot read canary-4711"}
    ledger.append(Entry(new_id(), T0, outbox=(OutboxItem(new_id(), "log", payload),)))
    hub.fail_with(503, times=1)
    dispatcher = dispatcher_for(hub, ledger)
    dispatcher.run_once(T0)
    assert [row.payload for row in ledger.outbox()] == [payload]
    simulate(dispatcher, T0 + 1, T0 + 60)
    (row,) = ledger.outbox()
    assert (row.state, row.payload) == ("delivered", {"client": "site-1"})
    assert "canary-4711" in repr(hub.records)


@pytest.mark.parametrize("kind", ["metric", "log"])
def test_only_a_rejected_status_is_a_problem_of_its_run(kind: str, hub: EmbeddedHub, ledger: Ledger) -> None:
    model, run = new_id(), new_id()
    payload = {"client": "site-1", "round": 1, "label": "loss", "value": 0.5, "log": "a line"}
    ledger.append(Entry(run, T0, run={"model_id": model}, outbox=(OutboxItem(model, kind, payload),)))
    hub.fail_with(422)
    simulate(dispatcher_for(hub, ledger), T0, T0 + 5)
    run_row = ledger.run(run)
    assert run_row is not None
    assert run_row["problems"] == {}
    assert facts(ledger, "hub_request") == {(kind, "rejected"): 1}


def test_rows_that_cannot_be_sent_do_not_stop_those_behind_them(hub: EmbeddedHub, ledger: Ledger) -> None:
    model, final_model = new_id(), new_id()
    poison = [
        add(ledger, model, "status", T0),
        add(ledger, model, "status", T0, status="NONSENSE"),
        add(ledger, model, "metric", T0, client="c", round=1, label="x", value=float("nan")),
        add(ledger, model, "metric", T0),
        add(ledger, model, "gossip", T0),
        add(ledger, "../x", "status", T0, status="ERROR"),
    ]
    final_poison = status(ledger, final_model, "NONSENSE", T0, final=True)
    status(ledger, model, "INITIATED", T0)
    metric(ledger, model, 1, T0)
    dispatcher = dispatcher_for(hub, ledger)
    dispatcher.run_once(T0)
    assert hub.statuses(model) == ["INITIATED"]
    assert rounds(hub, model) == [1]
    assert {row_of(ledger, uid).state for uid in poison} == {"rejected"}
    assert row_of(ledger, final_poison).state == "pending"
    assert not dispatcher.hub_is_ill
    assert len(hub.records) == 2


def test_what_a_row_names_cannot_break_a_line_of_the_log(
    hub: EmbeddedHub, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    evil = "evil\n2030-01-01 - ERROR - all is lost \x1b[2J\x9b\u202e" + "x" * 10_000
    status(ledger, evil, "STOPPED", 1.0, final=True)
    metric(ledger, evil, 1, 2.0)
    hub.fail_with(400)
    with caplog.at_level(logging.DEBUG, "flip_observability"):
        simulate(dispatcher_for(hub, ledger), 10.0, 60.0)
    told = [message for message in caplog.messages if "evil" in message]
    assert told
    assert all(message.isprintable() and len(message) < 1_500 for message in told)


def test_a_transport_that_raises_is_taken_for_a_row_that_cannot_be_sent(hub: EmbeddedHub, ledger: Ledger) -> None:
    class Broken(_FailsFor):
        def send(self, row: OutboxRow) -> Reply:
            if row.model_id == self._model_id:
                raise RuntimeError("patient 4711")
            return self._hub.send(row)

    bad, good = new_id(), new_id()
    uid = status(ledger, bad, "INITIATED", T0)
    status(ledger, good, "INITIATED", T0)
    Dispatcher(ledger, Broken(hub, bad), settings_for(hub)).run_once(T0)
    assert (row_of(ledger, uid).state, row_of(ledger, uid).outcome) == ("rejected", "RuntimeError")
    assert hub.statuses(good) == ["INITIATED"]


def test_what_is_not_final_is_given_up_in_the_end_even_while_the_hub_is_ill(hub: EmbeddedHub, ledger: Ledger) -> None:
    model, other = new_id(), new_id()
    final = status(ledger, model, "ERROR", T0, final=True)
    old = [metric(ledger, model, number, T0) for number in range(5)] + [status(ledger, other, "INITIATED", T0)]
    young = metric(ledger, other, 1, T0 + 20 * HOUR)
    hub.down()
    dispatcher = dispatcher_for(hub, ledger, FLIP_OUTBOX_MAX_AGE_HOURS=10)
    simulate(dispatcher, T0, T0 + 10 * HOUR, 600)
    assert {row.state for row in ledger.outbox()} == {"pending"}
    simulate(dispatcher, T0 + 10 * HOUR + 1, T0 + 12 * HOUR, 600)
    assert {row_of(ledger, uid).state for uid in old} == {"expired"}
    assert row_of(ledger, final).state == row_of(ledger, young).state == "pending"
    counts = facts(ledger, "hub_request")
    assert counts["metric", "expired"] == 5
    assert counts["status", "expired"] == 1
    hub.up()
    dispatcher.run_once(T0 + 21 * HOUR)
    assert hub.statuses(model) == ["ERROR"]
    assert rounds(hub, other) == [1]
    assert rounds(hub, model) == []


# -- order and supersession --------------------------------------------------------------------------------------------


def test_a_final_status_waits_for_what_is_on_its_way_and_replaces_the_rest(hub: EmbeddedHub, ledger: Ledger) -> None:
    model = new_id()
    dispatcher = dispatcher_for(hub, ledger)
    hub.hang(times=1)
    first = status(ledger, model, "INITIATED", time.time())
    second = status(ledger, model, "PREPARED", time.time())
    dispatcher.start()
    assert hub.wait(lambda h: len(h.records) == 1)
    final = status(ledger, model, "ERROR", time.time(), final=True)
    dispatcher.nudge()
    assert not dispatcher.wait_for(final, 0.5)
    assert len(hub.records) == 1
    hub.heal()
    assert dispatcher.wait_for(final, 30)
    dispatcher.stop(30)
    assert hub.statuses(model) == ["ERROR"]
    assert {row_of(ledger, first).state, row_of(ledger, second).state} == {"superseded"}


@given(data=st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_whatever_the_hub_answers_order_is_kept_and_nothing_is_lost(data: st.DataObject) -> None:
    models = [str(uuid.UUID(int=number)) for number in range(3)]
    codes = [200, 200, 200, 302, 401, 404, 408, 409, 422, 429, 500, None]
    settings = settings_for(None)
    ledger = Ledger(None)
    hub = _Scripted(data.draw(st.lists(st.sampled_from(codes), max_size=60)))
    dispatchers = [Dispatcher(ledger, hub, settings, rng=random.Random(n)) for n in range(2)]
    said: list[tuple[str, int, bool, str]] = []
    now = T0
    for model, kind in data.draw(st.lists(st.tuples(st.sampled_from(models), st.sampled_from("smf")), max_size=25)):
        if kind == "m":
            said.append((model, 1, False, metric(ledger, model, len(said), now)))
        else:
            said.append((model, 0, kind == "f", status(ledger, model, "ERROR", now, final=kind == "f")))
        if data.draw(st.booleans()):
            now += data.draw(st.sampled_from([0.0, 1.0, 30.0]))
            data.draw(st.sampled_from(dispatchers)).run_once(now)
    for _ in range(200):
        now += 20
        for dispatcher in dispatchers:
            dispatcher.run_once(now)
    states = {uid: row_of(ledger, uid).state for _, _, _, uid in said}
    assert not set(states.values()) - {"delivered", "rejected", "superseded"}
    for model in models:
        for lane in (0, 1):
            order = [uid for m, n, _, uid in said if (m, n) == (model, lane)]
            accepted = [uid for uid in hub.accepted if uid in order]
            assert accepted == [uid for uid in order if states[uid] == "delivered"]
        finals = [uid for m, _, final, uid in said if final and m == model]
        assert all(states[uid] in ("delivered", "rejected") for uid in finals)
    assert Counter(states.values())["superseded"] == sum(row.state == "superseded" for row in ledger.outbox())
    assert _spent(ledger) == Counter(row.attempts for row in ledger.outbox() if row.state != "superseded")


def _spent(ledger: Ledger) -> Counter[int]:
    by_row: Counter[str] = Counter()
    total = sum(facts(ledger, "hub_request").values())
    rows = [row for row in ledger.outbox() if row.state != "superseded"]
    superseded = sum(_counted(row.attempts) for row in ledger.outbox() if row.state == "superseded")
    assert total == sum(row.attempts for row in rows) + superseded
    by_row.update({row.uid: row.attempts for row in rows})
    return Counter(by_row[row.uid] for row in rows)


class _Scripted:
    """A hub that answers from a list, and then accepts everything."""

    def __init__(self, codes: list[int | None]) -> None:
        self._codes = codes
        self._lock = threading.Lock()
        self.accepted: list[str] = []

    def send(self, row: OutboxRow) -> Reply:
        with self._lock:
            code = self._codes.pop(0) if self._codes else 200
            if code == 200:
                self.accepted.append(row.uid)
            return Reply(code)


@given(st.integers(0, 500))
def test_attempts_are_counted_in_bundles_that_add_up(retries: int) -> None:
    steps = [_counted(n + 1) - _counted(n) for n in range(retries)]
    assert sum(steps) == _counted(retries) <= retries
    assert retries - _counted(retries) < 20
    assert len([step for step in steps if step]) <= 10 + retries // 20


# -- several processes -------------------------------------------------------------------------------------------------

_WORKER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from flip_observability.hub import Dispatcher, HubTransport
    from flip_observability.ledger import Ledger
    from flip_observability.settings import Settings

    settings = Settings.load()
    dispatcher = Dispatcher(Ledger(Path(sys.argv[1])), HubTransport(settings), settings)
    dispatcher.start()
    print("ready", flush=True)
    sys.stdin.read()
    dispatcher.stop(30)
    """
)


@pytest.fixture
def worker(hub: EmbeddedHub, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        environment = os.environ | {
            "LOCAL_DEV": "false",
            "FLIP_API_INTERNAL_URL": hub.url,
            "INTERNAL_SERVICE_KEY": hub.key,
        }
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def test_two_processes_share_one_outbox(
    hub: EmbeddedHub, ledger: Ledger, worker: Callable[[], subprocess.Popen[str]]
) -> None:
    workers = [worker(), worker()]
    for process in workers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    models = [new_id() for _ in range(10)]
    for number in range(20):
        for model in models:
            metric(ledger, model, number, time.time())
        if number == 10:
            hub.down()
            time.sleep(0.5)
            hub.up()
    for model in models:
        status(ledger, model, "STOPPED", time.time(), final=True)
    assert hub.wait(lambda h: all(h.statuses(m) and set(rounds(h, m)) == set(range(20)) for m in models), 120)
    for model in models:
        seen = rounds(hub, model)
        # At least once and in order: what is sent again when a connection was dropped comes before what is new.
        assert sorted(set(seen)) == list(range(20))
        assert seen == sorted(seen)
        assert set(hub.statuses(model)) == {"STOPPED"}
    for process in workers:
        process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_what_a_lost_process_was_sending_is_sent_by_another_one(
    how: signal.Signals, hub: EmbeddedHub, ledger: Ledger, worker: Callable[[], subprocess.Popen[str]]
) -> None:
    model = new_id()
    hub.hang()
    process = worker()
    status(ledger, model, "ERROR", time.time(), final=True)
    metric(ledger, model, 1, time.time())
    assert hub.wait(lambda h: len(h.records) == 2, 60)
    process.send_signal(how)
    if how is signal.SIGKILL:
        process.wait(60)
    hub.heal()
    now = time.time()
    dispatcher = dispatcher_for(hub, ledger)
    if how is signal.SIGSTOP:
        assert dispatcher.run_once(now) == 0  # it lives: its leases hold
        now += LEASE_SECONDS + 1
    assert dispatcher.run_once(now) == 2
    assert hub.statuses(model) == ["ERROR"]
    assert rounds(hub, model) == [1]
    if how is signal.SIGSTOP:
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)  # it comes back, and changes nothing
        assert {row.state for row in ledger.outbox()} == {"delivered"}
        assert len(hub.records) == 4


# -- a ledger that has trouble -----------------------------------------------------------------------------------------


def test_a_locked_ledger_is_waited_for(hub: EmbeddedHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import sqlite3

    with Ledger(tmp_path, busy_ms=20) as ledger:
        uid = status(ledger, new_id(), "ERROR", time.time(), final=True)
        blocker = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        dispatcher = dispatcher_for(hub, ledger)
        dispatcher.start()
        for _ in range(10):
            dispatcher.nudge()
            time.sleep(0.05)
        assert not dispatcher.wait_for(uid, 0.1)
        blocker.execute("ROLLBACK")
        blocker.close()
        assert dispatcher.wait_for(uid, 30)
        dispatcher.stop(30)
    assert caplog.text.count("cannot take rows from the outbox") <= 1


def test_an_answer_that_could_not_be_written_down_is_asked_for_again(hub: EmbeddedHub, tmp_path: Path) -> None:
    import sqlite3

    model = new_id()
    with Ledger(tmp_path, busy_ms=20) as ledger:
        now = time.time()
        status(ledger, model, "ERROR", now, final=True)
        hub.hang(times=1)
        dispatcher = dispatcher_for(hub, ledger)
        thread = threading.Thread(target=dispatcher.run_once, args=(now,))
        thread.start()
        assert hub.wait(lambda h: len(h.records) == 1)
        blocker = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        hub.heal()
        thread.join(60)
        blocker.execute("ROLLBACK")
        blocker.close()
        simulate(dispatcher, now + 1, now + LEASE_SECONDS + 5)
        assert hub.statuses(model) == ["ERROR"]


def test_a_closed_ledger_ends_nothing(hub: EmbeddedHub, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    dispatcher = dispatcher_for(hub, ledger)
    dispatcher.start()
    ledger.close()
    dispatcher.nudge()
    assert not dispatcher.wait_for("x", 0.3)
    assert dispatcher.run_once() == 0
    dispatcher.stop(30)


# -- before anything is taken ------------------------------------------------------------------------------------------


def test_nothing_is_sent_before_what_must_precede_it_has_been_done(
    hub: EmbeddedHub, ledger: Ledger, tmp_path: Path
) -> None:
    model = new_id()
    status(ledger, model, "INITIATED", T0)
    calls: list[int] = []

    def prepare() -> None:
        calls.append(len(hub.records))
        if len(calls) < 3:
            raise OSError("the disk")

    settings = settings_for(hub)
    dispatcher = Dispatcher(ledger, HubTransport(settings), settings, prepare=prepare)
    for _ in range(2):
        assert dispatcher.run_once(T0) == 0
    assert dispatcher.run_once(T0) == 1
    assert calls == [0, 0, 0]
    status(ledger, model, "PREPARED", T0)
    dispatcher._ledger = Ledger(tmp_path / "other")
    dispatcher._ledger.close()  # one that cannot be used
    assert dispatcher.run_once(T0 + 5) == 0
    dispatcher._ledger = ledger
    assert dispatcher.run_once(T0 + 10) == 1
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("contract", "told", "sent"),
    [
        ("2026-10", "auto", ["RUNNING", "RESULTS_UPLOAD_FAILED"]),
        ("2026-10", "2026-05", ["ERROR"]),  # what it was told counts: the hub refuses TRAINING_STARTED
        ("2026-05", "2026-05", ["TRAINING_STARTED", "ERROR"]),
    ],
)
def test_an_observer_that_is_told_no_contract_speaks_the_runs(
    ledger: Ledger, contract: Any, told: str, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flip_observability.settings.installed_flip", lambda: None)  # where the observer runs
    model = str(uuid.uuid4())
    with EmbeddedHub(contract) as hub:
        ledger.append(Entry("r", T0, run={"model_id": model, "contract": "2026-10"}))
        dispatcher = dispatcher_for(hub, ledger, FLIP_HUB_CONTRACT=told)
        for number, status in enumerate(("RUNNING", "RESULTS_UPLOAD_FAILED")):
            item = OutboxItem(model, "status", {"status": status}, final=bool(number))
            ledger.append(Entry("r", T0, outbox=(item,)))
            dispatcher.run_once(T0 + number)
        assert hub.statuses(model) == sent
