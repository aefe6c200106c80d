"""What is said on the wire, and what an answer means."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from typing import Any, Literal

import pytest
import requests

from flip_observability.constants import ModelStatus
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.hub import CONTRACTS, Reply, Verdict, _retry_after, classify
from flip_observability.ledger import OutboxRow

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"

METRIC = {"client": "site-3", "round": 2, "label": "LOSS_FUNCTION", "value": 0.5}
EVENT = {
    "client": None,
    "event_type": "ROUND_STARTED",
    "round": 1,
    "details": {"total_rounds": 5},
    "success": True,
}


def row(kind: str = "status", *, final: bool = False, payload: dict[str, Any] | None = None) -> OutboxRow:
    return OutboxRow(
        id=1,
        uid="u",
        run_id=None,
        model_id=MODEL,
        kind=kind,
        lane=0,
        final=final,
        payload={"status": "ERROR"} if payload is None else payload,
        created=0.0,
        attempts=0,
        next_attempt=0.0,
        state="pending",
        done=None,
        outcome=None,
    )


@pytest.mark.parametrize("contract", ["2026-05", "2026-10"])
def test_everything_that_can_be_said_is_accepted_by_a_hub_of_that_contract(
    contract: Literal["2026-05", "2026-10"],
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [("status", {"status": status.value}) for status in ModelStatus]
    calls += [("metric", METRIC), ("metric", METRIC | {"client": "hospital", "x_value": 0.1, "x_label": "Steps"})]
    calls += [("log", {"client": None, "log": "text"}), ("log", {"client": "site-1", "log": "text"})]
    calls += [("event", EVENT)] if CONTRACTS[contract].takes_events else []
    with EmbeddedHub(contract) as hub:
        for kind, payload in calls:
            method, path, body = CONTRACTS[contract].request(kind, MODEL, payload)
            answer = requests.request(method, hub.url + path, json=body, headers={hub.header: hub.key}, timeout=10)
            assert answer.status_code == 200, (kind, payload, hub.records[-1].problem)


@pytest.mark.parametrize(
    ("kind", "payload", "told"),
    [
        ("log", {"client": "site-1", "log": "text"}, {"fl_client_name": "site-1", "log": "text", "success": False}),
        (
            "event",
            EVENT,
            {"event_type": "ROUND_STARTED", "global_round": 1, "details": {"total_rounds": 5}, "success": True},
        ),
    ],
)
def test_a_log_has_every_key_as_flip_sends_it(kind: str, payload: dict[str, Any], told: dict[str, Any]) -> None:
    keys = ("fl_client_name", "log", "event_type", "global_round", "details", "success")
    assert CONTRACTS["2026-10"].request(kind, MODEL, payload)[2] == dict.fromkeys(keys) | told


@pytest.mark.parametrize(
    ("contract", "said", "sent"),
    [
        ("2026-05", "TRAINING_STARTED", "TRAINING_STARTED"),
        ("2026-05", "RUNNING", "TRAINING_STARTED"),
        ("2026-05", "RESULTS_UPLOAD_FAILED", "ERROR"),
        ("2026-10", "TRAINING_STARTED", "RUNNING"),
        ("2026-10", "RESULTS_UPLOAD_FAILED", "RESULTS_UPLOAD_FAILED"),
        ("2026-10", "STOPPED", "STOPPED"),
    ],
)
def test_statuses_are_spelled_as_the_contract_has_them(contract: str, said: str, sent: str) -> None:
    request = CONTRACTS[contract].request("status", MODEL, {"status": said})
    assert request == ("PUT", f"/model/{MODEL}/status/{sent}", None)


def test_a_failed_upload_has_a_status_of_each_contract() -> None:
    assert CONTRACTS["2026-05"].upload_failed is ModelStatus.ERROR
    assert CONTRACTS["2026-10"].upload_failed is ModelStatus.RESULTS_UPLOAD_FAILED


def test_clients_and_metrics_are_spelled_as_the_contract_has_them() -> None:
    assert CONTRACTS["2026-05"].request("metric", MODEL, METRIC)[2] == {
        "trust": "Trust_3",
        "globalRound": 2,
        "label": "LOSS_FUNCTION",
        "result": 0.5,
    }
    assert CONTRACTS["2026-10"].request("metric", MODEL, METRIC)[2] == {
        "fl_client_name": "site-3",
        "global_round": 2,
        "label": "LOSS_FUNCTION",
        "result": 0.5,
        "x_value": 2.0,
        "x_label": "Global Rounds",
    }
    for name in ("site-", "site-x", "my-site-1", "site-1\n", "Trust_9"):
        body = CONTRACTS["2026-05"].request("log", MODEL, {"client": name, "log": ""})[2]
        assert body is not None
        assert body["trust"] == name


@pytest.mark.parametrize(
    ("kind", "model_id", "payload"),
    [
        ("status", MODEL, {"status": "FINISHED"}),
        ("status", MODEL, {}),
        ("metric", MODEL, {"label": "x"}),
        ("gossip", MODEL, {}),
        ("event", MODEL, EVENT),  # not in the contract of 2026-05
        ("status", "../../admin", {"status": "ERROR"}),
        ("status", "..", {"status": "ERROR"}),
        ("status", MODEL.upper(), {"status": "ERROR"}),
        ("status", "", {"status": "ERROR"}),
    ],
)
def test_what_cannot_be_said_is_refused(kind: str, model_id: str, payload: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError)):
        CONTRACTS["2026-05"].request(kind, model_id, payload)


def _verdicts(final: bool) -> dict[int | None, Verdict]:
    statuses = [None, *range(100, 600)]
    return {status: classify(Reply(status), row(final=final)) for status in statuses}


def test_answers_concern_the_hub_the_row_or_nobody() -> None:
    ill = {None, 401, 403, 429, *range(100, 200), *range(500, 600)}
    for final in (False, True):
        verdicts = _verdicts(final)
        assert {s for s, v in verdicts.items() if v is Verdict.HUB_ILL} == ill
        assert {s for s, v in verdicts.items() if v is Verdict.DELIVERED} == set(range(200, 300))
    assert {s for s, v in _verdicts(False).items() if v is Verdict.BACK_OFF} == {408}
    assert {s for s, v in _verdicts(True).items() if v is Verdict.BACK_OFF} == {404, 408, 409, *range(300, 400)}
    assert _verdicts(True)[422] is Verdict.REJECTED
    assert _verdicts(False)[404] is Verdict.REJECTED


def test_what_cannot_be_sent_is_given_up_unless_it_is_final() -> None:
    assert classify(Reply(unsendable=True), row()) is Verdict.REJECTED
    assert classify(Reply(unsendable=True), row(final=True)) is Verdict.BACK_OFF


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1e3", None),
        ("٣", None),
        ("0", 0.0),
        (" 7 ", 7.0),
        ("99999999999999999999999999", 3600.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2150 07:28:00 GMT", 3600.0),
        ("Wed, 99 Oct 2150 99:28:00 GMT", None),
    ],
)
def test_retry_after_in_all_spellings(header: str | None, seconds: float | None) -> None:
    assert _retry_after(header) == seconds


def test_retry_after_as_a_date_is_counted_from_now() -> None:
    seconds = _retry_after(formatdate(time.time() + 1_000, usegmt=True))
    assert seconds is not None
    assert 0 < seconds <= 1_000


def test_an_outcome_is_a_code_or_a_type() -> None:
    assert Reply(503).outcome == "503"
    assert Reply(error="ConnectionError").outcome == "ConnectionError"
    assert json.dumps(Reply().outcome) == '"no answer"'
