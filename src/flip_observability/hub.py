"""The Central Hub: its wire contracts, how it is reached, and the dispatcher that tells it what the outbox holds.

A change of the wire touches :data:`CONTRACTS` alone. The client object that FLIP's code calls is in
:mod:`flip_observability.client`; ``FLIP`` can be imported from here too.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from urllib.parse import quote

from flip_observability.constants import NO_HUB, ModelStatus
from flip_observability.errors import QUIET_SECONDS, logger, report
from flip_observability.ledger import Ledger, OutboxRow
from flip_observability.lifecycle import Fact
from flip_observability.process import ProcessIdentity, current_process
from flip_observability.settings import Settings
from flip_observability.tracing import Tracing, has_trace, shared
from flip_observability.utils import canonical_uuid

if TYPE_CHECKING:
    from flip_observability._wire import Wire
    from flip_observability.client import FLIP as FLIP  # noqa: PLC0414 - an export
else:

    def __getattr__(name: str) -> Any:
        # The client stands on this module; whoever looks for it here gets it without an import circle.
        if name == "FLIP":
            from flip_observability.client import FLIP

            return FLIP
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


log = logger(__name__)

CONNECT_SECONDS = 3.0
TOTAL_SECONDS = 10.0
"""A whole call, from the connection to the last byte that is read of the answer."""
LEASE_SECONDS = 15.0
"""Outlives :data:`TOTAL_SECONDS`, so that no row is sent by two dispatchers at once."""
MAX_RETRY_AFTER = 3_600.0

Payload: TypeAlias = "Mapping[str, Any]"


# -- the wire contract -------------------------------------------------------------------------------------------------

SERVER_AS_TRUST = "server"
"""Who speaks, in the contract of 2026-05, when it is no client."""
_SITE = re.compile(r"site-(\d+)")


def _trust(client: str | None) -> str:
    """The trust's name of an NVFLARE client; FLIP's ``site-N`` is the hub's ``Trust_N``."""
    if client is None:
        return SERVER_AS_TRUST
    site = _SITE.fullmatch(client)
    return f"Trust_{site[1]}" if site else client


def _metric_2026_05(payload: Payload) -> dict[str, Any]:
    return {
        "trust": _trust(payload["client"]),
        "globalRound": payload["round"],
        "label": payload["label"],
        "result": payload["value"],
    }


def _metric_2026_10(payload: Payload) -> dict[str, Any]:
    return {
        "fl_client_name": payload["client"],
        "global_round": payload["round"],
        "label": payload["label"],
        "result": payload["value"],
        "x_value": payload.get("x_value", float(payload["round"])),
        "x_label": payload.get("x_label", "Global Rounds"),
    }


def _log_2026_05(payload: Payload) -> dict[str, Any]:
    return {"trust": _trust(payload["client"]), "log": payload["log"]}


def _log_2026_10(payload: Payload) -> dict[str, Any]:
    return {
        "fl_client_name": payload["client"],
        "log": payload["log"],
        "event_type": None,
        "global_round": None,
        "details": None,
        "success": False,
    }


def _event_2026_10(payload: Payload) -> dict[str, Any]:
    return {
        "fl_client_name": payload["client"],
        "log": None,
        "event_type": payload["event_type"],
        "global_round": payload["round"],
        "details": payload["details"],
        "success": payload["success"],
    }


