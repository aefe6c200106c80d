"""The hub is ill, in every way that has been thought of: before END_RUN, in the midst of it, and after it."""

from __future__ import annotations

import datetime
import functools
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from certificates import Authority
from drills.deaths import UPLOADED
from drills.judge import DELAY_SECONDS, FINALS, Drill, Run
from drills.small import SmallSite
from drills.stage import Stage
from fault_server import FaultServer, reset
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.hub import Dispatcher, HubTransport
from flip_observability.ledger import Entry, Ledger, OutboxItem
from flip_observability.settings import Settings

GROUP = "hub"
HOUR = 3_600
ILL_SECONDS = 2.0
"""How long the hub is ill while END_RUN waits for it."""
THOUSAND = 1_000
ENDS = ("RESULTS_UPLOADED", "ERROR", "STOPPED")


@dataclass
class Fault:
    """Something that a hub can have.

    Args:
        name, broken: for the table.
        begin, heal: make it so, and undo it.
    """

    name: str
    broken: str
    begin: Callable[[SmallSite], None]
    heal: Callable[[SmallSite], None] = field(default=lambda site: site.hub.heal())


def phases(
    site: SmallSite, begin: Callable[[SmallSite], None], heal: Callable[[SmallSite], None], *, deaf: bool = True
) -> Sequence[Run]:
    """Three runs: the fault ends before END_RUN, in the midst of it, and when the job's process is long gone.

    ``deaf``: nothing that is said to the hub meanwhile is heard by it.
    """
    before, during, after = (site.job() for _ in range(3))
    site.observer()
    begin(site)
    before.begin().train()
    heal(site)
    runs = [before.run()]
    before.end()
    before.leave()

    during.begin().train()
    begin(site)
    during.tell("end", False)
    time.sleep(ILL_SECONDS)
    heal(site)
    runs.append(during.run())
    during.answer()
    during.leave()

    after.begin().train()
    begin(site)
    after.end()
    after.leave()
    assert not deaf or not after.told, "the hub was not ill at all"
    time.sleep(ILL_SECONDS)
    heal(site)
    return [*runs, after.run()]


def _ill(fault: Fault, stage: Stage) -> Sequence[Run]:
    return _and_wait(phases(stage.small(), fault.begin, fault.heal))


def _and_wait(runs: Sequence[Run]) -> Sequence[Run]:
    """Wait for what the judge will ask for: what stands in front of the hub goes when the drill has been played."""
    for run in runs:
        wait_for_final(run, DELAY_SECONDS + 10)
    return runs


def wait_for_final(run: Run, seconds: float) -> bool:
    """Wait until the hub has a final status of a run."""
    return run.hub.wait(lambda hub: bool(FINALS & set(hub.statuses(run.model_id))), seconds)


# -- what stands in front of a hub -------------------------------------------------------------------------------------


