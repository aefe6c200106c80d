"""The client object that FLIP's server-side code calls: ``FLIP().update_status(model_id, status)`` and its companions.

It sends nothing itself. What the hub must be told goes to the recorder of the run in this process, which
:func:`attach` names, or, where there is none, into an outbox of this process's own.
"""

from __future__ import annotations

import json
import math
import operator
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn, Protocol

from pydantic import SecretStr, ValidationError

from flip_observability.constants import (
    FINAL_STATUSES,
    ROUND_LESS_EVENTS,
    FLLogEvent,
    JobType,
    ModelStatus,
    OwnEvents,
)
from flip_observability.errors import logger, report
from flip_observability.hub import CONTRACTS, Dispatcher, transport_for
from flip_observability.ledger import Entry, Ledger, LedgerError, OutboxItem
from flip_observability.lifecycle import Event, fold
from flip_observability.results import Destination, Receipt, ResultsUploadError, upload_results
from flip_observability.settings import LEDGER_FOLDER, Settings, SettingsError
from flip_observability.spool import Spool
from flip_observability.utils import canonical_uuid

log = logger(__name__)

MAX_LOG_CHARACTERS = 65_536
"""Of a text for the hub's log; what is longer loses its middle."""
MAX_NAME_CHARACTERS = 1_000
MAX_LABEL_CHARACTERS = 64
"""Of a label of the x axis, as the contract has it."""
MAX_ROUND = 2**31 - 1
MAX_DETAILS_BYTES = 8_192
HUBS_OWN_EVENT = "QUEUE_POSITION"
"""The hub's scheduler alone says it, and refuses it from anybody else."""
MAX_WAITED_FOR = 100
"""Models whose latest status :meth:`FLIP.flush` waits for."""


class StatusSink(Protocol):
    """Where the client's calls go. It may also have ``multipart(key, upload_id)`` and ``upload_progress(sent, total)``,
    which are told of an upload, ``upload_context()``, in which it happens, ``stalled_after()``, the seconds after which
    it is given up when nothing moves, and ``directory``, the ledger's folder.
    """

    def post(self, kind: str, model_id: str, payload: dict[str, Any], final: bool) -> None: ...


class CleanupError(Exception):
    """A folder could not be removed."""


class NotOnThisSideError(NotImplementedError):
    """A call that belongs to the hospitals' side of FLIP."""


_lock = threading.Lock()
_attached: StatusSink | None = None
_own: tuple[int, Outbox] | None = None


def attach(sink: StatusSink) -> None:
    """From now on everything that clients of this process are told goes to ``sink``."""
    global _attached
    with _lock:
        _attached = sink


def detach(sink: StatusSink | None = None) -> None:
    """Undo :func:`attach`.

    Args:
        sink: only when this is the one that is attached; None for whichever it is.
    """
    global _attached
    with _lock:
        if sink is None or _attached is sink:
            _attached = None


def _sink_for(settings: Callable[[], Settings]) -> StatusSink:
    global _own
    with _lock:
        if _attached is not None:
            return _attached
        if _own is None or _own[0] != os.getpid():  # a forked child has neither the threads nor the right to the file
            loaded = settings()
            _own = os.getpid(), Outbox(loaded, loaded.directory or Path(LEDGER_FOLDER))
        return _own[1]


