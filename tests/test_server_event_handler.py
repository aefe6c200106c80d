"""The handler on contexts of every kind: complete, poor, hostile. Whole jobs are in the tests of the demo."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.widgets.validation_json_generator import ValidationJsonGenerator as FlareJsonGenerator

from flip_observability import errors
from flip_observability.constants import FlipEvents, FlipProps, ModelStatus
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.ending import SALVAGE
from flip_observability.ledger import Ledger
from flip_observability.links import SeenLinks
from flip_observability.nvflare.components import ServerEventHandler
from flip_observability.process import current_process
from flip_observability.recorder import RunRecorder
from flip_observability.results import ResultsUploadError
from poc import wait_until

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"


class Generator:
    def __init__(self, raises: BaseException | None = None, failed: bool = False) -> None:
        self.events: list[str] = []
        self.raises = raises
        self.failed = failed

    def handle_evaluation_events(self, event_type: str, fl_ctx: FLContext) -> None:
        self.events.append(event_type)
        if self.raises:
            raise self.raises

    def all_tasks_failed(self) -> bool:
        return self.failed


class Persist:
    def __init__(self, raises: BaseException | None = None) -> None:
        self.raises = raises
        self.calls = 0
        self.model_id = MODEL

    def execute(self, fl_ctx: FLContext) -> None:
        self.calls += 1
        if self.raises:
            raise self.raises


class Client:
    """A client object of the job's own."""

    def __init__(self) -> None:
        self.statuses: list[str] = []

    def update_status(self, model_id: str, status: ModelStatus) -> None:
        assert model_id == MODEL
        self.statuses.append(status.value)


class Engine:
    """As much of NVFLARE's engine as the components ask for; it fires events as NVFLARE does, back into the handler."""

    def __init__(self, **components: Any) -> None:
        self.components = components
        self.handler: ServerEventHandler | None = None
        self.fired: list[tuple[str, Any]] = []

    def get_component(self, component_id: str) -> Any:
        return self.components.get(component_id)

    def fire_event(self, event_type: str, fl_ctx: FLContext) -> None:
        self.fired.append((event_type, fl_ctx.get_prop(FLContextKey.EVENT_DATA)))
        if self.handler:
            self.handler.handle_event(event_type, fl_ctx)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOCAL_DEV", "true")
    monkeypatch.setenv("FLIP_OBSERVABILITY_DIR", str(tmp_path / "ledger"))
    yield
    from flip_observability.client import detach

    detach()