@dataclass(frozen=True)
class Contract:
    """How a hub of one generation spells what we say.

    Args:
        upload_failed: the final status of a run whose results could not be uploaded.
        spelled: our status to the hub's, where they differ.
        posts: kind of an outbox row to the end of its path and what makes its body of our payload.
    """

    upload_failed: ModelStatus
    spelled: Mapping[ModelStatus, ModelStatus]
    posts: Mapping[str, tuple[str, Callable[[Payload], dict[str, Any]]]]

    @property
    def takes_events(self) -> bool:
        """Whether rounds are told as events."""
        return "event" in self.posts

    def spelling(self, status: str) -> str:
        """How the hub spells a status of ours; what is none stays as it is."""
        try:
            known = ModelStatus(status)
        except ValueError:
            return status
        return self.spelled.get(known, known).value

    def request(self, kind: str, model_id: str, payload: Payload) -> tuple[str, str, dict[str, Any] | None]:
        """The call that a row of the outbox becomes.

        Args:
            kind: ``status``, ``metric``, ``log`` or ``event``.
            model_id: in canonical form.
            payload: in our vocabulary.

        Returns:
            Method, path below the base URL, and the body (None for none).

        Raises:
            ValueError, KeyError, TypeError: the row is none that this contract can say.
        """
        if canonical_uuid(model_id) != model_id:
            raise ValueError("not a model id in canonical form")
        base = f"/model/{quote(model_id, safe='')}"
        if kind == "status":
            status = ModelStatus(payload["status"])
            return "PUT", f"{base}/status/{quote(self.spelling(status.value), safe='')}", None
        if kind not in self.posts:
            raise ValueError("this contract has no such call")
        path, body = self.posts[kind]
        return "POST", f"{base}/{path}", body(payload)


CONTRACTS: Mapping[str, Contract] = MappingProxyType(
    {
        "2026-05": Contract(
            upload_failed=ModelStatus.ERROR,
            spelled={
                ModelStatus.RUNNING: ModelStatus.TRAINING_STARTED,
                ModelStatus.RESULTS_UPLOAD_FAILED: ModelStatus.ERROR,
            },
            posts={"metric": ("metrics", _metric_2026_05), "log": ("logs", _log_2026_05)},
        ),
        "2026-10": Contract(
            upload_failed=ModelStatus.RESULTS_UPLOAD_FAILED,
            spelled={ModelStatus.TRAINING_STARTED: ModelStatus.RUNNING},
            posts={
                "metric": ("metrics", _metric_2026_10),
                "log": ("logs", _log_2026_10),
                "event": ("logs", _event_2026_10),
            },
        ),
    }
)
"""Value of ``FLIP_HUB_CONTRACT`` to what it means."""