class Front:
    """Hands requests on to the hub, or cuts the answer in its middle. With a certificate, speaks TLS.

    Args:
        authority: that signs its certificate; None for none.
    """

    def __init__(self, authority: Authority | None = None) -> None:
        self.site: SmallSite | None = None
        self.cutting = False
        self._authority = authority
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if authority is not None else None
        self.renew()
        self.server = FaultServer(self._answer, tls=self._tls)

    @property
    def url(self) -> str:
        """What takes the place of the hub's URL."""
        return f"{self.server.url}/api"

    def renew(self, *, expired: bool = False) -> None:
        """Get another certificate; connections that are open keep theirs, so they are cut."""
        if self._authority is None or self._tls is None:
            return
        days = datetime.timedelta(days=-0.5 if expired else 1)
        pair = self._authority.issue("hub", ends_in=days)
        self._tls.load_cert_chain(pair.certificate, pair.key)

    def _answer(self, connection: socket.socket, request: bytes) -> None:
        assert self.site is not None
        host, _, port = self.site.hub.url.removeprefix("http://").removesuffix("/api").partition(":")
        with socket.create_connection((host, int(port)), timeout=20) as hub:
            hub.sendall(request.replace(b"Connection: keep-alive", b"Connection: close"))
            answer = b""
            while chunk := hub.recv(65_536):
                answer += chunk
        if self.cutting:
            connection.sendall(answer[: len(answer) // 3])
            reset(connection, b"")
        connection.sendall(answer)
        raise EOFError  # one request per connection, so that the next one has a handshake of its own


def _cut_in_the_middle(stage: Stage) -> Sequence[Run]:
    front = Front()
    with front.server:
        front.site = stage.small(hub_url=front.url)

        def cut(on: bool, _: SmallSite) -> None:
            front.cutting = on

        on, off = functools.partial(cut, True), functools.partial(cut, False)
        return _and_wait(phases(front.site, on, off, deaf=False))


def _certificate_expired(stage: Stage) -> Sequence[Run]:
    folder = stage.home / "certificates"
    folder.mkdir()
    authority = Authority(folder)
    front = Front(authority)
    with front.server:
        variables = {"REQUESTS_CA_BUNDLE": str(authority.certificate)}
        front.site = stage.small(hub_url=front.url, variables=variables)
        return _and_wait(phases(front.site, lambda _: front.renew(expired=True), lambda _: front.renew()))


def _redirecting(stage: Stage) -> Sequence[Run]:
    with FaultServer(
        lambda connection, _: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    ) as other:
        site = stage.small()
        location = {"Location": f"{other.url}/login"}
        runs = _and_wait(phases(site, lambda b: b.hub.fail_with(307, location), lambda b: b.hub.heal()))
        assert other.connections == 0, "a redirect was followed, and the service key went with it"
    return runs


# -- time --------------------------------------------------------------------------------------------------------------

_HOURS: dict[str, Callable[[EmbeddedHub], None]] = {
    "down": EmbeddedHub.down,
    "500": lambda hub: hub.fail_with(500),
    "403": lambda hub: hub.fail_with(403),
    "404": lambda hub: hub.fail_with(404),
    "429": lambda hub: hub.fail_with(429, {"Retry-After": "10"}),
    "redirecting": lambda hub: hub.fail_with(302, {"Location": "http://127.0.0.1:9/"}),
}


def an_hour(stage: Stage) -> Sequence[Run]:
    """Each fault lasts for an hour of the dispatcher's clock."""
    runs, delays = [], []
    for name, begin in _HOURS.items():
        site = stage.small()
        run, delay = _one_hour(stage, site, begin)
        runs.append(run)
        delays.append(delay)
        assert delay <= DELAY_SECONDS, f"{name}: {delay} s after the hub had recovered"
    stage.notes.append(f"after an hour at most {max(delays)} s of simulated time")
    return runs


def _one_hour(stage: Stage, site: SmallSite, begin: Callable[[EmbeddedHub], None]) -> tuple[Run, int]:
    model_id, run_id, start = str(uuid.uuid4()), str(uuid.uuid4()), time.time()
    with Ledger(site.ledger_dir) as ledger:
        transport = HubTransport(_settings(site))
        dispatcher = Dispatcher(ledger, transport, _settings(site), rng=stage.rng, clock=lambda: start)
        begin(site.hub)
        _write_run(ledger, run_id, model_id, "STOPPED", start)
        for second in range(HOUR):
            dispatcher.run_once(start + second)
        vain = len(site.hub.records)
        site.hub.heal()
        site.hub.up()
        run = Run(model_id, run_id, time.time(), site.hub, lambda _: {}, models=False)
        delay = next(
            (
                s
                for s in range(HOUR)
                if dispatcher.run_once(start + HOUR + s) and "STOPPED" in site.hub.statuses(model_id)
            ),
            HOUR,
        )
        transport.close()
    assert vain < HOUR, f"an ill hub was asked {vain} times in an hour"
    return run, delay


def a_thousand(stage: Stage) -> Sequence[Run]:
    """A thousand runs end while the hub is down."""
    site = stage.small()
    site.hub.down()
    ids = [(str(uuid.uuid4()), str(uuid.uuid4())) for _ in range(THOUSAND)]
    with Ledger(site.ledger_dir) as ledger:
        for number, (run_id, model_id) in enumerate(ids):
            _write_run(ledger, run_id, model_id, ENDS[number % len(ENDS)], time.time())
    site.observer()
    time.sleep(ILL_SECONDS)
    site.hub.up()
    since = time.time()
    return [
        Run(model, run, since, site.hub, lambda _: {}, finals=frozenset({ENDS[number % len(ENDS)]}), models=False)
        for number, (run, model) in enumerate(ids)
    ]


def _write_run(ledger: Ledger, run_id: str, model_id: str, final: str, now: float) -> None:
    row = {"model_id": model_id, "job_id": run_id}
    first = OutboxItem(model_id, "status", {"status": "TRAINING_STARTED"})
    ledger.append(Entry(run_id, now, run=row, outbox=(first,)))
    last = OutboxItem(model_id, "status", {"status": final}, final=True)
    ledger.append(Entry(run_id, now, final_status=final, final_by="drill", outbox=(last,)))


def _settings(site: SmallSite) -> Settings:
    return Settings.model_validate(
        {
            "LOCAL_DEV": False,
            "FLIP_API_INTERNAL_URL": site.hub.url,
            "INTERNAL_SERVICE_KEY": site.hub.key,
            "FLIP_HUB_CONTRACT": site.hub.contract,
            "FLIP_OBSERVABILITY_DIR": Path(site.ledger_dir),
        }
    )


FAULTS = (
    Fault("hub-down", "the hub refuses connections", lambda b: b.hub.down(), lambda b: b.hub.up()),
    Fault("hub-hanging", "the hub takes requests and never answers", lambda b: b.hub.hang()),
    Fault("hub-500", "the hub answers 500", lambda b: b.hub.fail_with(500)),
    Fault("hub-404", "the hub does not know the model", lambda b: b.hub.fail_with(404)),
    Fault("hub-403", "the hub refuses the key", lambda b: b.hub.fail_with(403)),
    Fault("hub-429", "the hub wants to be left alone", lambda b: b.hub.fail_with(429, {"Retry-After": "3"})),
)

DRILLS: tuple[Drill, ...] = (
    *(
        Drill(
            fault.name,
            GROUP,
            fault.broken,
            functools.partial(_ill, fault),
            UPLOADED,
            True,
            quick=fault.name == "hub-500",
        )
        for fault in FAULTS
    ),
    Drill("hub-redirecting", GROUP, "the hub redirects elsewhere", _redirecting, UPLOADED, True),
    Drill("hub-reset", GROUP, "the hub's answers are cut in their middle", _cut_in_the_middle, UPLOADED, True),
    Drill("hub-certificate", GROUP, "the hub's TLS certificate has expired", _certificate_expired, UPLOADED, True),
    Drill("hub-hour", GROUP, "each of them for an hour of simulated time", an_hour, frozenset({"STOPPED"})),
    Drill("hub-thousand", GROUP, "the hub is down while 1,000 runs end", a_thousand, frozenset(ENDS)),
)