@pytest.fixture(autouse=True)
def _no_recorder_outlives_its_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run that never ends keeps its threads, which then log and count errors in other tests."""
    made: list[RunRecorder] = []
    begin = RunRecorder.__init__

    def noted(recorder: RunRecorder, *arguments: Any, **named: Any) -> None:
        begin(recorder, *arguments, **named)
        made.append(recorder)

    monkeypatch.setattr(RunRecorder, "__init__", noted)
    yield
    for recorder in made:
        recorder.close()


def context(engine: Engine | None, props: dict[str, Any] | None = None) -> FLContext:
    manager = FLContextManager(engine=engine, identity_name="server", job_id="simulate_job")
    fl_ctx = manager.new_context()
    for key, value in (props or {}).items():
        fl_ctx.set_prop(key, value, private=True, sticky=False)
    return fl_ctx


def make(
    client: Any = None, generator: Any = None, persist: Any = None, model_id: str = MODEL
) -> tuple[ServerEventHandler, Engine]:
    handler = ServerEventHandler(model_id, flip=client)
    engine = Engine(json_generator=generator or Generator(), persist_and_cleanup=persist or Persist())
    engine.handler = handler
    return handler, engine


def run(handler: ServerEventHandler, engine: Engine, *events: str, aborted: bool = False) -> None:
    for event in events:
        fl_ctx = context(engine)
        signal = Signal()
        if aborted:
            signal.trigger("abort")
        fl_ctx.set_prop(ReservedKey.RUN_ABORT_SIGNAL, signal, private=True, sticky=False)
        handler.handle_event(event, fl_ctx)


END = (EventType.ABOUT_TO_END_RUN, EventType.END_RUN)
TRAINING = (
    EventType.START_RUN,
    FlipEvents.TRAINING_INITIATED,
    AppEventType.INITIAL_MODEL_LOADED,
    AppEventType.TRAINING_STARTED,
)


def test_a_good_run() -> None:
    client, generator, persist = Client(), Generator(), Persist()
    handler, engine = make(client, generator, persist)
    run(handler, engine, *TRAINING, "_something_else", *END)
    assert client.statuses == ["INITIATED", "PREPARED", "TRAINING_STARTED", "RESULTS_UPLOADED"]
    assert handler.final_status is ModelStatus.RESULTS_UPLOADED
    assert generator.events == [*map(str, TRAINING), "_something_else", *END]
    assert persist.calls == 1


UPLOAD_ERROR = ResultsUploadError("access_denied", "AccessDenied")


@pytest.mark.parametrize(
    ("raised", "fatal", "aborted", "all_failed", "final"),
    [
        (None, False, False, False, "RESULTS_UPLOADED"),
        (None, True, True, False, "ERROR"),
        (None, False, True, False, "STOPPED"),
        (UPLOAD_ERROR, False, True, False, "STOPPED"),
        (None, False, False, True, "ERROR"),
        (UPLOAD_ERROR, False, False, False, "ERROR"),
        (RuntimeError("anything"), False, False, False, "ERROR"),
        (SystemExit(3), False, False, False, "ERROR"),
        (KeyboardInterrupt(), False, False, False, "ERROR"),
    ],
)
def test_rule_3(
    raised: BaseException | None, fatal: bool, aborted: bool, all_failed: bool, final: str, tmp_path: Path
) -> None:
    client = Client()
    handler, engine = make(client, Generator(failed=all_failed), Persist(raised))
    run(handler, engine, *TRAINING)
    if fatal:
        run(handler, engine, EventType.FATAL_SYSTEM_ERROR)
    run(handler, engine, *END, aborted=aborted)
    assert client.statuses[-1] == final
    assert sum(status in {"ERROR", "STOPPED", "RESULTS_UPLOADED"} for status in client.statuses) == 1
    with Ledger(tmp_path / "ledger") as ledger:
        (row,) = ledger.runs()
        followed_up = [run["run_id"] for run in ledger.runs_with_intent(SALVAGE)]
    assert followed_up == ([row["run_id"]] if raised else []), "what could not be uploaded is left to an observer"


UNREACHABLE = ResultsUploadError("connection", "EndpointConnectionError", passing=True)


@pytest.mark.parametrize(
    ("raised", "observed", "final", "intent"),
    [
        (UNREACHABLE, True, None, "UPLOAD_PENDING"),
        (UNREACHABLE, False, "ERROR", SALVAGE),
        (UPLOAD_ERROR, True, "ERROR", SALVAGE),
    ],
    ids=["goes-on", "nobody-is-there", "lasting"],
)
def test_an_upload_that_may_yet_work_is_left_to_an_observer_that_lives(
    raised: ResultsUploadError, observed: bool, final: str | None, intent: str, tmp_path: Path
) -> None:
    handler, engine = make(persist=Persist(raised))
    with Ledger(tmp_path / "ledger") as ledger:
        if observed:
            ledger.claim_observer(f"{current_process().token()}|test", time.time())
        run(handler, engine, *TRAINING, *END)
        (row,) = ledger.runs()
        assert (row["final_status"], row["intent"]) == (final, intent)
        assert handler.final_status == final
        failures = [fact for event in ledger.events() for fact in event["facts"] if fact[0] == "upload_failure"]
        assert len(failures) == (final is not None)
        assert any(event["name"] == EventType.END_RUN for event in ledger.events())


@pytest.mark.parametrize("aborted", ["before", "meanwhile", None])
def test_how_long_an_upload_may_stand_still(aborted: str | None) -> None:
    signal, told = Signal(), []

    class Asks(Persist):
        def execute(self, fl_ctx: FLContext) -> None:
            if aborted == "meanwhile":
                signal.trigger("abort")
            told.append(handler._recorder.stalled_after() if handler._recorder else None)

    handler, engine = make(persist=Asks())
    if aborted == "before":
        signal.trigger("abort")
    for event in (*TRAINING, *END):
        fl_ctx = context(engine)
        fl_ctx.set_prop(ReservedKey.RUN_ABORT_SIGNAL, signal, private=True, sticky=False)
        handler.handle_event(event, fl_ctx)
    assert told == [4.0 if aborted else 10.0]


def test_links_are_looked_for_when_a_model_is_persisted(tmp_path: Path) -> None:
    handler, engine = make()
    run(handler, engine, *TRAINING)
    recorder = handler._recorder
    assert recorder is not None
    run_dir = tmp_path / "job"
    run_dir.mkdir()
    (run_dir / "notes").symlink_to("/etc/hostname")
    recorder.identity = dataclasses.replace(recorder.identity, run_dir=str(run_dir))
    with Ledger(tmp_path / "ledger") as ledger:
        run_id = recorder.identity.run_id
        assert ledger.links(run_id) is None
        run(handler, engine, AppEventType.AFTER_LEARNABLE_PERSIST)
        wait_until(lambda: SeenLinks.from_text(ledger.links(run_id)).hold("notes"), 10, "the look")
        assert SeenLinks.from_text(ledger.links(run_id)).tell_all


def test_upload_failed_is_spelled_by_the_contract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLIP_HUB_CONTRACT", "2026-10")
    client = Client()
    handler, engine = make(client, persist=Persist(UPLOAD_ERROR))
    run(handler, engine, EventType.START_RUN, *END)
    assert client.statuses == ["RESULTS_UPLOAD_FAILED"]
    with Ledger(tmp_path / "ledger") as ledger:
        facts = [fact for row in ledger.events() for fact in row["facts"]]
    assert ["upload_failure", 1, {"reason": "access_denied"}] in facts


@pytest.mark.parametrize("model_id", ["nonsense", "../x", "x" * 10_000, "3f0c1a52-6f6f-4a39-8d0a"])
def test_a_model_id_that_is_no_uuid(model_id: str) -> None:
    class Accepts(Client):
        def update_status(self, model_id: str, status: ModelStatus) -> None:
            self.statuses.append(status.value)

    client = Accepts()
    with pytest.raises(ValueError, match="is not a valid UUID") as caught:
        ServerEventHandler(model_id, flip=client)
    assert client.statuses == ["ERROR"]
    assert len(str(caught.value)) < 200


def test_any_spelling_of_a_uuid_is_sent_in_its_canonical_form() -> None:
    assert ServerEventHandler("{" + MODEL.upper() + "}").model_id == MODEL
    assert ServerEventHandler(MODEL.replace("-", "")).model_id == MODEL


def test_no_model_id_in_local_dev_is_the_run_id() -> None:
    persist = Persist()
    persist.model_id = ""
    handler, engine = make(persist=persist, model_id="")
    run(handler, engine, EventType.START_RUN, *END)
    assert persist.model_id == handler.model_id
    assert handler.model_id == str(uuid.UUID(handler.model_id))
    assert [event for event, _ in engine.fired if event == EventType.FATAL_SYSTEM_ERROR] == []


def test_no_model_id_with_a_hub_fails_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_DEV", "false")
    monkeypatch.setenv("INTERNAL_SERVICE_KEY", "secret-key")
    handler, engine = make(model_id="")
    run(handler, engine, EventType.START_RUN)
    panics = [data for event, data in engine.fired if event == EventType.FATAL_SYSTEM_ERROR]
    assert len(panics) == 1
    assert panics[0].startswith("No model id")
    assert handler.fatal_error


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("FLIP_API_INTERNAL_URL", "hub.example/api", "FLIP_API_INTERNAL_URL: needs a scheme"),
        ("INTERNAL_SERVICE_KEY", "", "INTERNAL_SERVICE_KEY: is empty"),
        ("UPLOADED_FEDERATED_DATA_BUCKET", "http://bucket", "UPLOADED_FEDERATED_DATA_BUCKET"),
        ("FLIP_HUB_CONTRACT", "1999", "FLIP_HUB_CONTRACT"),
        ("FLIP_RETENTION_DAYS", "-1", "FLIP_RETENTION_DAYS"),
    ],
)
def test_a_bad_setting_is_one_clear_panic_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str, told: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCAL_DEV", "false")
    monkeypatch.setenv("INTERNAL_SERVICE_KEY", "secret-key")
    monkeypatch.setenv(name, value)
    handler, engine = make()
    run(handler, engine, *TRAINING, *END)
    panics = [data for event, data in engine.fired if event == EventType.FATAL_SYSTEM_ERROR]
    assert len(panics) == 1
    assert told in panics[0]
    assert "secret-key" not in panics[0] + caplog.text
    with Ledger(tmp_path / "ledger") as ledger:
        # What cannot be sent from here is kept for a process with better settings.
        assert [row.payload for row in ledger.outbox(states=["pending"], kind="status")] == [{"status": "ERROR"}]


@pytest.mark.parametrize(
    ("components", "told"),
    [
        ({"persist_and_cleanup": Persist()}, "must have 'handle_evaluation_events' method, found NoneType"),
        ({"json_generator": object(), "persist_and_cleanup": Persist()}, "must have 'handle_evaluation_events' method"),
        ({"json_generator": Generator()}, "must be PersistToS3AndCleanup, found NoneType"),
        (
            {"json_generator": Generator(), "persist_and_cleanup": Generator()},
            "must be PersistToS3AndCleanup, found Gen",
        ),
    ],
)
def test_a_missing_or_wrong_component_is_one_panic_without_recursion(components: dict[str, Any], told: str) -> None:
    client = Client()
    handler = ServerEventHandler(MODEL, flip=client)
    engine = Engine(**components)
    engine.handler = handler
    run(handler, engine, *TRAINING, *END)
    panics = [data for event, data in engine.fired if event == EventType.FATAL_SYSTEM_ERROR]
    assert len(panics) == 1
    assert told in panics[0]
    assert client.statuses[-1] == "ERROR"


def test_nvflares_own_generator_drives_itself() -> None:
    client = Client()
    handler, engine = make(client, FlareJsonGenerator())
    run(handler, engine, *TRAINING, *END)
    assert client.statuses[-1] == "RESULTS_UPLOADED"
    assert engine.fired == []


@pytest.mark.parametrize("error", [ValueError("patient 4711"), SystemExit(1), KeyboardInterrupt()])
def test_a_generator_that_raises_does_not_stop_the_lifecycle(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client()
    handler, engine = make(client, Generator(raises=error))
    run(handler, engine, *TRAINING, *END)
    assert client.statuses == ["INITIATED", "PREPARED", "TRAINING_STARTED", "RESULTS_UPLOADED"]
    assert "4711" not in caplog.text


def test_poor_contexts_are_no_problem(tmp_path: Path) -> None:
    client = Client()
    handler = ServerEventHandler(MODEL, flip=client)
    for event in (*TRAINING, AppEventType.ROUND_STARTED, EventType.AFTER_TASK_DATA_FILTER, FlipEvents.SEND_RESULT):
        handler.handle_event(event, FLContext())
    handler.handle_event(EventType.ABOUT_TO_END_RUN, FLContext())
    handler.handle_event(EventType.END_RUN, FLContext())
    # Without an engine there is no persist component: an ERROR, but told.
    assert client.statuses[-1] == "ERROR"
    with Ledger(tmp_path / "ledger") as ledger:
        assert ledger.runs()[0]["round"] == 1


def test_events_before_start_twice_and_from_eight_threads(tmp_path: Path) -> None:
    client, persist = Client(), Persist()
    handler, engine = make(client, persist=persist)
    events = [AppEventType.ROUND_STARTED, *TRAINING, *TRAINING, *END, *END]
    threads = [threading.Thread(target=run, args=(handler, engine, *events)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    order = ["INITIATED", "PREPARED", "TRAINING_STARTED", "RESULTS_UPLOADED", "ERROR"]
    ranks = [min(order.index(status), 3) for status in client.statuses]
    assert ranks == sorted(set(ranks))
    assert persist.calls == 1
    with Ledger(tmp_path / "ledger") as ledger:
        facts = [fact[0] for row in ledger.events() for fact in row["facts"]]
        assert [run["final_status"] for run in ledger.runs()] == [client.statuses[-1]]
    assert facts.count("run_started") == facts.count("run_finished") == 1


def test_an_end_without_an_engine_is_no_upload() -> None:
    client, persist = Client(), Persist()
    handler, engine = make(client, persist=persist)
    run(handler, engine, EventType.START_RUN, EventType.ABOUT_TO_END_RUN)
    handler.handle_event(EventType.END_RUN, FLContext())
    assert (client.statuses, persist.calls) == (["ERROR"], 0)


def test_end_run_without_about_to_end_run_is_an_error_and_not_the_end() -> None:
    client, persist = Client(), Persist()
    handler, engine = make(client, persist=persist)
    run(handler, engine, EventType.START_RUN, EventType.END_RUN)
    assert (client.statuses, persist.calls) == ([], 0)
    run(handler, engine, *END)
    assert (client.statuses, persist.calls) == (["ERROR"], 1)


@pytest.mark.system
def test_a_hanging_client_object_holds_nobody_up() -> None:
    stop = threading.Event()

    class Hangs(Client):
        def update_status(self, model_id: str, status: ModelStatus) -> None:
            stop.wait(60)

    handler, engine = make(Hangs())
    thread = threading.Thread(target=run, args=(handler, engine, *TRAINING, *END))
    thread.start()
    thread.join(30)
    stop.set()
    assert not thread.is_alive()
    assert handler.final_status is ModelStatus.RESULTS_UPLOADED


def test_a_client_object_that_raises_is_logged_by_type_only(caplog: pytest.LogCaptureFixture) -> None:
    class Raises(Client):
        def update_status(self, model_id: str, status: ModelStatus) -> None:
            raise RuntimeError("patient 4711")

    handler, engine = make(Raises())
    run(handler, engine, *TRAINING, *END)
    assert handler.final_status is ModelStatus.RESULTS_UPLOADED
    assert "4711" not in caplog.text


def test_lines_that_users_grep_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    handler, engine = make(Client())
    run(handler, engine, *TRAINING, FlipEvents.TASK_INITIATED, AppEventType.TRAINING_FINISHED)
    run(handler, engine, FlipEvents.RESULTS_UPLOAD_COMPLETED)
    run(handler, engine, EventType.FATAL_SYSTEM_ERROR, FlipEvents.ABORTED, *END)
    lines = {record.getMessage().rpartition(": ")[2]: record.levelname for record in caplog.records}
    for name in (
        *("Start run", "Training initiated", "Initial model loaded", "Training started", "Training finished"),
        *("Task initiated", "Results upload completed", "Aborted", "End run"),
    ):
        assert lines[f"{name} event received"] == "INFO"
    assert lines["Fatal system error event received"] == "ERROR"


def test_client_metrics_are_relayed_with_round_and_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedHub() as hub:
        monkeypatch.setenv("LOCAL_DEV", "false")
        monkeypatch.setenv("FLIP_API_INTERNAL_URL", hub.url)
        monkeypatch.setenv("INTERNAL_SERVICE_KEY", hub.key)
        handler, engine = make()
        run(handler, engine, EventType.START_RUN)
        handler.handle_event(AppEventType.ROUND_STARTED, context(engine, {AppConstants.CURRENT_ROUND: 1}))
        data = DXO(DataKind.METRICS, data={"label": "LOSS_FUNCTION", "value": 0.25}).to_shareable()
        data.set_peer_props({ReservedKey.IDENTITY_NAME: "site-2"})
        handler.handle_event(FlipEvents.SEND_RESULT, context(engine, {FLContextKey.EVENT_DATA: data}))
        nonsense = DXO(DataKind.METRICS, data={"label": "LOSS_FUNCTION", "value": float("nan")}).to_shareable()
        handler.handle_event(FlipEvents.SEND_RESULT, context(engine, {FLContextKey.EVENT_DATA: nonsense}))
        handler.handle_event(FlipEvents.SEND_RESULT, context(engine, {FLContextKey.EVENT_DATA: "no shareable"}))
        run(handler, engine, *END)
        assert hub.wait(lambda h: bool(h.payloads(MODEL, "metrics")))
        assert [dict(p) for p in hub.payloads(MODEL, "metrics")] == [
            {"trust": "Trust_2", "globalRound": 2, "label": "LOSS_FUNCTION", "result": 0.25}
        ]
        assert hub.statuses(MODEL)[-1] == "RESULTS_UPLOADED"


def newer_hub(monkeypatch: pytest.MonkeyPatch, hub: EmbeddedHub) -> None:
    variables = {"LOCAL_DEV": "false", "FLIP_API_INTERNAL_URL": hub.url, "INTERNAL_SERVICE_KEY": hub.key}
    for name, value in (variables | {"FLIP_HUB_CONTRACT": "2026-10"}).items():
        monkeypatch.setenv(name, value)


class FlipsController:
    """Stands for one of FLIP's controllers: the module says whose it is."""