# -- the transport -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What came of one call.

    Args:
        status: HTTP status code; None when there was no answer.
        error: the type of what went wrong when there was no answer. Never its text.
        retry_after: seconds that the hub asks to be left alone.
        unsendable: the row itself cannot be made a call; the hub has not been asked.
        instead: what answered in the hub's place.
    """

    status: int | None = None
    error: str | None = None
    retry_after: float | None = None
    unsendable: bool = False
    instead: str | None = None

    @property
    def outcome(self) -> str:
        """In a word: what stood in for the hub, the code, or the type of the error."""
        return self.instead or (str(self.status) if self.status is not None else (self.error or "no answer"))


class Transport(Protocol):
    """How the hub is reached. ``send`` never raises, and ends within :data:`TOTAL_SECONDS`.

    A transport that waits for nobody may say so with an attribute ``instant``; its calls need no threads.
    """

    def send(self, row: OutboxRow) -> Reply: ...


class HubTransport:
    """The hub over HTTP: pooled connections, verified TLS, no redirects, and a deadline that holds.

    Args:
        settings: base URL, key and contract.
        total: seconds that a call may take.
        tracing: where the calls' spans go; the process's own when None.
    """

    def __init__(self, settings: Settings, *, total: float = TOTAL_SECONDS, tracing: Tracing | None = None) -> None:
        self._tracing = tracing or shared(settings)
        self._base = settings.hub_url
        self._settings = settings
        self._total = total
        self._headers = {
            "User-Agent": "flip-observability",
            settings.service_key_header: settings.service_key.get_secret_value(),
        }
        self._made: Wire | None = None
        self._making = threading.Lock()
        if settings.sends_key_in_clear:
            _warn_of_a_key_in_clear(settings.hub_url)

    def send(self, row: OutboxRow) -> Reply:
        """Make the call of a row.

        Args:
            row: of the outbox.

        Returns:
            What came of it. Nothing is raised.
        """
        try:
            contract = CONTRACTS[self._settings.contract_for(row.contract)]
            method, path, body = contract.request(row.kind, row.model_id, row.payload)
            data = None if body is None else json.dumps(body, allow_nan=False).encode()
        except Exception as error:  # noqa: BLE001 - whatever a row holds, it must not stop the others
            return Reply(error=type(error).__name__, unsendable=True)
        spans = self._tracing.client_spans if has_trace(row.run_id) else None
        from flip_observability._wire import Deadline, as_spans

        deadline = Deadline(min(self._total, TOTAL_SECONDS))
        try:
            with deadline, as_spans(spans, row.run_id, row.attempts):
                status, wait = self._wire().call(method, path, data, (CONNECT_SECONDS, self._total))
                return Reply(status, retry_after=_retry_after(wait))
        except Exception as error:  # noqa: BLE001 - no memory, no more threads: the row is not to blame
            return Reply(error="DeadlineExceeded" if deadline.over else type(error).__name__)

    def _wire(self) -> Wire:
        from flip_observability._wire import Wire

        with self._making:
            if self._made is None:
                self._made = Wire(self._base, self._headers, WORKERS)
            return self._made

    def close(self) -> None:
        """Close the pooled connections."""
        if self._made is not None:
            self._made.close()


@cache
def _warn_of_a_key_in_clear(base: str) -> None:
    # Once for a process. A status that is not sent is worse than a key that somebody may read.
    log.warning(
        "The service key goes to %s unencrypted. Use https://, or set FLIP_HUB_TRUSTED_NETWORK=true where everybody on "
        "the way is trusted.",
        base,
    )


class LocalHub:
    """Stands in for the hub with ``LOCAL_DEV``: statuses are logged, everything is accepted."""

    instant = True

    def send(self, row: OutboxRow) -> Reply:
        """Accept a row, and say that no hub did."""
        if row.kind == "status":
            log.info("LOCAL_DEV: status of model %s is %s", row.model_id, row.payload.get("status"))
        return Reply(200, instead=NO_HUB)


def transport_for(settings: Settings, tracing: Tracing | None = None) -> Transport:
    """The transport that the settings ask for."""
    return LocalHub() if settings.local_dev else HubTransport(settings, tracing=tracing)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header (seconds or a date), at most an hour; None when it says nothing."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdecimal():
        seconds = float(value[:10])
    else:
        try:
            when = parsedate_to_datetime(value)
            seconds = (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


# -- what an answer means ----------------------------------------------------------------------------------------------


class Verdict(Enum):
    """What an answer means for the row, and for the hub."""

    DELIVERED = "delivered"
    HUB_ILL = "hub ill"
    BACK_OFF = "back off"
    REJECTED = "rejected"


_ILL = frozenset({401, 403, 429})
"""A key can be mended, and who is asked to wait waits with everything."""
_ROW_ALONE = frozenset({408})
_FINAL_ALONE = frozenset({404, 409, *range(300, 400)})
"""A final status is worth waiting for, until a person has mended the hub."""


def classify(reply: Reply, row: OutboxRow) -> Verdict:
    """What an answer means.

    Args:
        reply: the answer.
        row: what was sent.
    """
    if reply.unsendable:
        return Verdict.BACK_OFF if row.final else Verdict.REJECTED
    status = reply.status
    if status is None or status < 200 or status >= 500 or status in _ILL:
        return Verdict.HUB_ILL
    if status < 300:
        return Verdict.DELIVERED
    if status in _ROW_ALONE or (row.final and status in _FINAL_ALONE):
        return Verdict.BACK_OFF
    return Verdict.REJECTED


# -- the dispatcher ----------------------------------------------------------------------------------------------------

WORKERS = 8
"""Calls made at once."""
POLL_SECONDS = 0.5
"""How often a dispatcher looks again, at least, while something waits."""
IDLE_SECONDS = 2.0
"""How often it looks for rows of other processes while nothing waits. Of its own process's it is told."""
FIRST_BACKOFF = 0.5
MIN_BACKOFF = 0.05
MAX_PROBE_SECONDS = 15.0
MAX_ROW_SECONDS = 25.0
"""A final status is to be known within 30 s after whatever kept it back has been mended."""
EXPIRY_SECONDS = 60.0
"""How often the outbox is searched for rows that have become too old."""
EXPIRY_BATCH = 1_000
INHERIT_SECONDS = 2.0
"""How often leases are searched for whose process is gone."""
FACTS_AT_ONCE = 10
FACTS_EVERY = 20
"""After :data:`FACTS_AT_ONCE` attempts of a row, one fact counts that many: an outage must not fill the ledger."""

