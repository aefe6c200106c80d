"""The event handler of a run: every lifecycle event becomes history, a status for the hub, and in the end a result."""

from __future__ import annotations

import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.widgets.validation_json_generator import ValidationJsonGenerator as FlareJsonGenerator

from flip_observability import _contract
from flip_observability.client import FLIP, attach
from flip_observability.constants import FlareEvents, FlipEvents, ModelStatus, OwnEvents
from flip_observability.ending import SALVAGE
from flip_observability.errors import report
from flip_observability.hub import Reply, Transport
from flip_observability.ledger import OutboxRow
from flip_observability.lifecycle import TABLE, Ending, UploadOutcome, decide_ending
from flip_observability.nvflare import context
from flip_observability.nvflare.flip_client import UsesFlip
from flip_observability.nvflare.model_id import PROBLEM, find_model
from flip_observability.recorder import RunIdentity, RunRecorder, new_run_id
from flip_observability.settings import LEDGER_FOLDER, Settings, SettingsError

FOREIGN_CLIENT_SECONDS = 1.0
"""How long an event waits for a client object that the job brought itself."""


class ServerEventHandler(UsesFlip, FLComponent):
    """Drives FLIP's statuses and the persistence of results from NVFLARE's events.

    An ``FLComponent`` of the job's ``config_fed_server.json``, listed last. It never raises into the run and never
    waits for the hub on a thread of the run, but for the upload and the delivery of the final status in END_RUN.

    Args:
        model_id: the model's UUID; when empty it is found in the app's ``custom/config.json``, the job's ``meta.json``
            or the job's name.
        validation_json_generator_id: component that writes the validation's or evaluation's JSON.
        persist_and_cleanup_id: component whose ``execute(fl_ctx)`` uploads the results.
        flip: client object with ``update_status(model_id, status)``; built from the environment when None.

    Raises:
        ValueError: for a ``model_id`` that is given and is no UUID.
    """

    def __init__(
        self,
        model_id: str = "",
        validation_json_generator_id: str = "json_generator",
        persist_and_cleanup_id: str = "persist_and_cleanup",
        flip: Any = None,
    ) -> None:
        super().__init__()
        self.flip = flip
        self.model_id = self._accept_model_id(model_id)
        self.validation_json_generator_id = validation_json_generator_id
        self.validation_json_generator: Any = None
        self.persist_and_cleanup_id = persist_and_cleanup_id
        self.persist_and_cleanup: Any = None
        self.fatal_error = False
        self.final_status: ModelStatus | None = None
        self._recorder: RunRecorder | None = None
        self._foreign: _ForeignClient | None = None
        self._looked_up = False
        self._drives_generator = False
        self._ending = False
        self._panicked: set[str] = set()
        self._lock = threading.RLock()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Take one event of NVFLARE's; most are none of ours and cost a look-up."""
        try:
            if not self._looked_up:
                self._look_up(fl_ctx)
            if self._drives_generator:
                self._drive_generator(event_type, fl_ctx)
            if event_type in TABLE:
                self._take(event_type, fl_ctx)
        except Exception as error:  # noqa: BLE001 - promise: nothing of ours raises into the run
            report("handler", error, f"cannot handle {event_type}; the run goes on")

    # -- beginnings --------------------------------------------------------------------------------------------------

    def _look_up(self, fl_ctx: FLContext) -> None:
        """Find the components that this one drives; once, when there is an engine to ask."""
        if self._looked_up:
            return
        engine = fl_ctx.get_engine()
        if engine is None:
            return
        with self._lock:
            first, self._looked_up = not self._looked_up, True  # before any panic: it comes back here as an event
            if not first:
                return
            generator = self.validation_json_generator or engine.get_component(self.validation_json_generator_id)
            persist = self.persist_and_cleanup or engine.get_component(self.persist_and_cleanup_id)
            self.validation_json_generator, self.persist_and_cleanup = generator, persist
        self._drives_generator = callable(getattr(generator, "handle_evaluation_events", None))
        if not self._drives_generator and not isinstance(generator, FlareJsonGenerator):
            found = type(generator).__name__
            name = self.validation_json_generator_id
            self._panic(fl_ctx, f"Component {name!r} must have 'handle_evaluation_events' method, found {found}")
        if not callable(getattr(persist, "execute", None)):
            found, name = type(persist).__name__, self.persist_and_cleanup_id
            self.persist_and_cleanup = None
            self._panic(fl_ctx, f"Component {name!r} must be PersistToS3AndCleanup, found {found}")

    def _panic(self, fl_ctx: FLContext, reason: str) -> None:
        with self._lock:
            if reason in self._panicked:
                return
            self._panicked.add(reason)
        self.fatal_error = True
        self.system_panic(reason, fl_ctx)

    def _drive_generator(self, event_type: str, fl_ctx: FLContext) -> None:
        try:
            self.validation_json_generator.handle_evaluation_events(event_type, fl_ctx)
        except BaseException as error:  # noqa: BLE001 - SystemExit in a researcher's generator must not end the server
            report("json_generator", error, f"the generator failed at {event_type}; the lifecycle goes on")

    def _recorder_for(self, fl_ctx: FLContext) -> RunRecorder:
        with self._lock:
            if self._recorder is not None:
                return self._recorder
            problem: str | None = None
            transport: Transport | None = None
            try:
                settings = Settings.load()
            except SettingsError as error:
                # What cannot be sent from here stays in the ledger, for a process with better settings.
                problem, settings, transport = str(error), _settings_in_need(), _NoHub()
            self.log_info(fl_ctx, _contract.in_words(settings.hub_contract), fire_event=False)
            job_id = context.job_id_of(fl_ctx)
            run_id = new_run_id(job_id)
            found = find_model(fl_ctx, self.model_id)
            found.tell(job_id)
            model_id = found.model_id
            if model_id is None and settings.local_dev and problem is None:
                model_id = run_id
            self.model_id = model_id or self.model_id
            foreign = self._hub_client is not None and not isinstance(self._hub_client, FLIP)
            recorder = RunRecorder(
                RunIdentity(
                    run_id, job_id, model_id, settings.net_id, context.run_directory(fl_ctx), frozenset(found.lost)
                ),
                settings,
                _ledger_directory(settings, fl_ctx),
                transport=transport,
                tell_hub=not foreign,
            )
            self._recorder = recorder
        if found.lost:
            recorder.note(PROBLEM)
        attach(recorder)
        if foreign:
            self._foreign = _ForeignClient()
        if problem is not None:
            self._panic(fl_ctx, problem)
        elif model_id is None:
            self._panic(
                fl_ctx,
                "No model id: give the component's model_id, FLIP_MODEL_ID in custom/config.json, "
                "custom_props.model_id in meta.json, or a UUID as the job's name",
            )
        return recorder

    # -- events ------------------------------------------------------------------------------------------------------

    def _take(self, event_type: str, fl_ctx: FLContext) -> None:
        recorder = self._recorder or self._recorder_for(fl_ctx)
        row = TABLE[event_type]
        if row.log is not None:
            say = self.log_error if event_type == FlareEvents.FATAL_SYSTEM_ERROR else self.log_info
            say(fl_ctx, row.log, fire_event=False)
        if event_type == FlareEvents.END_RUN and not recorder.state.is_premature_end():
            self._end_run(recorder, fl_ctx)
            return
        relay = recorder.contract.takes_events and context.is_ours_to_relay(event_type, fl_ctx)
        attrs = context.event_attributes(event_type, fl_ctx, relay=relay)
        effects = recorder.record(event_type, attrs)
        self.fatal_error = self.fatal_error or recorder.state.fatal
        if effects.status is not None:
            self._tell_foreign(effects.status)
        after = _AFTER.get(event_type)
        if after is not None:
            after(self, recorder, attrs, fl_ctx)

    def _keep_receipt(self, recorder: RunRecorder, attrs: dict[str, Any], fl_ctx: FLContext) -> None:
        if "uri" in attrs:
            recorder.set_columns(**{f"results_{key}": attrs.get(key) for key in context.RESULT_PROPS})

    def _look_for_links(self, recorder: RunRecorder, attrs: dict[str, Any], fl_ctx: FLContext) -> None:
        recorder.look_for_links()

    def _relay_metric(self, recorder: RunRecorder, attrs: dict[str, Any], fl_ctx: FLContext) -> None:
        metric = context.metric_of(fl_ctx)
        model_id = recorder.identity.model_id
        send = getattr(self.flip, "send_metrics", None)
        if metric is None or model_id is None or not callable(send) or context.has_flips_workflow(fl_ctx):
            return
        number, x_value, said = recorder.state.round or 0, metric["x_value"], metric["round"]
        if recorder.contract.takes_events:
            x_value = said if x_value is None else x_value
        elif isinstance(said, int):
            number = said  # where a hub knows no x axis, the round that a client names is where its point lies
        axis = {"x_value": x_value, "x_label": metric["x_label"] or None}
        where = {key: value for key, value in axis.items() if value is not None}
        send(metric["client"], model_id, metric["label"], metric["value"], number, **where)

    def _tell_foreign(self, status: ModelStatus, seconds: float = FOREIGN_CLIENT_SECONDS) -> None:
        if self._foreign is not None:
            self._foreign.update_status(self._hub_client, self.model_id, status, seconds)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _end_run(self, recorder: RunRecorder, fl_ctx: FLContext) -> None:
        with self._lock:
            if self._ending:
                return
            self._ending = True
        failed = self._all_tasks_failed()
        recorder.set_columns(intent=self._decide(recorder, failed, UploadOutcome.PENDING).value)
        recorder.is_aborted = lambda: context.is_aborted(fl_ctx)
        outcome = self._persist(recorder, fl_ctx)
        deadline = time.monotonic() + recorder.settings.end_run_seconds
        if self._send_evaluation(recorder):  # after the upload, which must not wait
            # A hub may take the server away once it has the final status, which overtakes what waits.
            recorder.catch_up(recorder.settings.end_run_seconds / 2)
        status = self._status(recorder, self._decide(recorder, failed, outcome))
        effects = recorder.record(FlareEvents.END_RUN, {} if status is None else {"status": status.value})
        self.final_status = recorder.state.final_status
        if outcome is not UploadOutcome.UPLOADED and status is not None:
            recorder.set_columns(intent=SALVAGE)  # the bucket may heal: an observer brings the results later
        seconds = max(0.0, deadline - time.monotonic())
        if effects.status is not None:
            self._tell_foreign(effects.status, seconds)
        if recorder.finish(seconds):
            recorder.close()
        else:
            self.log_warning(
                fl_ctx, "The hub has not accepted the final status yet; it is kept and sent again", fire_event=False
            )

    def _status(self, recorder: RunRecorder, ending: Ending) -> ModelStatus | None:
        """The final status of an ending; None when it is left to the observer."""
        # Whether a person aborted it or a client died, only the server's parent process knows.
        if ending is Ending.ABORT_UNRESOLVED and self._foreign is None and recorder.has_judge():
            return None
        return {
            Ending.ERROR: ModelStatus.ERROR,
            Ending.ABORT_UNRESOLVED: ModelStatus.STOPPED,
            Ending.UPLOAD_FAILED: recorder.contract.upload_failed,
            Ending.UPLOAD_PENDING: None,
            Ending.RESULTS_UPLOADED: ModelStatus.RESULTS_UPLOADED,
        }[ending]

    def _decide(self, recorder: RunRecorder, all_tasks_failed: bool, outcome: UploadOutcome) -> Ending:
        return decide_ending(
            fatal=self.fatal_error or recorder.state.fatal,
            aborted=recorder.state.aborted,
            all_tasks_failed=all_tasks_failed,
            outcome=outcome,
        )

    def _all_tasks_failed(self) -> bool:
        ask = getattr(self.validation_json_generator, "all_tasks_failed", None)
        if not callable(ask):
            return False
        try:
            return ask() is True
        except BaseException as error:  # noqa: BLE001 - a generator of the job's own
            report("json_generator", error, "the generator cannot say whether all tasks failed; taken as no")
            return False

    def _send_evaluation(self, recorder: RunRecorder) -> bool:
        """Tell the hub what an evaluation measured: one point per label, at round 0. Returns whether there was any."""
        collect = getattr(self.validation_json_generator, "hub_metrics", None)
        model_id = recorder.identity.model_id
        sent = False
        if not callable(collect) or model_id is None:
            return sent
        try:
            for client, labels in collect().items():
                for label, value in labels.items():
                    self.flip.send_metrics(client, model_id, label, value, 0)
                    sent = True
        except BaseException as error:  # noqa: BLE001 - a generator or client of the job's own; the status must follow
            report("json_generator", error, "the evaluation's metrics were not all sent to the hub")
        return sent

    def _persist(self, recorder: RunRecorder, fl_ctx: FLContext) -> UploadOutcome:
        if self.persist_and_cleanup is None or fl_ctx.get_engine() is None:
            return UploadOutcome.FAILED
        if getattr(self.persist_and_cleanup, "model_id", None) == "":
            self.persist_and_cleanup.model_id = self.model_id  # with LOCAL_DEV it may be one that only we know
        try:
            self.persist_and_cleanup.execute(fl_ctx)
        except BaseException as error:  # noqa: BLE001 - the final status must be sent whatever it was
            kinds = {cls.__name__ for cls in type(error).__mro__}
            report("persist", error, "the results were not persisted; they stay in the run's directory")
            if "ResultsUploadError" not in kinds:
                return UploadOutcome.FAILED
            if getattr(error, "passing", None) is True and self._foreign is None and recorder.has_observer():
                self.log_warning(fl_ctx, "The bucket cannot be reached: the observer goes on", fire_event=False)
                return UploadOutcome.PENDING
            reason = str(getattr(error, "reason", "other"))
            attrs = {"reason": reason, "exception_type": type(error).__name__}
            if recorder.settings.capture_exception_messages:
                attrs["exception_message"] = recorder.trace.scrubbed(str(error))
            recorder.record(OwnEvents.UPLOAD_FAILED, attrs)
            return UploadOutcome.UPLOAD_FAILED
        return UploadOutcome.UPLOADED


