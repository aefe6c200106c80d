"""FLIP's client object: where its calls go, and what it refuses."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flip_observability
from flip_observability import FLIP, client, hub
from flip_observability.client import MAX_LOG_CHARACTERS, CleanupError, NotOnThisSideError, Outbox, attach, detach
from flip_observability.constants import FlareEvents, FlipEvents, FLLogEvent, ModelStatus
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.ledger import Entry, Ledger
from flip_observability.results import ResultsUploadError
from flip_observability.settings import Settings, SettingsError

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"
BAD_MODEL_IDS = ["", "../x", "x" * 10_000, None, 7, "0f8fad5b", "0f8fad5b-d9cb-469f-a165-70867728950e/.."]
OTHER_SPELLINGS = ["{0F8FAD5B-D9CB-469F-A165-70867728950E}", "0F8FAD5BD9CB469FA16570867728950E", uuid.UUID(MODEL)]


class Sink:
    """What a run's recorder is to the client."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, str, dict[str, Any], bool]] = []

    def post(self, kind: str, model_id: str, payload: dict[str, Any], final: bool) -> None:
        json.dumps(payload, allow_nan=False)  # it goes into the ledger
        self.posts.append((kind, model_id, payload, final))


@pytest.fixture
def sink() -> Iterator[Sink]:
    attached = Sink()
    attach(attached)
    yield attached
    detach(attached)


@pytest.fixture
def hub_server() -> Iterator[EmbeddedHub]:
    with EmbeddedHub() as server:
        yield server


@pytest.fixture
def alone(hub_server: EmbeddedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], FLIP]]:
    """A process without a run, with the hub and the ledger of this test."""
    detach()
    monkeypatch.setattr(client, "_own", None)
    monkeypatch.setenv("LOCAL_DEV", "false")
    monkeypatch.setenv("FLIP_API_INTERNAL_URL", hub_server.url)
    monkeypatch.setenv("INTERNAL_SERVICE_KEY", hub_server.key)
    monkeypatch.setenv("FLIP_OBSERVABILITY_DIR", str(tmp_path / "ledger"))
    yield FLIP
    own = client._own
    if own is not None:
        own[1].close()


def local(**more: Any) -> FLIP:
    return FLIP(settings=Settings.model_validate({"LOCAL_DEV": True} | more))


# -- what is said ------------------------------------------------------------------------------------------------------


def test_one_class_under_all_its_names() -> None:
    assert flip_observability.FLIP is hub.FLIP is client.FLIP
    for module in (flip_observability, hub):
        with pytest.raises(AttributeError):
            _ = module.nothing_of_this_name


@pytest.mark.parametrize("status", [*ModelStatus, *map(str, ModelStatus)])
def test_every_status_as_member_and_as_text(status: ModelStatus | str, sink: Sink) -> None:
    FLIP().update_status(MODEL, status)
    final = str(status) in {"RESULTS_UPLOADED", "ERROR", "STOPPED", "RESULTS_UPLOAD_FAILED"}
    assert sink.posts == [("status", MODEL, {"status": str(status)}, final)]


@pytest.mark.parametrize("status", ["", "FINISHED", "error", None, 3])
def test_a_status_that_is_none(status: Any, sink: Sink) -> None:
    with pytest.raises(ValueError, match="Invalid status"):
        FLIP().update_status(MODEL, status)
    assert sink.posts == []


@pytest.mark.parametrize("model_id", BAD_MODEL_IDS)
def test_a_model_id_that_is_none(model_id: Any, sink: Sink, tmp_path: Path) -> None:
    flip = _real()
    calls: list[Callable[[], object]] = [
        lambda: flip.update_status(model_id, ModelStatus.ERROR),
        lambda: flip.send_metrics("site-1", model_id, "L", 1.0, 1),
        lambda: flip.send_handled_exception("text", "site-1", model_id),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="Invalid model ID") as caught:
            call()
        assert len(str(caught.value)) < 200
    with pytest.raises(ResultsUploadError, match="Unexpected failure uploading results to S3"):
        flip.upload_results_to_s3(tmp_path, model_id)
    assert sink.posts == []


@pytest.mark.parametrize("model_id", OTHER_SPELLINGS)
def test_a_model_id_is_sent_in_its_canonical_spelling(model_id: Any, sink: Sink) -> None:
    FLIP().update_status(model_id, "ERROR")
    FLIP().send_metrics("site-1", model_id, "L", 1.0, 1)
    FLIP().send_handled_exception("text", "site-1", model_id)
    assert [post[1] for post in sink.posts] == [MODEL] * 3