_SETTLED_FOR_GOOD = frozenset({"rejected", "expired", "dropped", "superseded"})


def _counted(retries: int) -> int:
    """How many of a row's first ``retries`` vain attempts have been counted by then."""
    return min(retries, FACTS_AT_ONCE) + max(0, retries - FACTS_AT_ONCE) // FACTS_EVERY * FACTS_EVERY


def _request_fact(row: OutboxRow, count: int, outcome: str) -> list[Fact]:
    return [("hub_request", count, {"kind": row.kind, "outcome": outcome})] if count else []


def _retry_facts(row: OutboxRow) -> tuple[Fact, ...]:
    return tuple(_request_fact(row, _counted(row.attempts + 1) - _counted(row.attempts), "retried"))


def _end_facts(row: OutboxRow, outcome: str) -> list[Fact]:
    return _request_fact(row, row.attempts - _counted(row.attempts), "retried") + _request_fact(row, 1, outcome)


@dataclass
class _Illness:
    """What this dispatcher knows about a hub that is ill."""

    since: float
    failures: int = 0
    probe_at: float = 0.0
    not_before: float = 0.0


@dataclass
class _Quiet:
    """Lets a log line of one kind through once a minute."""

    last: dict[str, float] = field(default_factory=dict)

    def allows(self, key: str) -> bool:
        now = time.monotonic()
        if now - self.last.get(key, -QUIET_SECONDS) < QUIET_SECONDS:
            return False
        if len(self.last) > 1_000:
            self.last.clear()
        self.last[key] = now
        return True