_AFTER = {
    FlareEvents.AFTER_LEARNABLE_PERSIST.value: ServerEventHandler._look_for_links,
    FlipEvents.RESULTS_UPLOAD_COMPLETED.value: ServerEventHandler._keep_receipt,
    FlipEvents.SEND_RESULT.value: ServerEventHandler._relay_metric,
}
"""What the handler itself still does after an event is recorded."""


class _NoHub:
    """Stands in for a hub that the settings do not tell how to reach: everything waits in the ledger."""

    def send(self, row: OutboxRow) -> Reply:
        return Reply(error="SettingsError")


class _ForeignClient:
    """Calls a client object of the job's own, in order, on one thread, so that a hanging one holds up nobody."""

    def __init__(self) -> None:
        self._calls: queue.Queue[tuple[Any, str, ModelStatus, threading.Event]] = queue.Queue(maxsize=100)
        threading.Thread(target=self._work, name="flip-foreign-client", daemon=True).start()

    def update_status(self, client: Any, model_id: str, status: ModelStatus, seconds: float) -> None:
        done = threading.Event()
        try:
            self._calls.put_nowait((client, model_id, status, done))
        except queue.Full:
            report("foreign_client", "QueueFull", "a status was not given to the job's own client object")
            return
        if not done.wait(seconds):
            report("foreign_client", "Timeout", "the job's own client object has not returned from update_status yet")

    def _work(self) -> None:
        while True:
            client, model_id, status, done = self._calls.get()
            try:
                client.update_status(model_id, status)
            except BaseException as error:  # noqa: BLE001 - somebody else's code on our thread
                report("foreign_client", error, "the job's own client object did not take a status")
            done.set()


def _settings_in_need() -> Settings:
    """What is needed to keep a run's history where the environment cannot be used."""
    contract = _contract.in_need(os.environ.get("FLIP_HUB_CONTRACT"))
    return Settings.model_construct(end_run_seconds=0.0, told_contract=contract)


def _ledger_directory(settings: Settings, fl_ctx: FLContext) -> Path:
    configured = settings.directory or os.environ.get("FLIP_OBSERVABILITY_DIR")
    if configured:
        return Path(configured)
    return (context.workspace_root(fl_ctx) or Path.cwd()) / LEDGER_FOLDER
