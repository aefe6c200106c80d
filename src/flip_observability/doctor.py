"""What a server needs, checked from the environment that it would have: one finding per check, with what to do.

Nothing is changed that stays: the hub is asked for a model that cannot exist, the bucket gets a probe object that is
deleted again, the ledger a transaction that changes nothing. No finding holds a secret or an exception's message.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flip_observability import _contract
from flip_observability._modes import Private
from flip_observability.component_paths import CLASS_OF, too_wide
from flip_observability.exporter import DEFAULT_HOST, DEFAULT_PORT
from flip_observability.ledger import (
    FILE_NAME,
    NETWORK_FILE_SYSTEMS,
    VOLATILE_FILE_SYSTEMS,
    Ledger,
    LedgerError,
    file_system_of,
)
from flip_observability.log_ids import keep_secrets_out
from flip_observability.settings import Settings, SettingsError
from flip_observability.spool import odd_spools

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

DEADLINE_SECONDS = 20.0
"""For each check; they run at once."""
CALL_SECONDS = 5.0
"""For one call of the hub, or one connection."""
LEAST_FREE_BYTES = 1 << 30
LATE_SECONDS = 300.0
NVFLARE_VERSIONS = re.compile(r"2\.9(\.|$)")
NOBODY = "00000000-0000-0000-0000-000000000000"
_FOREIGN_STATUS = {"2026-05": "RUNNING", "2026-10": "TRAINING_STARTED"}
"""A status that a hub of this contract does not know, and one of the other contract does."""
_OTLP_PORTS = {"grpc": 4317, "http/protobuf": 4318}


class Level(str, Enum):
    """How a check went. Only ``FAIL`` makes the whole fail."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        level: how it went.
        text: what was found, in one line.
        todo: what to do about it; empty when nothing is to be done.
    """

    level: Level
    text: str
    todo: str = ""


@dataclass(frozen=True)
class Report:
    """A finding under its check's name, and how long it took (seconds)."""

    check: str
    finding: Finding
    seconds: float


@dataclass(frozen=True)
class Patient:
    """What is examined.

    Args:
        directory: the ledger's folder.
        host, port: where the exporter is, or would be.
        workspace: the server's workspace or kit, with ``local/resources.json``.
        settings: of the server; None when they cannot be read, and then ``complaint`` says why.
        complaint: what is wrong with the environment.
    """

    directory: Path
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    workspace: Path = field(default_factory=Path)
    settings: Settings | None = None
    complaint: str = ""

    @classmethod
    def from_environment(
        cls, directory: Path, *, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, workspace: Path | None = None
    ) -> Patient:
        """With the settings that the environment gives."""
        where = workspace or Path(os.environ.get("FLIP_SERVER_WORKSPACE") or ".")
        try:
            return cls(directory, host, port, where, Settings.load())
        except SettingsError as error:
            return cls(directory, host, port, where, None, str(error))


Check = Callable[[Patient], Finding]


def examine(patient: Patient, checks: Mapping[str, Check] | None = None) -> list[Report]:
    """Run the checks, all at once, none for longer than :data:`DEADLINE_SECONDS`.

    Args:
        patient: what is examined.
        checks: by name; all of :data:`CHECKS` when None.

    Returns:
        A report for each, in their order. Nothing is raised.
    """
    runs = [_Run(name, check, patient) for name, check in (checks or CHECKS).items()]
    end = time.monotonic() + DEADLINE_SECONDS
    return [run.report(end - time.monotonic()) for run in runs]