FlipsController.__module__ = "flip.nvflare.controllers.scatter_and_gather"


def job_of(*controllers: Any, running: str) -> dict[str, Any]:
    """Context props of a job whose workflows are numbered ``w0``, ``w1``, …"""
    workflows = [SimpleNamespace(id=f"w{number}", controller=made) for number, made in enumerate(controllers)]
    runner = SimpleNamespace(config=SimpleNamespace(workflows=workflows))
    return {FLContextKey.RUNNER: runner, FLContextKey.WORKFLOW: running}


def measured(**data: Any) -> dict[str, Any]:
    shareable = DXO(DataKind.METRICS, data={"label": "LOSS", "value": 0.25, **data}).to_shareable()
    shareable.set_peer_props({ReservedKey.IDENTITY_NAME: "site-2"})
    return {FLContextKey.EVENT_DATA: shareable}


@pytest.mark.parametrize("flips", [True, False])
def test_with_flips_controller_rounds_are_told_and_results_and_metrics_are_not_told_twice(
    monkeypatch: pytest.MonkeyPatch, flips: bool
) -> None:
    class Subclass(FlipsController):
        pass

    with EmbeddedHub("2026-10") as hub:
        newer_hub(monkeypatch, hub)
        handler, engine = make()
        # A later workflow of NVFLARE's own runs: FLIP's controller goes on sending metrics meanwhile.
        job = job_of(Subclass() if flips else object(), object(), running="w1")
        run(handler, engine, EventType.START_RUN)
        started = {AppConstants.CURRENT_ROUND: 0, AppConstants.NUM_ROUNDS: 2}
        handler.handle_event(AppEventType.ROUND_STARTED, context(engine, job | started))
        handler.handle_event(AppEventType.AFTER_CONTRIBUTION_ACCEPT, context(engine, job))
        handler.handle_event(FlipEvents.SEND_RESULT, context(engine, job | measured()))
        counts = {FlipProps.ROUND_RETURNED.value: 2, FlipProps.ROUND_EXPECTED.value: 3} if flips else {}
        handler.handle_event(AppEventType.ROUND_DONE, context(engine, job | counts))
        run(handler, engine, *END)
        expected = {"ROUND_STARTED", "ROUND_AGGREGATED"} | (set() if flips else {"CLIENT_RESULT_RECEIVED"})
        assert hub.wait(lambda h: len(h.payloads(MODEL, "logs")) == len(expected))
        sent = {p["event_type"]: dict(p["details"] or {}) for p in hub.payloads(MODEL, "logs")}
        assert sent.keys() == expected
        assert sent["ROUND_STARTED"] == {"total_rounds": 2}
        assert sent["ROUND_AGGREGATED"] == ({"returned": 2, "expected": 3} if flips else {"returned": 1, "expected": 0})
        assert hub.wait(lambda h: len(h.payloads(MODEL, "metrics")) == (0 if flips else 1))