def test_metrics_as_the_outbox_has_them(sink: Sink) -> None:
    class NumberOfALibrary:
        def __float__(self) -> float:
            return 0.25

        def __index__(self) -> int:
            return 4

    flip = FLIP()
    flip.send_metrics("site-1", MODEL, "LOSS_FUNCTION", 0.5, 3)
    foreign: Any = NumberOfALibrary()
    flip.send_metrics(client_name="site-1", model_id=MODEL, label="L", value=foreign, global_round=foreign)
    flip.send_metrics("site-1", MODEL, "L", 1, 2.0, x_value=7, x_label="Steps")  # type: ignore[arg-type]
    base = {"client": "site-1", "label": "L"}
    assert [(kind, payload, final) for kind, _, payload, final in sink.posts] == [
        ("metric", {"client": "site-1", "round": 3, "label": "LOSS_FUNCTION", "value": 0.5}, False),
        ("metric", base | {"round": 4, "value": 0.25}, False),
        ("metric", base | {"round": 2, "value": 1.0, "x_value": 7.0, "x_label": "Steps"}, False),
    ]


class _Raises:
    def __float__(self) -> float:
        raise RuntimeError("patient 4711")

    def __index__(self) -> int:
        raise RuntimeError("patient 4711")


BAD_METRICS: list[dict[str, Any]] = [
    {"value": float("nan")},
    {"value": float("inf")},
    {"value": 10**400},
    {"value": "0.5"},
    {"value": None},
    {"value": [1.0]},
    {"value": _Raises()},
    {"global_round": -1},
    {"global_round": 2**31},
    {"global_round": 1.5},
    {"global_round": "1"},
    {"global_round": None},
    {"global_round": _Raises()},
    {"label": ""},
    {"label": "\0"},
    {"label": None},
    {"label": "x" * 1_001},
    {"client_name": ""},
    {"client_name": None},
    {"x_value": float("inf")},
    {"x_label": "x" * 65},
]


@pytest.mark.parametrize("bad", BAD_METRICS, ids=lambda bad: next(iter(bad)))
def test_a_metric_that_no_hub_would_take_is_logged_and_not_sent(
    bad: dict[str, Any], sink: Sink, caplog: pytest.LogCaptureFixture
) -> None:
    good: dict[str, Any] = {"client_name": "site-1", "label": "L", "value": 0.5, "global_round": 1}
    FLIP().send_metrics(model_id=MODEL, **(good | bad))
    assert sink.posts == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert MODEL in caplog.text
    assert "4711" not in caplog.text


@given(text=st.text(st.characters(), max_size=60), client_name=st.text(st.characters(), max_size=60))
def test_any_text_can_be_said_to_both_hubs(text: str, client_name: str) -> None:
    sink = Sink()
    attach(sink)
    try:
        FLIP().send_handled_exception(text, client_name, MODEL)
        FLIP().send_metrics(client_name, MODEL, text, 1.0, 1)
    finally:
        detach(sink)
    for kind, model_id, payload, _ in sink.posts:
        for contract in hub.CONTRACTS.values():
            body = json.dumps(contract.request(kind, model_id, payload)[2], ensure_ascii=False)
            assert "\\u0000" not in body
            body.encode()  # no half characters


def test_an_exceptions_text_goes_to_the_hub_and_into_no_log(sink: Sink, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    FLIP().send_handled_exception("ValueError: patient 4711", "site-2", MODEL)
    assert sink.posts == [("log", MODEL, {"client": "site-2", "log": "ValueError: patient 4711"}, False)]
    assert caplog.text == ""


def test_a_long_exception_keeps_its_beginning_and_its_end(sink: Sink) -> None:
    FLIP().send_handled_exception("begin" + "x" * 10_000_000 + "end", "site-2", MODEL)
    text = sink.posts[0][2]["log"]
    assert text.startswith("begin")
    assert text.endswith("end")
    assert len(text) < MAX_LOG_CHARACTERS + 100


def test_what_is_no_text_is_a_type_error(sink: Sink) -> None:
    with pytest.raises(TypeError, match="formatted_exception"):
        FLIP().send_handled_exception(ValueError("patient 4711"), "site-1", MODEL)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="client_name"):
        FLIP().send_handled_exception("text", 7, MODEL)  # type: ignore[arg-type]
    assert sink.posts == []


