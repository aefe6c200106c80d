"""The embedded hub judges like the contract says, remembers, and can be made ill."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from flip_observability.demo.hub import EmbeddedHub

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"


@pytest.fixture
def hub() -> Iterator[EmbeddedHub]:
    with EmbeddedHub() as hub:
        yield hub


def call(hub: EmbeddedHub, method: str, path: str, key: str | None = None, **kwargs: Any) -> int:
    headers = {"X-Internal-Service-Key": hub.key if key is None else key, **kwargs.pop("headers", {})}
    return requests.request(
        method, hub.url + path, headers=headers, timeout=10, allow_redirects=False, **kwargs
    ).status_code


def put(hub: EmbeddedHub, status: str = "INITIATED", model: str = MODEL, **kwargs: Any) -> int:
    return call(hub, "PUT", f"/model/{model}/status/{status}", **kwargs)


def post(hub: EmbeddedHub, kind: str, body: Any, model: str = MODEL, **kwargs: Any) -> int:
    return call(hub, "POST", f"/model/{model}/{kind}", json=body, **kwargs)


METRIC = {"trust": "Trust_1", "globalRound": 1, "label": "ACCURACY", "result": 0.5}
LOG = {"trust": "Trust_1", "log": "text"}
METRIC_10 = {"fl_client_name": "site-1", "global_round": 0, "label": "ACCURACY", "result": 0.5}
LOG_10 = {"fl_client_name": None, "log": "text", "success": False}
NULLS: dict[str, Any] = dict.fromkeys(("fl_client_name", "log", "event_type", "global_round", "details"))
NULLS["success"] = True
EVENT_10 = {
    "fl_client_name": "site-1",
    "event_type": "CLIENT_RESULT_RECEIVED",
    "global_round": 1,
    "details": {"size_bytes": 3},
    "success": True,
}


def test_accepted_statuses_are_kept_in_order(hub: EmbeddedHub) -> None:
    sent = ["INITIATED", "PREPARED", "TRAINING_STARTED", "RESULTS_UPLOADED"]
    assert [put(hub, status) for status in sent] == [200] * 4
    assert hub.statuses(MODEL) == sent
    assert hub.statuses(str(uuid.uuid4())) == []


def test_key_never_stands_in_a_record_and_traceparent_does(hub: EmbeddedHub) -> None:
    put(hub, headers={"traceparent": "00-aa-bb-01", "Authorization": "secret-thing"})
    put(hub, key="a-wrong-key")
    assert hub.records[0].headers["traceparent"] == "00-aa-bb-01"
    text = repr(hub.records)
    assert hub.key not in text
    assert "a-wrong-key" not in text
    assert "secret-thing" not in text


@pytest.mark.parametrize("key", ["", "wrong"])
def test_bad_key_is_401_and_does_not_count(hub: EmbeddedHub, key: str) -> None:
    assert put(hub, key=key) == 401
    assert hub.statuses(MODEL) == []
    assert [r.code for r in hub.records] == [401]


def test_header_name_can_be_another() -> None:
    with EmbeddedHub(header="X-Other") as hub:
        assert put(hub) == 401
        assert put(hub, headers={"X-Other": hub.key}) == 200


@pytest.mark.parametrize(
    ("contract", "status", "code"),
    [
        ("2026-05", "TRAINING_STARTED", 200),
        ("2026-05", "RUNNING", 422),
        ("2026-05", "RESULTS_UPLOAD_FAILED", 422),
        ("2026-05", "training_started", 422),
        ("2026-05", "NO_SUCH", 422),
        ("2026-10", "RUNNING", 200),
        ("2026-10", "RESULTS_UPLOAD_FAILED", 200),
        ("2026-10", "TRAINING_STARTED", 422),
    ],
)
def test_vocabulary_of_each_contract(contract: Any, status: str, code: int) -> None:
    with EmbeddedHub(contract) as hub:
        assert put(hub, status) == code
        assert hub.statuses(MODEL) == ([status] if code == 200 else [])


@pytest.mark.parametrize("model", ["no-uuid", "..%2Fx", "{" + MODEL + "}", MODEL.upper(), MODEL.replace("-", "")])
def test_model_id_must_be_a_canonical_uuid(hub: EmbeddedHub, model: str) -> None:
    assert put(hub, model=model) == 422


def test_unknown_model_is_404() -> None:
    with EmbeddedHub(model_ids=[MODEL]) as hub:
        assert put(hub) == 200
        assert put(hub, model=str(uuid.uuid4())) == 404


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", f"/model/{MODEL}/status/INITIATED", 405),
        ("PUT", f"/model/{MODEL}/metrics", 405),
        ("PUT", f"/model/{MODEL}/status", 404),
        ("PUT", f"/model/{MODEL}/status/INITIATED/x", 404),
        ("PUT", f"/models/{MODEL}/status/INITIATED", 404),
        ("GET", "/", 404),
    ],
)
def test_other_endpoints(hub: EmbeddedHub, method: str, path: str, code: int) -> None:
    assert call(hub, method, path) == code


def test_status_has_no_body(hub: EmbeddedHub) -> None:
    assert put(hub, data=b"{}") == 422


@pytest.mark.parametrize(
    ("contract", "kind", "good"),
    [
        ("2026-05", "metrics", METRIC),
        ("2026-05", "logs", LOG),
        ("2026-10", "metrics", METRIC_10),
        ("2026-10", "metrics", {**METRIC_10, "x_value": 2.5, "x_label": "Epochs"}),
        ("2026-10", "logs", LOG_10),
        ("2026-10", "logs", EVENT_10),
        # As FLIP's own client sends them: all six keys, nulls included.
        ("2026-10", "logs", {**NULLS, "fl_client_name": "site-1", "log": "text", "success": False}),
        ("2026-10", "logs", {**NULLS, "log": "text", "success": False}),
        ("2026-10", "logs", {**NULLS, "event_type": "ROUND_STARTED", "global_round": 1}),
        ("2026-10", "logs", {**NULLS, "event_type": "JOB_WAITING_FOR_RESOURCES", "fl_client_name": "site-1"}),
    ],
)
def test_good_payloads(contract: Any, kind: str, good: dict[str, Any]) -> None:
    with EmbeddedHub(contract) as hub:
        assert post(hub, kind, good) == 200
        assert hub.payloads(MODEL, kind) == [good]


@pytest.mark.parametrize(
    ("contract", "kind", "good", "change"),
    [
        ("2026-05", "metrics", METRIC, {"globalRound": "1"}),
        ("2026-05", "metrics", METRIC, {"globalRound": 1.5}),
        ("2026-05", "metrics", METRIC, {"globalRound": True}),
        ("2026-05", "metrics", METRIC, {"result": "0.5"}),
        ("2026-05", "metrics", METRIC, {"result": None}),
        ("2026-05", "metrics", METRIC, {"trust": None}),
        ("2026-05", "metrics", METRIC, {"extra": 1}),
        ("2026-05", "metrics", METRIC_10, {}),
        ("2026-05", "logs", LOG, {"log": 3}),
        ("2026-05", "logs", EVENT_10, {}),
        ("2026-10", "metrics", METRIC, {}),
        ("2026-10", "metrics", METRIC_10, {"global_round": -1}),
        ("2026-10", "metrics", METRIC_10, {"x_label": ""}),
        ("2026-10", "metrics", METRIC_10, {"x_label": "x" * 65}),
        ("2026-10", "metrics", METRIC_10, {"fl_client_name": None}),
        ("2026-10", "logs", LOG_10, {"event_type": "ROUND_STARTED", "global_round": 1}),
        ("2026-10", "logs", LOG_10, {"log": None}),
        ("2026-10", "logs", EVENT_10, {"global_round": None}),
        ("2026-10", "logs", EVENT_10, {"event_type": " "}),
        ("2026-10", "logs", EVENT_10, {"event_type": "QUEUE_POSITION"}),
        ("2026-10", "logs", EVENT_10, {"global_round": 0}),
        ("2026-10", "logs", EVENT_10, {"event_type": "x" * 65}),
        ("2026-10", "logs", EVENT_10, {"details": []}),
        ("2026-10", "logs", EVENT_10, {"details": {"x": "y" * 8192}}),
    ],
)
def test_bad_payloads_are_422(contract: Any, kind: str, good: dict[str, Any], change: dict[str, Any]) -> None:
    with EmbeddedHub(contract) as hub:
        assert post(hub, kind, {**good, **change}) == 422
        assert hub.payloads(MODEL, kind) == []
        assert hub.records[0].problem


@pytest.mark.parametrize("body", [b"", b"{", b'{"trust":"a","globalRound":1,"label":"b","result":NaN}', b"\xff"])
def test_bad_json_is_422(hub: EmbeddedHub, body: bytes) -> None:
    json_type = {"Content-Type": "application/json"}
    assert call(hub, "POST", f"/model/{MODEL}/metrics", data=body, headers=json_type) == 422


def test_wrong_content_type_is_422(hub: EmbeddedHub) -> None:
    assert call(hub, "POST", f"/model/{MODEL}/logs", data=b'{"trust": "a", "log": "b"}') == 422


def test_huge_body_is_refused_unread(hub: EmbeddedHub) -> None:
    with socket.create_connection(("127.0.0.1", hub._port)) as raw:
        raw.sendall(
            f"POST /api/model/{MODEL}/logs HTTP/1.1\r\nHost: x\r\nX-Internal-Service-Key: {hub.key}\r\n"
            f"Content-Length: {10**12}\r\n\r\n".encode()
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_down_refuses_and_up_listens_on_the_same_port(hub: EmbeddedHub) -> None:
    url = hub.url
    with requests.Session() as session:  # a connection that is kept alive is dropped as well
        session.headers["X-Internal-Service-Key"] = hub.key
        target = f"{url}/model/{MODEL}/status/INITIATED"
        assert session.put(target, timeout=10).status_code == 200
        hub.down()
        assert not hub.is_up
        with pytest.raises(requests.ConnectionError):
            session.put(target, timeout=10)
        hub.down()  # twice is no harm
        hub.up()
        hub.up()
        assert hub.url == url
        assert session.put(target, timeout=10).status_code == 200
    assert len(hub.records) == 2


def test_fault_for_some_times_and_kinds(hub: EmbeddedHub) -> None:
    hub.fail_with(503, {"Retry-After": "7"}, times=2, kinds=["status"])
    assert post(hub, "metrics", METRIC) == 200
    assert [put(hub) for _ in range(3)] == [503, 503, 200]
    assert [(r.code, r.kind, r.status) for r in hub.records[1:3]] == [(503, "status", "INITIATED")] * 2
    hub.fail_with(429)
    assert put(hub) == 429
    hub.heal()
    assert put(hub) == 200


def test_fault_sends_its_headers(hub: EmbeddedHub) -> None:
    hub.fail_with(302, {"Location": "http://127.0.0.1:1/"})
    answer = requests.put(f"{hub.url}/model/{MODEL}/status/ERROR", timeout=10, allow_redirects=False)
    assert (answer.status_code, answer.headers["Location"]) == (302, "http://127.0.0.1:1/")


def test_hanging_holds_until_healed(hub: EmbeddedHub) -> None:
    hub.hang()
    with pytest.raises(requests.Timeout):
        requests.put(f"{hub.url}/model/{MODEL}/status/ERROR", timeout=0.2)
    assert [r.code for r in hub.records] == [0]
    hub.heal()
    assert put(hub) == 200
    assert hub.statuses(MODEL) == ["INITIATED"]


def test_wait_wakes_on_a_record(hub: EmbeddedHub) -> None:
    thread = threading.Thread(target=put, args=(hub, "STOPPED"))
    thread.start()
    assert hub.wait(lambda h: h.statuses(MODEL) == ["STOPPED"])
    thread.join()
    assert not hub.wait(lambda h: len(h.records) > 1, timeout=0.01)


def test_requests_from_many_threads_are_all_recorded(hub: EmbeddedHub) -> None:
    threads = [threading.Thread(target=lambda: [put(hub) for _ in range(10)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hub.statuses(MODEL)) == 80