def test_a_metric_lies_where_its_client_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedHub("2026-10") as hub:
        newer_hub(monkeypatch, hub)
        handler, engine = make()
        run(handler, engine, EventType.START_RUN)
        handler.handle_event(AppEventType.ROUND_STARTED, context(engine, {AppConstants.CURRENT_ROUND: 1}))
        for data in (
            {"label": "A", "x_value": 0, "x_label": "epoch"},
            {"label": "B", "round": 7},
            {"label": "C", "x_value": float("nan")},
        ):
            handler.handle_event(FlipEvents.SEND_RESULT, context(engine, measured(**data)))
        run(handler, engine, *END)
        assert hub.wait(lambda h: len(h.payloads(MODEL, "metrics")) == 3)
        points = {p["label"]: (p["global_round"], p["x_value"], p["x_label"]) for p in hub.payloads(MODEL, "metrics")}
        assert points == {"A": (2, 0.0, "epoch"), "B": (2, 7.0, "Global Rounds"), "C": (2, 2.0, "Global Rounds")}


def test_an_evaluations_metrics_reach_the_hub_at_round_0_before_the_final_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Evaluation(Generator):
        def hub_metrics(self) -> dict[str, dict[str, float]]:
            return {"site-1": {"ACC": 0.5}, "site-2": {"ACC": 0.25}, "site-3": {f"L{n}": 1.0 for n in range(40)}}

    with EmbeddedHub("2026-10") as hub:
        monkeypatch.setenv("LOCAL_DEV", "false")
        monkeypatch.setenv("FLIP_API_INTERNAL_URL", hub.url)
        monkeypatch.setenv("INTERNAL_SERVICE_KEY", hub.key)
        monkeypatch.setenv("FLIP_HUB_CONTRACT", "2026-10")
        handler, engine = make(generator=Evaluation())
        run(handler, engine, EventType.START_RUN, *END)
        told = [record.kind for record in hub.records if record.accepted]
        assert told == ["metrics"] * 42 + ["status"]  # a hub may take the server away after a final status
        sent = {
            (p["fl_client_name"], p["label"], p["result"], p["global_round"]) for p in hub.payloads(MODEL, "metrics")
        }
        assert {("site-1", "ACC", 0.5, 0), ("site-2", "ACC", 0.25, 0)} < sent
        assert hub.statuses(MODEL) == ["RESULTS_UPLOADED"]