def test_flips_keywords_are_ours_and_a_recorded_status_is_true(sink: Sink) -> None:
    flip = FLIP(job_type="evaluation")
    assert flip.update_status(model_id=MODEL, new_model_status=ModelStatus.ERROR) is True
    flip.send_metrics(client_name="c", model_id=MODEL, label="L", value=1, global_round=0, x_value=None, x_label="")
    flip.send_handled_exception(formatted_exception="text", client_name=None, model_id=MODEL)
    assert [(kind, payload) for kind, _, payload, _ in sink.posts] == [
        ("status", {"status": "ERROR"}),
        ("metric", {"client": "c", "round": 0, "label": "L", "value": 1.0}),
        ("log", {"client": None, "log": "text"}),
    ]
    with pytest.raises(ValueError, match="Unknown job_type"):
        FLIP(job_type="another")


def test_a_status_that_could_not_be_recorded_is_false() -> None:
    class Broken(Sink):
        def post(self, kind: str, model_id: str, payload: dict[str, Any], final: bool) -> None:
            raise OSError

    sink = Broken()
    attach(sink)
    try:
        assert FLIP().update_status(MODEL, "ERROR") is False
    finally:
        detach(sink)


def test_in_local_dev_a_model_id_need_not_be_a_uuid(sink: Sink, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    flip = local()
    assert flip.update_status("my-model", "ERROR") is True
    flip.send_metrics("c", "my-model", "L", 1.0, 1)
    flip.send_handled_exception("text", None, "my-model")
    flip.send_event("my-model", "ROUND_STARTED", 1)
    assert sink.posts == []
    assert caplog.text.count("only logged") == 4


def test_events_as_the_outbox_has_them(sink: Sink, caplog: pytest.LogCaptureFixture) -> None:
    flip = local(FLIP_HUB_CONTRACT="2026-10")
    flip.send_event(model_id=MODEL, event_type=FLLogEvent.ROUND_STARTED, global_round=1, details={"total_rounds": 2})
    waits: dict[str, Any] = {
        "event_type": "JOB_WAITING_FOR_RESOURCES",
        "global_round": None,
        "client_name": "site-1",
        "success": False,
    }
    flip.send_event(MODEL, **waits)
    good = {"client": None, "event_type": "ROUND_STARTED", "round": 1, "details": {"total_rounds": 2}, "success": True}
    wait = {"client": "site-1", "event_type": "JOB_WAITING_FOR_RESOURCES", "round": None, "details": None}
    assert [post[2] for post in sink.posts] == [good, wait | {"success": False}]
    for kind, model_id, payload, _ in sink.posts:
        body = hub.CONTRACTS["2026-10"].request(kind, model_id, payload)[2]
        assert body is not None
    bad: list[dict[str, Any]] = [{"event_type": kind} for kind in ("", " ", "x" * 65, "QUEUE_POSITION", None)]
    bad += [{"global_round": number} for number in (None, 0, -1, "1")]
    bad += [{"details": details} for details in ({"x": "y" * 9_000}, {"x": float("nan")}, {"x": object()}, [1])]
    for change in bad:
        good_one: dict[str, Any] = {"event_type": "ROUND_STARTED", "global_round": 1}
        flip.send_event(MODEL, **(good_one | change))
    assert len(sink.posts) == 2
    assert len(caplog.records) == len(bad)
    local(FLIP_HUB_CONTRACT="2026-05").send_event(MODEL, "ROUND_STARTED", 1)
    assert len(sink.posts) == 2


def test_the_hospitals_side_is_not_here() -> None:
    flip = FLIP()
    for name in ("get_dataframe", "get_by_accession_number", "add_resource"):
        with pytest.raises(NotOnThisSideError, match=f"{name} belongs to the hospitals' side"):
            getattr(flip, name)("project", query="select")


# -- where it goes -----------------------------------------------------------------------------------------------------


def test_a_sink_that_fails_raises_nothing_into_the_run(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def post(self, *_: Any) -> None:
            raise RuntimeError("patient 4711")

    attach(Failing())
    try:
        FLIP().update_status(MODEL, "ERROR")
        FLIP().send_metrics("site-1", MODEL, "L", 1.0, 1)
    finally:
        detach()
    assert "could not be kept for the hub" in caplog.text
    assert "4711" not in caplog.text


def test_detaching_another_one_changes_nothing(sink: Sink) -> None:
    detach(Sink())
    FLIP().update_status(MODEL, "ERROR")
    assert len(sink.posts) == 1


def test_without_a_run_it_has_an_outbox_of_its_own(
    alone: Callable[[], FLIP], hub_server: EmbeddedHub, tmp_path: Path
) -> None:
    for status in ("INITIATED", "PREPARED", "ERROR"):
        alone().update_status(MODEL, status)
    alone().send_metrics("site-1", MODEL, "L", 1.0, 1)
    alone().send_handled_exception("text", "site-1", MODEL)
    assert alone().flush(60)
    assert hub_server.wait(lambda h: bool(h.payloads(MODEL, "metrics") and h.payloads(MODEL, "logs")))
    assert hub_server.statuses(MODEL)[-1] == "ERROR"
    with Ledger(tmp_path / "ledger", read_only=True) as ledger:
        assert ledger.runs() == []
        assert len(ledger.outbox()) == 5


def test_many_clients_and_threads_share_one_outbox(alone: Callable[[], FLIP], hub_server: EmbeddedHub) -> None:
    def say() -> None:
        for _ in range(5):
            alone().send_metrics("site-1", MODEL, "L", 1.0, 1)

    threads = [threading.Thread(target=say) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hub_server.wait(lambda h: len(h.payloads(MODEL, "metrics")) == 40)
    assert len([t for t in threading.enumerate() if t.name == "flip-hub-dispatcher"]) == 1


def test_flush_says_when_the_hub_has_not_accepted(alone: Callable[[], FLIP], hub_server: EmbeddedHub) -> None:
    assert alone().flush(0)  # nothing was said
    hub_server.down()
    alone().update_status(MODEL, "ERROR")
    assert not alone().flush(0.3)
    hub_server.up()
    assert alone().flush(60)
    assert hub_server.statuses(MODEL) == ["ERROR"]


def test_a_status_joins_the_run_of_another_process(
    alone: Callable[[], FLIP], hub_server: EmbeddedHub, tmp_path: Path
) -> None:
    run = str(uuid.uuid4())
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.append(Entry(run, time.time() - 60, run={"model_id": MODEL}))
        alone().update_status(MODEL, "TRAINING_STARTED")
        alone().update_status(MODEL, "INITIATED")  # backwards: recorded, not sent
        alone().send_metrics("site-1", MODEL, "L", 1.0, 1)
        alone().update_status(MODEL, "STOPPED")
        assert alone().flush(60)
        row = ledger.run(run)
        assert row is not None
        assert (row["final_status"], row["final_by"], row["status"]) == ("STOPPED", "client", "STOPPED")
        assert {item.run_id for item in ledger.outbox()} == {run}
        assert [item.payload["status"] for item in ledger.outbox(kind="status")] == ["TRAINING_STARTED", "STOPPED"]
        told = [event["attrs"]["status"] for event in ledger.events(run) if event["name"] == "flip.status"]
        assert told == ["TRAINING_STARTED", "INITIATED", "STOPPED"]
        finished = [fact for event in ledger.events(run) for fact in event["facts"] if fact[0] == "run_finished"]
        assert finished == [["run_finished", 1, {"status": "STOPPED"}]]
    assert hub_server.statuses(MODEL)[-1] == "STOPPED"
    assert "INITIATED" not in hub_server.statuses(MODEL)


def test_a_final_status_is_chosen_once(alone: Callable[[], FLIP], hub_server: EmbeddedHub, tmp_path: Path) -> None:
    run = str(uuid.uuid4())
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.append(Entry(run, time.time(), run={"model_id": MODEL}))
        # Somebody else finalises the run after the client has looked at it.
        original = Ledger.events

        def events(self: Ledger, *args: Any, **kwargs: Any) -> Any:
            ledger.append(Entry(run, time.time(), final_status="ERROR", final_by="sentinel"))
            return original(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ledger, "events", events)
            alone().update_status(MODEL, "RESULTS_UPLOADED")
        row = ledger.run(run)
        assert row is not None
        assert (row["final_status"], row["final_by"]) == ("ERROR", "sentinel")
        assert ledger.outbox() == []
    assert alone().flush(10)
    assert hub_server.statuses(MODEL) == []


def test_after_a_run_has_ended_a_status_is_of_no_run(
    alone: Callable[[], FLIP], hub_server: EmbeddedHub, tmp_path: Path
) -> None:
    run = str(uuid.uuid4())
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.append(Entry(run, time.time(), run={"model_id": MODEL}))
        ledger.append(Entry(run, time.time(), final_status="ERROR", final_by="job"))
        alone().update_status(MODEL, "INITIATED")
        assert alone().flush(60)
        assert [item.run_id for item in ledger.outbox()] == [None]
    assert hub_server.statuses(MODEL) == ["INITIATED"]


def test_a_ledger_that_cannot_be_opened_does_not_stop_a_status(
    alone: Callable[[], FLIP], hub_server: EmbeddedHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ledger").write_text("a file where the folder should be")
    alone().update_status(MODEL, "ERROR")
    assert alone().flush(60)
    assert hub_server.statuses(MODEL) == ["ERROR"]
    assert "FLIP_OBSERVABILITY_DIR" in caplog.text
    assert hub_server.key not in caplog.text


def test_a_ledger_that_breaks_does_not_stop_a_status(
    alone: Callable[[], FLIP], hub_server: EmbeddedHub, tmp_path: Path
) -> None:
    alone().update_status(MODEL, "INITIATED")
    assert alone().flush(60)
    own = client._own
    assert own is not None
    ledger = own[1]._ledger
    assert ledger is not None
    ledger.close()
    alone().update_status(MODEL, "ERROR")
    assert alone().flush(60)
    assert hub_server.statuses(MODEL) == ["INITIATED", "ERROR"]
    spools = list((tmp_path / "ledger").glob("spool-*.jsonl"))
    assert len(spools) == 1
    assert '"ERROR"' in spools[0].read_text()


def test_a_bad_environment_is_one_clear_error(alone: Callable[[], FLIP], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLIP_API_INTERNAL_URL", "hub.example")
    with pytest.raises(SettingsError, match="FLIP_API_INTERNAL_URL"):
        alone().update_status(MODEL, "ERROR")
    with pytest.raises(ResultsUploadError, match="Unexpected failure uploading results to S3") as caught:
        alone().upload_results_to_s3(".", MODEL)
    assert isinstance(caught.value.__cause__, SettingsError)


def test_a_forked_child_opens_an_outbox_of_its_own(alone: Callable[[], FLIP], hub_server: EmbeddedHub) -> None:
    alone().update_status(MODEL, "INITIATED")
    assert alone().flush(60)
    child = os.fork()
    if child == 0:
        try:
            alone().update_status(MODEL, "ERROR")
            os._exit(0 if alone().flush(60) else 1)
        finally:
            os._exit(2)
    _, code = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(code) == 0
    assert hub_server.statuses(MODEL) == ["INITIATED", "ERROR"]


def test_local_dev_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detach()
    monkeypatch.setattr(client, "_own", None)
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("FLIP_", "INTERNAL_", "LOCAL_DEV", "UPLOADED_")):
            monkeypatch.delenv(name)
    FLIP().update_status(MODEL, "ERROR")
    assert FLIP().flush(60)
    assert (tmp_path / "flip_observability" / "ledger.db").exists()
    own = client._own
    assert own is not None
    own[1].close()


def test_it_writes_into_the_run_of_its_process(
    hub_server: EmbeddedHub, tmp_path: Path, alone: Callable[[], FLIP]
) -> None:
    from flip_observability.recorder import RunIdentity, RunRecorder

    identity = RunIdentity(str(uuid.uuid4()), "job", MODEL)
    recorder = RunRecorder(identity, Settings.load(), tmp_path / "ledger")
    attach(recorder)
    try:
        recorder.record(FlareEvents.START_RUN)
        recorder.record(FlipEvents.TRAINING_INITIATED)
        alone().send_metrics("site-1", MODEL, "L", 1.0, 1)
        alone().update_status(MODEL, "ERROR")
        assert recorder.finish(60)
    finally:
        detach()
        recorder.close()
    assert hub_server.statuses(MODEL)[-1] == "ERROR"
    assert client._own is None
    with Ledger(tmp_path / "ledger", read_only=True) as ledger:
        assert {row.run_id for row in ledger.outbox()} == {identity.run_id}


# -- results and cleaning up -------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace" / "run"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("a log")
    return folder


@pytest.mark.parametrize("as_text", [True, False])
def test_local_results_land_beside_the_ledger(run_dir: Path, tmp_path: Path, as_text: bool) -> None:
    class WithFolder(Sink):
        directory = tmp_path / "led ger"

    attach(WithFolder())
    try:
        receipt = local().upload_results_to_s3(str(run_dir) if as_text else run_dir, MODEL.upper())
    finally:
        detach()
    path = Path(unquote(urlsplit(receipt.uri).path))
    assert path.parent == tmp_path / "led ger" / "results" / MODEL
    assert receipt.verified
    assert zipfile.ZipFile(path).namelist() == ["log.txt"]
    assert (run_dir / "log.txt").read_text() == "a log"


def test_a_folder_in_the_bucket_setting_is_used_as_it_is(run_dir: Path, tmp_path: Path, sink: Sink) -> None:
    flip = local(UPLOADED_FEDERATED_DATA_BUCKET=(tmp_path / "there").as_uri())
    assert flip.upload_results_to_s3(run_dir, MODEL).uri.startswith((tmp_path / "there").as_uri())


def test_a_sink_hears_of_the_upload(run_dir: Path, tmp_path: Path) -> None:
    class Listening(Sink):
        heard: list[tuple[Any, ...]] = []  # noqa: RUF012 - one instance

        def upload_progress(self, sent: int, total: int) -> None:
            self.heard.append(("progress", sent, total))

        def multipart(self, key: str, upload_id: str) -> None:
            self.heard.append(("multipart", key, upload_id))

    attach(Listening())
    try:
        local(UPLOADED_FEDERATED_DATA_BUCKET=(tmp_path / "there").as_uri()).upload_results_to_s3(run_dir, MODEL)
    finally:
        detach()
    kinds = [item[0] for item in Listening.heard]
    assert kinds.count("multipart") == 2
    assert "progress" in kinds
    assert Listening.heard[-1][0] == "multipart"
    assert Listening.heard[-1][2] == ""  # nothing to abort any more


@pytest.mark.parametrize("folder", ["missing", None, 7, "nul\0byte"])
def test_any_failure_of_an_upload_is_one_exception(folder: Any, tmp_path: Path, sink: Sink) -> None:
    flip = local(UPLOADED_FEDERATED_DATA_BUCKET=(tmp_path / "there").as_uri())
    with pytest.raises(ResultsUploadError, match=r"^Unexpected failure uploading results to S3") as caught:
        flip.upload_results_to_s3(folder, MODEL)
    assert caught.value.__cause__ is not None
    assert caught.value.reason in ("source", "other")


def _real() -> FLIP:
    return FLIP(settings=Settings.model_validate({"LOCAL_DEV": False, "INTERNAL_SERVICE_KEY": "k"}))


def test_cleaning_up_removes_a_folder(run_dir: Path) -> None:
    _real().cleanup(run_dir)
    assert not run_dir.exists()
    assert run_dir.parent.exists()


def test_what_needs_no_hub_needs_no_service_key(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detach()
    monkeypatch.setenv("LOCAL_DEV", "false")
    monkeypatch.setenv("INTERNAL_SERVICE_KEY", "")
    monkeypatch.setenv("UPLOADED_FEDERATED_DATA_BUCKET", (tmp_path / "bucket").as_uri())
    receipt = FLIP().upload_results_to_s3(run_dir, MODEL)
    assert receipt.size > 0
    FLIP().cleanup(run_dir)
    assert not run_dir.exists()


def test_cleaning_up_only_says_so_in_local_dev(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    local().cleanup(str(run_dir))
    assert run_dir.exists()
    assert "is not removed" in caplog.text


def test_a_folder_that_cannot_be_removed(run_dir: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    for path in (tmp_path / "missing", run_dir / "log.txt", link):
        with pytest.raises(CleanupError, match=r"^Failed to clean up path") as caught:
            _real().cleanup(path)
        assert caught.value.__cause__ is not None
    assert (run_dir / "log.txt").exists()


def test_an_outbox_can_be_closed_twice(tmp_path: Path) -> None:
    outbox = Outbox(Settings.model_validate({"LOCAL_DEV": True}), tmp_path)
    outbox.close()
    outbox.close()