class FLIP:
    """FLIP's client. Any number of them share what the process has: making one costs nothing.

    Args:
        job_type: the kind of job; all kinds are served alike.
        settings: read from the environment when first needed, if None.

    Raises:
        ValueError: for a job type that FLIP does not have.
    """

    logger = log

    def __init__(self, job_type: JobType | str = JobType.STANDARD, *, settings: Settings | None = None) -> None:
        kinds = [kind.value for kind in JobType]
        if str(job_type) not in kinds:
            raise ValueError(f"Unknown job_type: it must be one of {', '.join(kinds)}")
        self._settings = settings

    @property
    def settings(self) -> Settings:
        """What the environment says.

        Raises:
            SettingsError: naming the variables that cannot be used.
        """
        if self._settings is None:
            self._settings = Settings.load()
        return self._settings

    def update_status(self, model_id: str, new_model_status: ModelStatus | str) -> bool:
        """Tell the hub a model's status. It is durable when this returns, and sent until the hub has accepted it.

        Args:
            model_id: the model's UUID. With ``LOCAL_DEV`` one that is none is only logged, here and in the calls below.
            new_model_status: a member of :class:`ModelStatus`, or its value.

        Returns:
            Whether it is recorded. The hub itself may hear it later, and then need not be told again.

        Raises:
            ValueError: for a model id that is no UUID, and for a status that is none.
            SettingsError: outside a run, when the environment cannot be used.
        """
        try:
            known = ModelStatus(str(new_model_status))
        except ValueError:
            raise ValueError(f"Invalid status: expected one of {', '.join(ModelStatus)}") from None
        model = self._model_id(model_id, "a status")
        return model is None or self._post("status", model, {"status": known.value}, known in FINAL_STATUSES)

    def send_metrics(  # noqa: PLR0917 - FLIP's signature
        self,
        client_name: str,
        model_id: str,
        label: str,
        value: float,
        global_round: int,
        x_value: float | None = None,
        x_label: str | None = None,
    ) -> None:
        """Send one value of a metric to the hub. One that no hub would take is logged and forgotten.

        Args:
            client_name: NVFLARE's name of the client it comes from.
            model_id: the model's UUID.
            label: which metric.
            value: a finite number.
            global_round: the round it was measured in.
            x_value: where it lies on the x axis, for hubs that take it; the round when None.
            x_label: what the x axis is, up to 64 characters; the hub's own name for rounds when there is none.

        Raises:
            ValueError: for a model id that is no UUID.
            SettingsError: outside a run, when the environment cannot be used.
        """
        model = self._model_id(model_id, "a metric")
        if model is None:
            return
        try:
            payload: dict[str, Any] = {
                "client": _name(client_name, "client name"),
                "round": _round(global_round),
                "label": _name(label, "label"),
                "value": _finite(value, "value"),
            }
            if x_value is not None:
                payload["x_value"] = _finite(x_value, "x value")
            if x_label is not None and x_label != "":
                payload["x_label"] = _name(x_label, "x label", MAX_LABEL_CHARACTERS)
        except ValueError as error:  # its text is one of ours
            log.warning("A metric of model %s was not sent: %s.", model, error)
            return
        self._post("metric", model, payload)

    def send_handled_exception(self, formatted_exception: str, client_name: str | None, model_id: str) -> None:
        """Send the text of an exception to the hub's log of a model. It goes there and nowhere else.

        Args:
            formatted_exception: the text; from one that is very long the middle is left out.
            client_name: NVFLARE's name of the client where it happened; None when that is not known.
            model_id: the model's UUID.

        Raises:
            TypeError: when the text is no ``str``, or the client name is neither that nor None.
            ValueError: for a model id that is no UUID.
            SettingsError: outside a run, when the environment cannot be used.
        """
        if not isinstance(formatted_exception, str):
            raise TypeError(f"formatted_exception must be a str, not {type(formatted_exception).__name__}")
        if not isinstance(client_name, str | None):
            raise TypeError(f"client_name must be a str or None, not {type(client_name).__name__}")
        model = self._model_id(model_id, "an exception")
        if model is None:
            return
        client = None if client_name is None else _sayable(client_name)[:MAX_NAME_CHARACTERS]
        self._post("log", model, {"client": client, "log": _shortened(formatted_exception)})

    def send_event(  # noqa: PLR0917 - FLIP's signature
        self,
        model_id: str,
        event_type: FLLogEvent | str,
        global_round: int | None,
        client_name: str | None = None,
        details: dict[str, Any] | None = None,
        success: bool = True,
    ) -> None:
        """Tell the hub an event of a run. One that no hub would take is logged and forgotten.

        A hub of the contract 2026-05 takes no events: then nothing is sent.

        Args:
            model_id: the model's UUID.
            event_type: a member of :class:`FLLogEvent`, or another name that the hub knows.
            global_round: from 1; None for an event of a job that has not begun.
            client_name: NVFLARE's name of the client it is about, if it is about one.
            details: what is known about it, up to 8192 bytes of JSON.
            success: whether it is a good sign.

        Raises:
            ValueError: for a model id that is no UUID.
            SettingsError: outside a run, when the environment cannot be used.
        """
        model = self._model_id(model_id, "an event")
        if model is None:
            return
        try:
            payload = {
                "client": None if client_name is None else _name(client_name, "client name"),
                "event_type": _event_type(event_type),
                "round": _event_round(event_type, global_round),
                "details": _details(details),
                "success": bool(success),
            }
        except ValueError as error:  # its text is one of ours
            log.warning("An event of model %s was not sent: %s.", model, error)
            return
        if CONTRACTS[self.settings.hub_contract].takes_events:
            self._post("event", model, payload)

    def upload_results_to_s3(self, results_folder: str | os.PathLike[str], model_id: str) -> Receipt:
        """Upload a run directory, verified, and return when it has arrived. Nothing in the directory changes.

        With ``LOCAL_DEV`` it goes to the folder ``results`` beside the ledger, unless the bucket setting is a folder.

        Args:
            results_folder: the run directory.
            model_id: the model's UUID.

        Returns:
            Where the archive is, its size and its checksum.

        Raises:
            ResultsUploadError: whatever went wrong; the cause is chained, the reason an attribute.
        """
        try:
            canonical = canonical_uuid(model_id)
            if canonical is None:
                raise ResultsUploadError("other", "the model id is no UUID")
            sink = _attached  # the run's, which wants to know; an outbox of this process's own does not
            with getattr(sink, "upload_context", nullcontext)():
                return upload_results(
                    Path(results_folder),
                    self._destination(sink),
                    canonical,
                    max_bytes=self._without_hub().results_max_bytes,
                    stalled_after=getattr(sink, "stalled_after", None),
                    on_progress=getattr(sink, "upload_progress", None),
                    on_multipart=getattr(sink, "multipart", None),
                )
        except ResultsUploadError:
            raise
        except Exception as error:
            raise ResultsUploadError("other", type(error).__name__) from error

    def cleanup(self, path: str | os.PathLike[str]) -> None:
        """Remove a folder with all that is in it. With ``LOCAL_DEV`` it is only said.

        Args:
            path: the folder.

        Raises:
            CleanupError: "Failed to clean up path…", the cause chained.
            SettingsError: when the environment cannot be used.
        """
        if self._without_hub().local_dev:
            log.info("LOCAL_DEV: %s is not removed", path)
            return
        try:
            shutil.rmtree(path)
        except Exception as error:
            raise CleanupError(f"Failed to clean up path {os.fspath(path)} ({type(error).__name__})") from error

    def flush(self, seconds: float) -> bool:
        """For a script that ends right after it has told a status: wait for the hub.

        Args:
            seconds: to wait at most.

        Returns:
            Whether the hub has accepted every status that was told outside a run. The others stay in the outbox.
        """
        with _lock:
            own = _own
        return own is None or own[0] != os.getpid() or own[1].flush(seconds)

    def get_dataframe(self, *_: Any, **__: Any) -> NoReturn:
        """Not on this side: always raises :class:`NotOnThisSideError`."""
        _not_on_this_side("get_dataframe")

    def get_by_accession_number(self, *_: Any, **__: Any) -> NoReturn:
        """Not on this side: always raises :class:`NotOnThisSideError`."""
        _not_on_this_side("get_by_accession_number")

    def add_resource(self, *_: Any, **__: Any) -> NoReturn:
        """Not on this side: always raises :class:`NotOnThisSideError`."""
        _not_on_this_side("add_resource")

    def _model_id(self, value: Any, what: str) -> str | None:
        """The canonical spelling; None for what is no UUID and, with ``LOCAL_DEV``, need not be one."""
        model_id = canonical_uuid(value)
        if model_id is None:
            if not self.settings.local_dev:
                raise ValueError("Invalid model ID: it must be a UUID")
            log.info("LOCAL_DEV: %s of a model without a UUID is only logged", what)
        return model_id

    def _post(self, kind: str, model_id: str, payload: dict[str, Any], final: bool = False) -> bool:
        sink = _sink_for(lambda: self.settings)
        try:
            sink.post(kind, model_id, payload, final)
        except Exception as error:  # noqa: BLE001 - the caller is a run, and the run goes on
            report("client", error, f"a {kind} of model {model_id} could not be kept for the hub")
            return False
        return True

    def _without_hub(self) -> Settings:
        """The settings for what needs no hub, and so no service key."""
        try:
            return self.settings
        except SettingsError:
            try:
                return Settings(service_key=SecretStr("needed by nobody here"))
            except ValidationError:
                pass
            raise

    def _destination(self, sink: StatusSink | None) -> Destination:
        settings = self._without_hub()
        folder = getattr(sink, "directory", None) or settings.directory or Path(LEDGER_FOLDER)
        return results_destination(settings, Path(folder))