class Dispatcher:
    """Tells the hub what the outbox holds, at least once, in order within a model's lane, until it has accepted it.

    Any number of them, in any number of processes, work on one ledger. Nothing is raised out of its threads.

    Args:
        ledger: best a connection of its own. It stays the caller's: close it after :meth:`stop`.
        transport: how the hub is reached.
        settings: for the age at which what is not final is given up.
        clock: epoch seconds.
        rng: for the jitter.
        prepare: called before the first row is taken, and again when rows could not be taken for a while. What it
            raises is reported, and nothing is taken until it works.
    """

    def __init__(
        self,
        ledger: Ledger,
        transport: Transport,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        self._prepare, self._prepared = prepare, False
        self._ledger = ledger
        self._transport = transport
        self._max_age = settings.outbox_max_age_hours * 3600
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - jitter
        self._owner = f"{current_process().token()}|{uuid.uuid4().hex[:12]}"
        self._wake = threading.Condition()
        self._in_flight = 0
        self._delivered = 0
        self._nudged = False
        self._illness: _Illness | None = None
        self._next_expiry = 0.0
        self._inherited_at = float("-inf")
        self._last_look = 0.0
        self._pause = POLL_SECONDS
        self._quiet = _Quiet()
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    # -- for its owner -----------------------------------------------------------------------------------------------

    @property
    def hub_is_ill(self) -> bool:
        """Whether the hub did not answer, or refused everything, when it was last asked."""
        return self._illness is not None

    @property
    def last_look(self) -> float:
        """When it last looked into the outbox and could (epoch seconds of the real clock; 0 for never)."""
        return self._last_look

    def start(self) -> None:
        """Begin to work, on a daemon thread."""
        with self._wake:
            if self._thread is None:
                self._stop = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._stop,), name="flip-hub-dispatcher", daemon=True
                )
                self._thread.start()

    def stop(self, timeout: float) -> None:
        """Take no more rows, and let those that are being sent end.

        Args:
            timeout: seconds to wait for that. Calls that take longer end by their own deadline.
        """
        deadline = time.monotonic() + timeout
        with self._wake:
            if self._stop is not None:
                self._stop.set()
            thread, self._thread = self._thread, None
            self._wake.notify_all()
        if thread is not None:
            thread.join(timeout)
        with self._wake:
            self._wake.wait_for(lambda: not self._in_flight, max(0.0, deadline - time.monotonic()))

    def nudge(self) -> None:
        """There is a new row: look at once."""
        with self._wake:
            self._nudged = True
            self._wake.notify_all()

    def wait_for(self, uid: str, timeout: float) -> bool:
        """Wait until the hub has accepted a row, whoever delivers it.

        An ill hub is tried anew at once, and then more often, unless it has asked to be left alone.

        Args:
            uid: of the row; it may appear later.
            timeout: seconds.

        Returns:
            Whether it has been accepted. False at once when it never will be.
        """
        deadline = time.monotonic() + timeout
        with self._wake:
            if self._illness is not None:
                self._illness.failures = 0
                self._illness.probe_at = self._illness.not_before
        self.nudge()
        while True:
            try:
                row = self._ledger.outbox_row(uid)
            except Exception as error:  # noqa: BLE001 - whoever waits is about to end a run
                report("hub", error, "cannot look into the outbox; trying again")
                row = None
            if row is not None and row.state == "delivered":
                return True
            left = deadline - time.monotonic()
            if left <= 0 or (row is not None and row.state in _SETTLED_FOR_GOOD):
                return False
            with self._wake:
                self._wake.wait(min(left, 0.1))

    def run_once(self, now: float | None = None) -> int:
        """Send everything that may be sent now, and wait for the answers. For a dispatcher that is not started.

        Args:
            now: epoch seconds of a simulated clock; the real one when None.

        Returns:
            How many rows the hub has accepted meanwhile.
        """
        before = self._delivered
        while True:
            taken = self._pump(now)
            with self._wake:
                if not taken and not self._in_flight:
                    return self._delivered - before
                busy = self._in_flight
                self._wake.wait_for(lambda busy=busy: self._in_flight < busy or not busy)  # type: ignore[misc]

    # -- taking rows -------------------------------------------------------------------------------------------------

    def _run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            taken = self._pump(None)
            with self._wake:
                if not taken and not self._nudged and not stop.is_set():
                    self._wake.wait(self._pause)
                self._nudged = False

    def _pump(self, now: float | None) -> int:
        """Take rows and begin to send them. Returns how many."""
        self._pause = POLL_SECONDS  # where rows cannot be taken although it is time, nothing is gained by haste
        try:
            if not self._prepared:
                self._prepare()
                self._prepared = True
            self._expire(self._time(now))
            self._inherit(self._time(now))
            rows, probe = self._take(self._time(now))
        except Exception as error:  # noqa: BLE001 - this loop lives as long as the process
            report("hub", error, "cannot take rows from the outbox; trying again")
            self._prepared = False
            return 0
        self._last_look = time.time()
        for row in rows:
            self._begin(row, probe, now)
        return len(rows)

    def _take(self, now: float) -> tuple[list[OutboxRow], bool]:
        with self._wake:
            free, illness = WORKERS - self._in_flight, self._illness
        if illness is not None:
            if now < illness.probe_at:
                self._pause = min(POLL_SECONDS, max(0.01, illness.probe_at - now))
                return [], True
            return (self._lease_probe(now) if free == WORKERS else []), True
        due = self._ledger.next_due() if free > 0 else None
        if due is None or due > now:
            if free > 0:
                self._pause = IDLE_SECONDS if due is None else min(POLL_SECONDS, max(0.01, due - now))
            return [], False
        return self._ledger.lease(self._owner, now, LEASE_SECONDS, free), False

    def _inherit(self, now: float) -> None:
        """Free what dead processes had leased: nobody need wait for leases that nobody will give back."""
        if abs(now - self._inherited_at) < INHERIT_SECONDS:
            return
        self._inherited_at = now
        for owner in self._ledger.lease_owners(now):
            process = ProcessIdentity.from_token(owner)
            if process is not None and process.is_alive() is False:
                self._ledger.break_leases(owner)

    def _lease_probe(self, now: float) -> list[OutboxRow]:
        # First what has not just been tried: a row that makes a healthy hub fail must not be its only probe for ever.
        return self._ledger.lease(self._owner, now, LEASE_SECONDS, 1) or self._ledger.lease(
            self._owner, now, LEASE_SECONDS, 1, ignore_backoff=True
        )

    def _expire(self, now: float) -> None:
        if now < self._next_expiry:
            return
        self._next_expiry = now + EXPIRY_SECONDS
        old = [
            row
            for row in self._ledger.outbox(states=["pending"], limit=EXPIRY_BATCH)
            if not row.final and now - row.created > self._max_age
        ]
        for row in old:
            current = self._ledger.outbox_row(row.uid)
            if current is not None and current.state == "pending":  # another process is doing the same
                self._settle(row, now, "expired", "expired", tuple(_end_facts(row, "expired")))
        if old:
            self._next_expiry = now  # there may be more

    # -- sending rows ------------------------------------------------------------------------------------------------

    def _begin(self, row: OutboxRow, probe: bool, now: float | None) -> None:
        with self._wake:
            self._in_flight += 1
        if getattr(self._transport, "instant", False):
            self._deliver(row, probe, now)
            return
        try:
            threading.Thread(target=self._deliver, args=(row, probe, now), name="flip-hub-call", daemon=True).start()
        except RuntimeError as error:  # no more threads: the lease ends by itself
            report("hub", error, "cannot start a thread for a call; trying again")
            self._done(0)

    def _deliver(self, row: OutboxRow, probe: bool, now: float | None) -> None:
        delivered = 0
        try:
            try:
                reply = self._transport.send(row)
            except Exception as error:  # noqa: BLE001 - a transport does not raise, but the ones behind must not suffer
                reply = Reply(error=type(error).__name__, unsendable=True)
            verdict = classify(reply, row)
            self._HANDLERS[verdict](self, row, reply, self._time(now))
            if probe and not reply.unsendable and verdict is not Verdict.HUB_ILL:
                self._recovered(self._time(now))
            delivered = int(verdict is Verdict.DELIVERED)
        except Exception as error:  # noqa: BLE001 - the lease ends by itself, and the row is sent again
            report("hub", error, "cannot write down what the hub answered; the row will be sent again")
        finally:
            self._done(delivered)

    def _done(self, delivered: int) -> None:
        with self._wake:
            self._in_flight -= 1
            self._delivered += delivered
            self._nudged = True
            self._wake.notify_all()

    def _on_delivered(self, row: OutboxRow, reply: Reply, now: float) -> None:
        lag: Fact = ("hub_delivery_lag", max(0.0, now - row.created), {"kind": row.kind})
        self._settle(row, now, "delivered", reply.outcome, (*_end_facts(row, "delivered"), lag))

    def _on_rejected(self, row: OutboxRow, reply: Reply, now: float) -> None:
        facts = tuple(_end_facts(row, "rejected"))
        # A refused metric or log is counted; only a refused status leaves the hub with a wrong picture of the run.
        problem = "hub_rejected" if row.kind == "status" else None
        self._settle(row, now, "rejected", reply.outcome, facts, problem=problem)
        if reply.unsendable:
            report("hub", reply.outcome, f"a {row.kind} of model {row.model_id} cannot be sent and was given up")
        elif row.kind == "status" or self._quiet.allows(f"{row.kind} {reply.outcome}"):
            log.error("The hub rejected a %s of model %s with %s.", row.kind, row.model_id, reply.outcome)

    def _on_back_off(self, row: OutboxRow, reply: Reply, now: float) -> None:
        delay = max(self._jitter(row.attempts, MAX_ROW_SECONDS), reply.retry_after or 0.0)
        self._settle(row, now, None, reply.outcome, _retry_facts(row), next_attempt=now + delay)
        if reply.unsendable:
            report("hub", reply.outcome, f"a final status of model {row.model_id} cannot be sent; trying again")
        elif self._quiet.allows(f"{row.model_id} {reply.outcome}"):
            log.warning(
                "The hub answered a %s of model %s with %s; trying again.", row.kind, row.model_id, reply.outcome
            )

    def _on_hub_ill(self, row: OutboxRow, reply: Reply, now: float) -> None:
        # Beyond the next probe, so that it will be another row's, and not long: another process may inherit this one.
        again = self._fell_ill(reply, now) + self._rng.uniform(1.0, MAX_PROBE_SECONDS)
        self._settle(row, now, None, reply.outcome, _retry_facts(row), next_attempt=again)
        if self._quiet.allows(f"ill {reply.outcome}"):
            hint = " Is INTERNAL_SERVICE_KEY right?" if reply.status in (401, 403) else ""
            log.warning("The hub is ill (%s). What it must be told is kept and sent later.%s", reply.outcome, hint)

    _HANDLERS: Mapping[Verdict, Callable[[Dispatcher, OutboxRow, Reply, float], None]] = {
        Verdict.DELIVERED: _on_delivered,
        Verdict.REJECTED: _on_rejected,
        Verdict.BACK_OFF: _on_back_off,
        Verdict.HUB_ILL: _on_hub_ill,
    }

    def _fell_ill(self, reply: Reply, now: float) -> float:
        """Note a vain call. Returns when the hub is asked next."""
        with self._wake:
            illness = self._illness = self._illness or _Illness(now)
            illness.not_before = max(illness.not_before, now + (reply.retry_after or 0.0))
            if illness.probe_at <= now:  # else it is one of the calls that were under way when the hub fell ill
                illness.probe_at = now + self._jitter(illness.failures, MAX_PROBE_SECONDS)
                illness.failures += 1
            illness.probe_at = max(illness.probe_at, illness.not_before)
            return illness.probe_at

    def _recovered(self, now: float) -> None:
        with self._wake:
            illness, self._illness = self._illness, None
        released = self._ledger.release_backoff(now)
        if illness is not None and self._quiet.allows("recovered"):
            log.info("The hub answers again after %.0f s; %d waiting rows are due.", now - illness.since, released)

    def _settle(
        self,
        row: OutboxRow,
        now: float,
        state: str | None,
        outcome: str,
        facts: tuple[Fact, ...],
        *,
        next_attempt: float = 0.0,
        problem: str | None = None,
    ) -> None:
        def settle(facts: tuple[Fact, ...]) -> None:
            self._ledger.settle(
                row, now=now, state=state, outcome=outcome, next_attempt=next_attempt, facts=facts, problem=problem
            )

        try:
            settle(facts)
        except (KeyError, TypeError, ValueError) as error:  # a row too odd to be counted must still be settled
            report("hub", error, "cannot count what became of a row")
            settle(())

    # -- time --------------------------------------------------------------------------------------------------------

    def _time(self, now: float | None) -> float:
        return self._clock() if now is None else now

    def _jitter(self, attempts: int, most: float) -> float:
        ceiling = min(most, FIRST_BACKOFF * 2.0 ** min(attempts, 16))
        return max(MIN_BACKOFF, self._rng.uniform(0.0, ceiling))