def test_a_generator_that_cannot_give_its_metrics_does_not_keep_the_status_back() -> None:
    class Evaluation(Generator):
        def hub_metrics(self) -> dict[str, dict[str, float]]:
            raise SystemExit(1)

    client = Client()
    handler, engine = make(client, Evaluation())
    run(handler, engine, EventType.START_RUN, *END)
    assert client.statuses == ["RESULTS_UPLOADED"]


def test_a_model_that_lost_the_run_is_told_no_status_and_the_run_says_so(tmp_path: Path) -> None:
    from flip_observability import FLIP

    other = "99999999-0000-4000-8000-000000000000"
    meta = {FLContextKey.JOB_META: {"custom_props": {"model_id": other}}}
    handler, engine = make()
    errors.drain()
    handler.handle_event(EventType.START_RUN, context(engine, meta))
    assert errors.drain()["model_id"] == 1
    assert FLIP().update_status(other, ModelStatus.ERROR) is False
    run(handler, engine, *END)
    with Ledger(tmp_path / "ledger") as ledger:
        (row,) = ledger.runs()
        assert (row["model_id"], list(row["problems"])) == (MODEL, ["model_id"])
        assert {item.model_id for item in ledger.outbox(kind="status")} == {MODEL}


def test_a_status_that_the_jobs_code_gives_to_the_client_is_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from flip_observability import FLIP

    with EmbeddedHub() as hub:
        monkeypatch.setenv("LOCAL_DEV", "false")
        monkeypatch.setenv("FLIP_API_INTERNAL_URL", hub.url)
        monkeypatch.setenv("INTERNAL_SERVICE_KEY", hub.key)
        handler, engine = make()
        run(handler, engine, *TRAINING)
        FLIP().update_status(MODEL, ModelStatus.INITIATED)  # backwards: recorded, not sent
        FLIP().update_status(MODEL, ModelStatus.ERROR)
        run(handler, engine, *END)
        statuses = hub.statuses(MODEL)
        assert statuses[-1] == "ERROR"
        assert statuses.count("INITIATED") <= 1
        assert "RESULTS_UPLOADED" not in statuses
        assert handler.final_status is ModelStatus.ERROR


def test_a_job_export_does_not_write_the_client() -> None:
    assert not {"flip", "_flip"} & vars(ServerEventHandler(MODEL, flip=Client())).keys()


@pytest.mark.parametrize("given", [1, "client", {"path": "x"}, object()], ids=["number", "text", "object", "other"])
def test_what_is_no_client_does_not_take_the_place_of_ours(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedHub() as hub:
        monkeypatch.setenv("LOCAL_DEV", "false")
        monkeypatch.setenv("FLIP_API_INTERNAL_URL", hub.url)
        monkeypatch.setenv("INTERNAL_SERVICE_KEY", hub.key)
        handler, engine = make(given)
        run(handler, engine, EventType.START_RUN, *END)
        assert hub.statuses(MODEL) == ["RESULTS_UPLOADED"]