def results_destination(settings: Settings, folder: Path) -> Destination:
    """Where results go: what the settings say or, with ``LOCAL_DEV`` and no folder there, beside the ledger.

    Args:
        settings: of this server.
        folder: the ledger's.
    """
    configured = Destination.parse(settings.bucket)
    if not settings.local_dev or configured.scheme == "file":
        return configured
    return Destination("file", directory=folder.absolute() / "results")


class Outbox:
    """The outbox of a process that records no run: a ledger shared with other processes, and a dispatcher.

    What the ledger cannot take is sent from memory, and kept in a spool file beside it.

    Args:
        settings: of this server.
        directory: the ledger's folder.
    """

    def __init__(self, settings: Settings, directory: Path) -> None:
        self.directory = directory
        self._settings = settings
        self._transport = transport_for(settings)
        self._lock = threading.Lock()
        self._ledger: Ledger | None = None
        self._dispatcher_ledger: Ledger | None = None
        self._dispatcher: Dispatcher | None = None
        self._memory: Ledger | None = None
        self._memory_dispatcher: Dispatcher | None = None
        self._spool = Spool(directory)
        self._statuses: dict[str, tuple[str, Dispatcher]] = {}
        try:
            self._ledger = Ledger.open_or_replace(directory)
            self._dispatcher_ledger = Ledger(directory)
            self._dispatcher = self._start(self._dispatcher_ledger)
        except LedgerError as error:
            report("client", error, f"{error} What the hub must be told is sent from memory")

    def post(self, kind: str, model_id: str, payload: dict[str, Any], final: bool) -> None:
        """Keep something for the hub. A status joins the model's newest run, as long as that has no final one."""
        item = OutboxItem(model_id, kind, payload, final)
        with self._lock:
            dispatcher = self._keep(item)
            if dispatcher is not None and kind == "status":
                self._statuses[model_id] = item.uid, dispatcher  # when the last one has arrived, so have those before
                if len(self._statuses) > MAX_WAITED_FOR:
                    self._statuses.pop(next(iter(self._statuses)))
        if dispatcher is not None:
            dispatcher.nudge()

    def flush(self, seconds: float) -> bool:
        """Wait until the hub has accepted the statuses posted so far, at most ``seconds``."""
        deadline = time.monotonic() + seconds
        with self._lock:
            waiting = dict(self._statuses)
        done = True
        for uid, dispatcher in waiting.values():
            done = dispatcher.wait_for(uid, max(0.0, deadline - time.monotonic())) and done
        return done

    def close(self, seconds: float = 1.0) -> None:
        """Stop the threads and close the files. What is in the outbox stays there."""
        for dispatcher in (self._dispatcher, self._memory_dispatcher):
            if dispatcher is not None:
                dispatcher.stop(seconds)
        for ledger in (self._ledger, self._dispatcher_ledger, self._memory):
            if ledger is not None:
                ledger.close()

    def _start(self, ledger: Ledger) -> Dispatcher:
        dispatcher = Dispatcher(ledger, self._transport, self._settings)
        dispatcher.start()
        return dispatcher

    def _keep(self, item: OutboxItem) -> Dispatcher | None:
        """Returns who delivers it; None when there is nothing to deliver."""
        if self._ledger is not None:
            try:
                return self._dispatcher if self._append(self._ledger, item) else None
            except LedgerError as error:
                report("client", error, "cannot write the ledger; what the hub must be told is sent from memory")
        if self._memory is None:
            self._memory = Ledger(None)
            self._memory_dispatcher = self._start(self._memory)
        entry = Entry(None, time.time(), outbox=(item,))
        if entry.durable:
            self._spool.add(entry)
        self._memory.append(entry)
        return self._memory_dispatcher

    def _append(self, ledger: Ledger, item: OutboxItem) -> bool:
        now = time.time()
        run = ledger.open_run_of_model(item.model_id)
        if run is None or run["final_status"] is not None:
            return ledger.append(Entry(None, now, outbox=(item,)))
        if item.kind != "status":
            return ledger.append(Entry(run["run_id"], now, outbox=(item,)))
        return self._append_status(ledger, run["run_id"], item, now)

    @staticmethod
    def _append_status(ledger: Ledger, run_id: str, item: OutboxItem, now: float) -> bool:
        """A status of a run that another process records: in its history, and never backwards."""
        status = str(item.payload["status"])
        event = Event(OwnEvents.STATUS.value, now, {"status": status})
        rows = ledger.events(run_id)
        state = fold(run_id, (Event(row["name"], row["time"], row["attrs"], row["uid"]) for row in rows))
        effects = state.apply(event)
        send = item.final or effects.status is not None
        won = ledger.append(
            Entry(
                run_id,
                now,
                event,
                facts=tuple(effects.facts),
                run={"status": status} if send else {},
                problems=effects.problems,
                final_status=status if item.final else None,
                final_by="client" if item.final else None,
                outbox=(item,) if send else (),
            )
        )
        return send and won