class _Run:
    """A check on a daemon thread: what hangs is left behind."""

    def __init__(self, name: str, check: Check, patient: Patient) -> None:
        self._name, self._check, self._patient = name, check, patient
        self._begun = time.monotonic()
        self._report: Report | None = None
        self._thread = threading.Thread(target=self._run, name=f"flip-doctor-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            finding = self._check(self._patient)
        except LedgerError as error:  # its text is ours, or SQLite's
            finding = Finding(Level.FAIL, str(error), "a damaged ledger is set aside by the next run")
        except Exception as error:  # noqa: BLE001 - by type: a check that breaks is a finding, not the end of the others
            finding = Finding(Level.FAIL, f"could not be checked ({type(error).__name__})", "see what it needs")
        self._report = Report(self._name, finding, round(time.monotonic() - self._begun, 3))

    def report(self, timeout: float) -> Report:
        self._thread.join(max(0.0, timeout))
        if self._report is not None:
            return self._report
        late = Finding(
            Level.FAIL, f"no answer within {DEADLINE_SECONDS:.0f} s", "see whether it, or the way there, hangs"
        )
        return Report(self._name, late, round(time.monotonic() - self._begun, 3))


def _needs_settings(check: Callable[[Patient, Settings], Finding]) -> Check:
    def checked(patient: Patient) -> Finding:
        if patient.settings is None:
            return Finding(Level.SKIP, "needs settings that can be read")
        return check(patient, patient.settings)

    return checked


def _needs_ledger(check: Callable[[Ledger], Finding]) -> Check:
    def checked(patient: Patient) -> Finding:
        if not (patient.directory / FILE_NAME).is_file():
            return Finding(Level.SKIP, "there is no ledger yet")
        with Ledger(patient.directory, read_only=True) as ledger:
            return check(ledger)

    return checked


# -- settings and versions ---------------------------------------------------------------------------------------------


def check_settings(patient: Patient) -> Finding:
    """Whether every environment variable can be used."""
    if patient.settings is None:
        return Finding(Level.FAIL, patient.complaint, "mend the variables; the README lists them all")
    if patient.settings.local_dev:
        return Finding(
            Level.WARN,
            "LOCAL_DEV is true: no hub is told, results stay on this machine",
            "for a real server set LOCAL_DEV=false, the hub and the bucket",
        )
    return _contract_finding(patient.settings)


def _contract_finding(settings: Settings) -> Finding:
    text = f"net {settings.net_id}. {_contract.in_words(settings.hub_contract)}"
    version = _contract.installed_flip()
    if version is None or _contract.contract_of(version) == settings.hub_contract:
        return Finding(Level.OK, text)
    return Finding(Level.WARN, text, "unset FLIP_HUB_CONTRACT, unless the hub is of another age than flip-utils")


def check_nvflare(_: Patient) -> Finding:
    """Whether the NVFLARE that is installed is one whose internals are known."""
    try:
        version = importlib.metadata.version("nvflare")
    except importlib.metadata.PackageNotFoundError:
        return Finding(Level.FAIL, "NVFLARE is not installed here", "pip install 'nvflare>=2.9,<2.10'")
    if not NVFLARE_VERSIONS.match(version):
        return Finding(Level.FAIL, f"NVFLARE {version}; 2.9 is needed", "pip install 'nvflare>=2.9,<2.10'")
    return Finding(Level.OK, f"NVFLARE {version}")


def check_allow_list(patient: Patient) -> Finding:
    """Whether jobs without custom code may name our components, and nothing else of ours."""
    local = patient.workspace / "local"
    path = next((p for p in (local / "resources.json", local / "resources.json.default") if p.is_file()), None)
    if path is None:
        return Finding(Level.SKIP, f"no {local}/resources.json", "name the server's kit with --workspace")
    try:
        resources = json.loads(path.read_text(encoding="utf-8"))
        listed, mode = resources.get("class_allow_list"), resources.get("class_list_enforcement_mode", "enforce")
    except (OSError, ValueError, AttributeError) as error:
        return Finding(Level.FAIL, f"{path} cannot be read ({type(error).__name__})", "mend it, or flip-obs install")
    entries = listed if isinstance(listed, list) else []
    wide = ["*"] if "*" in entries else too_wide(entries)
    if wide:
        text = f"{path} lets jobs without custom code run any code of ours: {', '.join(map(json.dumps, wide))}"
        todo = (
            "list the classes that jobs need, and no '*'" if wide == ["*"] else f"flip-obs install {patient.workspace}"
        )
        return Finding(Level.WARN, text, f"{todo}; until then such a job can read and change what the server can")
    if all(entry in entries for entry in CLASS_OF):
        return Finding(Level.OK, f"{path} allows our components, and nothing else of ours")
    level = Level.FAIL if mode == "enforce" else Level.WARN
    todo = f"flip-obs install {patient.workspace}, which puts their paths into class_allow_list"
    return Finding(level, f"{path} does not allow our components: jobs without custom code are refused", todo)


# -- the ledger --------------------------------------------------------------------------------------------------------


def check_ledger(patient: Patient) -> Finding:
    """Whether the ledger's folder is on a disk that can be written, and the ledger can."""
    folder = patient.directory
    if not folder.is_dir():
        return _parent_of(folder)
    kind, free = file_system_of(folder), shutil.disk_usage(folder).free
    return (
        _why_not_written(folder, kind)
        or _why_at_risk(folder, kind, free)
        or Finding(Level.OK, f"{folder} can be written, {free >> 30} GiB left")
    )


def _why_not_written(folder: Path, kind: str) -> Finding | None:
    if kind in NETWORK_FILE_SYSTEMS:
        todo = "set FLIP_OBSERVABILITY_DIR to a folder on a local disk"
        return Finding(Level.FAIL, f"{folder} is on a network file system ({kind})", todo)
    if (problem := _write_probe(folder)) is not None:
        return Finding(Level.FAIL, f"{folder} cannot be written ({problem})", "let the server's user write it")
    if not (folder / FILE_NAME).is_file():
        return None
    if (folder / FILE_NAME).stat().st_uid != os.geteuid():
        return Finding(Level.WARN, f"the ledger in {folder} belongs to another user", "run this as the server's user")
    with Ledger(folder) as ledger:
        ledger.release_observer("")  # a real transaction that changes nothing
    return None


def _why_at_risk(folder: Path, kind: str, free: int) -> Finding | None:
    if free < LEAST_FREE_BYTES:
        return Finding(Level.WARN, f"{folder} has {free >> 20} MiB left", "make room: a full disk stops the history")
    if kind in VOLATILE_FILE_SYSTEMS:
        return Finding(Level.WARN, f"{folder} is on {kind}: it dies with the container", "mount a disk there")
    return None


def _parent_of(folder: Path) -> Finding:
    parent = next((path for path in folder.absolute().parents if path.exists()), Path("/"))
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        return Finding(Level.WARN, f"{folder} is not there yet", "the first run makes it; or is --dir wrong?")
    return Finding(
        Level.FAIL, f"{folder} cannot be made", "set FLIP_OBSERVABILITY_DIR to a folder of the server's user"
    )


def _write_probe(folder: Path) -> str | None:
    probe = folder / f".flip-doctor-{secrets.token_hex(4)}"
    try:
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


def check_leftovers(patient: Patient) -> Finding:
    """Whether something was set aside because it could not be read."""
    kept = [
        path for path in patient.directory.glob(f"{FILE_NAME}.corrupt-*") if not path.name.endswith(("-wal", "-shm"))
    ]
    unread = list(patient.directory.glob("spool-*.unreadable"))
    counts = (
        (len(kept), "damaged ledgers"),
        (len(unread), "unreadable spools"),
        (odd_spools(patient.directory), "entries called like spools that are none"),
    )
    parts = [f"{count} {what}" for count, what in counts if count]
    if not parts:
        return Finding(Level.OK, "nothing was set aside")
    return Finding(
        Level.WARN,
        f"set aside or left alone in {patient.directory}: {', '.join(parts)}",
        "see whether the disk is well; statuses in them may be missing at the hub; then move them away",
    )


def check_modes(patient: Patient) -> Finding:
    """Whether only those can get at ledger, results and the kit's keys who should."""
    places = [
        Private("the ledger's folder", patient.directory),
        Private("the kit's keys in", patient.workspace / "startup", is_for_group=True),
    ]
    if (results := _results_folder(patient.settings)) is not None:
        places.append(Private("the results' folder", results))
    if not any(place.folder.is_dir() for place in places):
        return Finding(Level.SKIP, "neither ledger, nor kit, nor a folder for results is here")
    wrong = [complaint for place in places if (complaint := place.complaint()) is not None]
    if not wrong:
        return Finding(Level.OK, "nobody else can get at ledger, results and keys, by modes and owners")
    return Finding(Level.WARN, "; ".join(text for text, _ in wrong), "; ".join(todo for _, todo in wrong))


def _results_folder(settings: Settings | None) -> Path | None:
    from flip_observability.results import Destination

    return Destination.parse(settings.bucket).directory if settings is not None and settings.bucket else None


def check_observer(ledger: Ledger) -> Finding:
    """Whether somebody looks after the ledger."""
    from flip_observability.process import ProcessIdentity

    now = time.time()
    heartbeat = ledger.observer_heartbeat()
    token, age = (heartbeat[0], now - heartbeat[1]) if heartbeat is not None else ("", 0.0)
    process = ProcessIdentity.from_token(token)
    # One that runs and is silent for long is no live observer any more, but a stopped one, which is worth knowing.
    stopped = age > LATE_SECONDS and process is not None and process.is_alive_as_observer() is True
    if not stopped and ledger.live_observer(now) is None:
        return Finding(
            Level.WARN,
            "no observer: a run whose process dies gets no final status, and no metrics are served",
            "flip-obs install puts one into the server; or run flip-obs serve",
        )
    who = f"process {process.pid}" if process is not None else "a process"
    if age > LATE_SECONDS:
        return Finding(
            Level.FAIL, f"{who} has the ledger and was last heard {age:.0f} s ago", f"is it stopped? End {who}"
        )
    return Finding(Level.OK, f"{who} observes it, last heard {max(0.0, age):.0f} s ago")


def check_outbox(ledger: Ledger) -> Finding:
    """Whether nothing is left that the hub has to be told."""
    refused = ledger.outbox(states=["rejected", "expired"], limit=1_000)
    waiting = ledger.outbox_backlog()
    count, oldest = sum(n for n, _ in waiting.values()), min((at for _, at in waiting.values()), default=time.time())
    age = time.time() - oldest
    texts = [f"{count} messages wait, the oldest for {age:.0f} s"] if count else []
    texts += [f"{len(refused)} were refused or given up"] if refused else []
    if age > LATE_SECONDS:
        return Finding(Level.FAIL, "; ".join(texts), "see the hub's check; flip-obs outbox list shows them")
    if refused:
        return Finding(Level.WARN, "; ".join(texts), "flip-obs outbox list; then retry or drop them")
    return Finding(Level.OK, texts[0] if texts else "nothing is left that the hub has to be told")


def check_errors(ledger: Ledger) -> Finding:
    """Whether parts of ours have failed, or events could not be counted."""
    from flip_observability._fold import load_series

    found = load_series(ledger.metric_state()).get("flip_observability_errors_total", {})
    counts = {key[0]: int(series.total) for key, series in found.items() if series.total}
    if not counts:
        return Finding(Level.OK, "no errors of our own")
    told = ", ".join(f"{component} {count}" for component, count in sorted(counts.items()))
    return Finding(
        Level.WARN, f"errors of our own since the ledger began: {told}", "the server's log has a line for each kind"
    )


# -- the hub -----------------------------------------------------------------------------------------------------------


def check_hub(_: Patient, settings: Settings) -> Finding:
    """Whether the hub is there, takes the key, and speaks the contract. It is asked for what it cannot have.

    A status of the *other* contract for the model id of all zeros: a hub of our contract does not know the word (422),
    whatever it knows of models; another one does not know the model (404). A GET where only PUT is served (405) tells
    that the address is right.
    """
    if settings.local_dev:
        return Finding(Level.SKIP, "LOCAL_DEV: there is no hub")
    if settings.sends_key_in_clear:
        return Finding(
            Level.FAIL,
            f"the service key goes to {settings.hub_url} unencrypted; it was not asked",
            "use https://, or set FLIP_HUB_TRUSTED_NETWORK=true where everybody on the way is trusted",
        )
    foreign = _FOREIGN_STATUS[settings.hub_contract]
    codes: list[int] = []
    for method, path in (
        ("PUT", f"/model/{NOBODY}/status/{foreign}"),
        ("GET", f"/model/{NOBODY}/status/{foreign}"),
        ("PUT", "/model/no-uuid/status/ERROR"),
    ):
        code = _ask_hub(settings, method, path)
        if isinstance(code, Finding):
            return code
        codes.append(code)
    return _judge_hub(settings, codes)


def _judge_hub(settings: Settings, codes: list[int]) -> Finding:
    if codes[0] == 422:
        return Finding(Level.OK, f"the hub at {settings.hub_url} takes the key and speaks {settings.hub_contract}")
    if set(codes) == {404}:
        return Finding(
            Level.FAIL,
            f"{settings.hub_url} knows nothing of models (404)",
            "is FLIP_API_INTERNAL_URL complete? It often ends in /api",
        )
    return Finding(
        Level.WARN,
        f"the hub at {settings.hub_url} takes the key, but does not show that it speaks {settings.hub_contract} "
        f"({', '.join(map(str, codes))})",
        "ask which contract it has, and set FLIP_HUB_CONTRACT",
    )


def _ask_hub(settings: Settings, method: str, path: str) -> int | Finding:
    import requests

    keep_secrets_out()
    with requests.Session() as session:
        session.auth = lambda request: request  # no credentials from a .netrc file
        headers = {
            settings.service_key_header: settings.service_key.get_secret_value(),
            "User-Agent": "flip-observability-doctor",
        }
        try:
            with session.request(
                method,
                settings.hub_url + path,
                headers=headers,
                timeout=CALL_SECONDS,
                allow_redirects=False,
                stream=True,
            ) as response:
                code = response.status_code
        except requests.RequestException as error:
            return _hub_is_out_of_reach(settings, error)
    finding = next((finding for codes, finding in _HUB_ANSWERS if code in codes), None)
    return code if finding is None else Finding(finding.level, f"{finding.text} ({code})", finding.todo)


def _hub_is_out_of_reach(settings: Settings, error: Exception) -> Finding:
    kind = type(error).__name__
    todo = {
        "SSLError": "is its certificate valid? REQUESTS_CA_BUNDLE names the authorities that are trusted",
        "ProxyError": "see HTTPS_PROXY, HTTP_PROXY and NO_PROXY",
    }.get(kind, "is FLIP_API_INTERNAL_URL right, and the way there open?")
    return Finding(Level.FAIL, f"the hub at {settings.hub_url} cannot be reached ({kind})", todo)


_HUB_ANSWERS = (
    (
        range(300, 400),
        Finding(
            Level.FAIL,
            "the hub redirects, and the key is not sent along",
            "set FLIP_API_INTERNAL_URL to where it leads",
        ),
    ),
    (
        (401, 403),
        Finding(
            Level.FAIL,
            "the hub refuses the key",
            "see INTERNAL_SERVICE_KEY and INTERNAL_SERVICE_KEY_HEADER, here and at the hub",
        ),
    ),
    ((429,), Finding(Level.WARN, "the hub asks to be left alone", "try again later; nothing is lost meanwhile")),
    (range(500, 600), Finding(Level.FAIL, "the hub is ill", "tell its people; statuses are kept and sent later")),
)


# -- the bucket --------------------------------------------------------------------------------------------------------


def check_bucket(_: Patient, settings: Settings) -> Finding:
    """Whether results can be written where they belong: a probe is written as results are, read, and deleted."""
    from flip_observability.results import Destination

    destination = Destination.parse(settings.bucket)
    if settings.local_dev:
        return Finding(Level.SKIP, "LOCAL_DEV: results stay on this machine")
    if destination.directory is not None:
        return _check_folder(destination.directory)
    prefix = f"{destination.prefix}/" if destination.prefix else ""
    return _check_s3(destination.bucket, f"{prefix}flip-doctor-{secrets.token_hex(6)}")


def _check_folder(folder: Path) -> Finding:
    if not folder.is_dir():
        return _parent_of(folder)
    problem = _write_probe(folder)
    if problem is not None:
        return Finding(Level.FAIL, f"{folder} cannot be written ({problem})", "let the server's user write it")
    return Finding(Level.OK, f"{folder} can be written")


_BUCKET_TODO = {
    "access_denied": "see the credentials (AWS_*) and the bucket's policy: s3:PutObject, s3:AbortMultipartUpload",
    "no_such_bucket": "see UPLOADED_FEDERATED_DATA_BUCKET and the region",
    "timeout": "is AWS_ENDPOINT_URL_S3 right, and the way there open?",
    "connection": "is AWS_ENDPOINT_URL_S3 right, and the way there open?",
    "checksum": "the bucket does not keep what it is sent: tell its people",
}


def _check_s3(bucket: str, key: str) -> Finding:
    from flip_observability import _multipart

    client = _multipart.make_client()
    probe = secrets.token_bytes(1_000)
    try:
        client.put_object(Bucket=bucket, Key=key, Body=probe)  # at once, or not at all: an upload tries ten times
        verified, warnings = _upload(client, bucket, key, probe)
    except Exception as error:  # noqa: BLE001 - whatever boto3 raises, told by its type or code
        reason, what = _multipart.reason_of(error), _multipart.describe(error)
        with suppress(Exception):
            client.delete_object(Bucket=bucket, Key=key)
        return Finding(
            Level.FAIL, f"s3://{bucket} cannot be written ({what})", _BUCKET_TODO.get(reason, "see the bucket")
        )
    problems = [*([] if verified else warnings), *_read_and_delete(client, bucket, key, probe)]
    if problems:
        todo = f"uploads work. To verify and tidy, allow s3:GetObject and s3:DeleteObject; a probe may be left at {key}"
        return Finding(Level.WARN, f"s3://{bucket} can be written, but {'; '.join(problems)}", todo)
    return Finding(Level.OK, f"s3://{bucket} can be written, verified by CRC32, read and deleted")


def _upload(client: S3Client, bucket: str, key: str, probe: bytes) -> tuple[bool, tuple[str, ...]]:
    from flip_observability._multipart import MultipartUpload

    upload = MultipartUpload(
        client, bucket, key, expected=len(probe), on_upload_id=lambda _: None, on_sent=lambda _: None
    )
    try:
        upload.write(probe)
        _, _, verified, warnings = upload.finish()
    except BaseException:
        upload.abandon()
        raise
    return verified, warnings


def _read_and_delete(client: S3Client, bucket: str, key: str, probe: bytes) -> list[str]:
    from flip_observability import _multipart

    problems = []
    try:
        if client.get_object(Bucket=bucket, Key=key)["Body"].read() != probe:
            problems.append("what is read is not what was written")
    except Exception as error:  # noqa: BLE001 - told by its type or code
        problems.append(f"not read ({_multipart.describe(error)})")
    try:
        client.delete_object(Bucket=bucket, Key=key)
    except Exception as error:  # noqa: BLE001 - told by its type or code
        problems.append(f"not deleted ({_multipart.describe(error)})")
    return problems


# -- traces ------------------------------------------------------------------------------------------------------------


def check_traces(_: Patient) -> Finding:
    """Whether the collector takes spans: a request without any is sent as spans are."""
    endpoint = _first("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Finding(Level.SKIP, "OTEL_SDK_DISABLED: there are no traces")
    if not endpoint:
        return Finding(Level.SKIP, "no OTEL_EXPORTER_OTLP_ENDPOINT: there are no traces")
    protocol = _first("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    if protocol not in _OTLP_PORTS:
        return Finding(Level.FAIL, "OTEL_EXPORTER_OTLP_PROTOCOL is not known", "set it to grpc or http/protobuf")
    problem = _reach(endpoint, _OTLP_PORTS[protocol])
    if problem is not None:
        return problem
    return _export(protocol)


def _first(*names: str) -> str:
    return next((value for name in names if (value := os.environ.get(name, "").strip())), "")


def _reach(endpoint: str, default_port: int) -> Finding | None:
    # gRPC also takes host:port without a scheme.
    try:
        parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        host, port = parts.hostname, parts.port or default_port
    except ValueError:
        host, port, parts = None, default_port, urlsplit("")
    if host is None or parts.scheme not in {"http", "https"}:
        return Finding(Level.FAIL, "OTEL_EXPORTER_OTLP_ENDPOINT is no URL", "it looks like http://127.0.0.1:4317")
    try:
        socket.create_connection((host, port), timeout=CALL_SECONDS).close()
    except OSError as error:
        what = f"the collector at {host}, port {port} cannot be reached ({type(error).__name__})"
        return Finding(Level.FAIL, what, "does it run, and is OTEL_EXPORTER_OTLP_ENDPOINT right?")
    return None


def _export(protocol: str) -> Finding:
    from flip_observability.tracing import TracingError, _exporter, _muted

    try:
        with _muted():
            exporter = _exporter()
            accepted = exporter.export([]).name == "SUCCESS"
    except TracingError as error:
        return Finding(Level.FAIL, str(error), "see the OTEL_* variables")
    if accepted:
        return Finding(Level.OK, f"the collector takes spans by {protocol}")
    return Finding(
        Level.FAIL,
        f"the collector does not take spans by {protocol}",
        "see OTEL_EXPORTER_OTLP_PROTOCOL (grpc mostly on 4317, http/protobuf on 4318), _HEADERS and _CERTIFICATE",
    )


# -- the endpoint ------------------------------------------------------------------------------------------------------


def check_exporter(patient: Patient) -> Finding:
    """Whether ours serves at the exporter's port, or could."""
    host, port = patient.host, patient.port
    where = f"{host}, port {port}"
    if _is_free(host, port):
        return Finding(Level.OK, f"{where} is free: nothing serves there yet")
    for context in (None, _any_certificate()):
        answer = _ask_endpoint(host, port, context)
        if answer is None:
            continue
        index, code, text = answer
        if "flip-observability" not in index:
            break
        if code == 200:
            return Finding(Level.OK, f"ours serves at {where} and is ready")
        return Finding(Level.WARN, f"ours serves at {where} and is not ready: {text}", "see the observer's check")
    return Finding(
        Level.FAIL,
        f"{where} is taken by something else, or lets in only clients with a certificate",
        "give another one with --port, here and to the exporter",
    )


def _is_free(host: str, port: int) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _any_certificate() -> ssl.SSLContext:
    # It is only asked who it is; nothing is told to it.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _ask_endpoint(host: str, port: int, context: ssl.SSLContext | None) -> tuple[str, int, str] | None:
    import http.client

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not listened on, asked

    def get(path: str) -> tuple[int, str]:
        connection: Any = (
            http.client.HTTPConnection(host, port, timeout=CALL_SECONDS)
            if context is None
            else http.client.HTTPSConnection(host, port, timeout=CALL_SECONDS, context=context)
        )
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read(4_096).decode("utf-8", "replace")
        finally:
            connection.close()

    try:
        index = get("/")[1]
        code, text = get("/readyz")
    except (OSError, http.client.HTTPException):
        return None
    return index, code, text.strip()[:200]


CHECKS: Mapping[str, Check] = {
    "settings": check_settings,
    "nvflare": check_nvflare,
    "allow list": check_allow_list,
    "ledger": check_ledger,
    "set aside": check_leftovers,
    "modes": check_modes,
    "observer": _needs_ledger(check_observer),
    "outbox": _needs_ledger(check_outbox),
    "errors": _needs_ledger(check_errors),
    "hub": _needs_settings(check_hub),
    "bucket": _needs_settings(check_bucket),
    "traces": check_traces,
    "exporter": check_exporter,
}
"""Name of a check to what it does, in the order in which they are shown."""