def _sayable(text: str) -> str:
    """Text that JSON and a database can hold: no NUL, no half characters."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _shortened(text: str) -> str:
    if len(text) > MAX_LOG_CHARACTERS:
        half = MAX_LOG_CHARACTERS // 2
        text = f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"
    return _sayable(text)


def _name(value: Any, what: str, most: int = MAX_NAME_CHARACTERS) -> str:
    text = _sayable(value) if isinstance(value, str) else ""
    if not 0 < len(text) <= most:
        raise ValueError(f"its {what} must be a text of 1 to {most} characters")
    return text


def _finite(value: Any, what: str) -> float:
    try:
        number = float(value)
    except Exception:  # noqa: BLE001 - `float()` of a foreign object can raise anything
        number = math.nan
    if isinstance(value, str | bytes) or not math.isfinite(number):
        raise ValueError(f"its {what} must be a finite number")
    return number


def _round(value: Any) -> int:
    try:
        number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    except Exception:  # noqa: BLE001 - as above
        number = -1
    if not 0 <= number <= MAX_ROUND:
        raise ValueError(f"its round must be a whole number from 0 to {MAX_ROUND}")
    return number


def _event_type(value: Any) -> str:
    name = _name(str(value) if isinstance(value, FLLogEvent) else value, "type", MAX_LABEL_CHARACTERS)
    if not name.strip() or name == HUBS_OWN_EVENT:
        raise ValueError(f"its type must not be blank or {HUBS_OWN_EVENT}, which is the hub's own")
    return name


def _event_round(event_type: Any, value: Any) -> int | None:
    if value is None and str(event_type) in ROUND_LESS_EVENTS:
        return None
    number = _round(value)
    if number == 0:
        raise ValueError("its round must be counted from 1")
    return number


def _details(value: Any) -> dict[str, Any] | None:
    try:
        text = json.dumps(value, allow_nan=False)
    except Exception:  # noqa: BLE001 - what a caller gives can be anything, also no JSON at all
        raise ValueError("its details cannot be written as JSON") from None
    if not isinstance(value, dict | None) or len(text) > MAX_DETAILS_BYTES:
        raise ValueError(f"its details must be a dict of up to {MAX_DETAILS_BYTES} bytes")
    return value


def _not_on_this_side(name: str) -> NoReturn:
    raise NotOnThisSideError(
        f"FLIP().{name} belongs to the hospitals' side of FLIP; on the server there is no patient data to give"
    )
