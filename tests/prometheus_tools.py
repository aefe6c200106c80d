"""Real Prometheus, Alertmanager, promtool and amtool for tests: found, started on free ports, asked, stopped by pid."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pytest

from waiting import free_port, wait_for

REPOSITORY = Path(__file__).resolve().parent.parent
FETCH = REPOSITORY / "scripts" / "fetch-prometheus.sh"
PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "prometheus": ("prometheus",),
    "promtool": ("promtool",),
    "alertmanager": ("alertmanager", "prometheus-alertmanager"),
    "amtool": ("amtool",),
}
"""A program, and the names that it goes by."""
START_SECONDS = 60.0
Server = TypeVar("Server", bound="_Process")


def cache() -> Path:
    """The folder that the fetching script unpacks into."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "flip-observability" / "prometheus"


def find(program: str) -> Path | None:
    """Where ``prometheus``, ``promtool``, ``alertmanager`` or ``amtool`` is: on the PATH or in the cache."""
    for name in PROGRAMS[program]:
        for folders in (None, str(cache() / "usr" / "bin")):
            if found := shutil.which(name, path=folders):
                return Path(found)
    return None


def require(program: str) -> Path:
    """The same; a test that needs what is not there skips and says how to get it."""
    if (found := find(program)) is None:
        pytest.skip(f"{program} is not installed; scripts/{FETCH.name} fetches it on Debian and Ubuntu")
    return found


def run_tool(program: str, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``promtool`` or ``amtool`` to its end. Its exit code and output are the caller's to judge."""
    command = [str(require(program)), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


class _Process:
    """A server on a free port, with a folder of its own that outlives a restart."""

    program: str
    ready_path = "/-/ready"

    def __init__(self) -> None:
        self._binary = require(self.program)
        self.folder = Path(tempfile.mkdtemp(prefix=f"flip-{self.program}-"))
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def arguments(self) -> Sequence[str]:
        raise NotImplementedError

    def start(self: Server) -> Server:
        """Start, and return when it answers. Again after :meth:`stop`: the same port, the same data."""
        for _ in range(3):
            self._spawn()
            if self._answers():
                return self
            # Somebody else has taken the port in the meantime, or the configuration is wrong: the log tells.
            if "address already in use" not in self.log:
                break
            self.port = free_port()
        log = self.log
        self.close()
        raise AssertionError(f"{self.program} does not start:\n{log[-3_000:]}")

    def _spawn(self) -> None:
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(self._binary), *self.arguments()],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _answers(self) -> bool:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            assert self._process is not None
            if self._process.poll() is not None:
                return False
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}{self.ready_path}", timeout=2):
                return self._process.poll() is None
            time.sleep(0.05)
        return False

    def stop(self) -> None:
        """End it, and wait until it has gone. What it stored stays."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)

    def close(self) -> None:
        """End it and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self: Server) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, path: str, **parameters: object) -> Any:
        """The ``data`` of an answer of the HTTP API (what is answered, where it has no envelope).

        Raises:
            AssertionError: the server did not like the question; with what it said.
        """
        query = urllib.parse.urlencode({name: value for name, value in parameters.items() if value is not None}, True)
        try:
            with urllib.request.urlopen(f"{self.url}{path}?{query}", timeout=30) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode(errors='replace')}") from None
        return answer["data"] if isinstance(answer, dict) and "data" in answer else answer


class Prometheus(_Process):
    """A real Prometheus, with exemplar storage.

    Args:
        targets: ``host:port`` of what it scrapes, all of one job; or targets with the labels to put on them.
        rules: rule files.
        alertmanagers: ``host:port`` of them.
        scrape_interval: also the interval at which rules are evaluated, unless ``evaluation_interval`` is given.
        job: the name of the scrape job.
        limits: further settings of the scrape job.
        external_labels: what it adds to alerts that it sends.
        scheme: ``http`` or ``https``.
        tls: Prometheus' ``tls_config`` for ``https``.
    """

    program = "prometheus"

    def __init__(
        self,
        targets: Sequence[str] | Mapping[str, Mapping[str, str]] = (),
        *,
        rules: Sequence[Path] = (),
        alertmanagers: Sequence[str] = (),
        scrape_interval: str = "1s",
        evaluation_interval: str | None = None,
        job: str = "flip-observability",
        external_labels: Mapping[str, str] | None = None,
        scheme: str = "http",
        tls: Mapping[str, object] | None = None,
        limits: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        labels = targets if isinstance(targets, Mapping) else {target: {} for target in targets}
        scrape: dict[str, Any] = {
            "job_name": job,
            "scheme": scheme,
            "static_configs": [{"targets": [target], "labels": dict(own)} for target, own in labels.items()],
        }
        if tls is not None:
            scrape["tls_config"] = dict(tls)
        scrape |= limits or {}
        config = {
            "global": {
                "scrape_interval": scrape_interval,
                "scrape_timeout": scrape_interval,
                "evaluation_interval": evaluation_interval or scrape_interval,
                "external_labels": dict(external_labels or {}),
            },
            "scrape_configs": [scrape],
            "rule_files": [str(path) for path in rules],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": list(alertmanagers)}]}]},
            "storage": {"exemplars": {"max_exemplars": 10_000}},
        }
        # JSON is YAML.
        (self.folder / "prometheus.yml").write_text(json.dumps(config, indent=1))

    def arguments(self) -> Sequence[str]:
        return (
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address={self.address}",
            f"--web.external-url={self.url}",
            "--enable-feature=exemplar-storage",
            "--log.level=warn",
        )

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """An instant vector: ``[{"metric": {labels}, "value": [time, "text"]}]``. A scalar gives one without labels."""
        data = self.get("/api/v1/query", query=expression, time=at)
        if data["resultType"] in ("scalar", "string"):
            return [{"metric": {}, "value": data["result"]}]
        return list(data["result"])

    def value(self, expression: str, at: float | None = None) -> float | None:
        """The one value of an expression; None when there is no series.

        Raises:
            AssertionError: there are several.
        """
        found = self.query(expression, at)
        assert len(found) <= 1, f"{expression}: {found}"
        return float(found[0]["value"][1]) if found else None

    def query_range(self, expression: str, start: float, end: float, step: float = 1.0) -> list[dict[str, Any]]:
        """A range: ``[{"metric": {labels}, "values": [[time, "text"], …]}]``."""
        data = self.get("/api/v1/query_range", query=expression, start=start, end=end, step=step)
        return list(data["result"])

    def exemplars(self, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        """``[{"seriesLabels": {…}, "exemplars": [{"labels": {…}, "value": …, "timestamp": …}]}]``."""
        return list(self.get("/api/v1/query_exemplars", query=expression, start=start, end=end))

    def series(self, *selectors: str) -> list[dict[str, str]]:
        """The labels of the series that match, of all times."""
        return list(self.get("/api/v1/series", **{"match[]": list(selectors)}))

    def label_values(self, label: str, *selectors: str) -> list[str]:
        return list(self.get(f"/api/v1/label/{label}/values", **{"match[]": list(selectors) or None}))

    def alerts(self, name: str | None = None) -> list[dict[str, Any]]:
        """Active alerts: ``labels``, ``annotations``, ``state`` (pending or firing), ``activeAt``, ``value``."""
        found = self.get("/api/v1/alerts")["alerts"]
        return [alert for alert in found if name in (None, alert["labels"]["alertname"])]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.get("/api/v1/rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[dict[str, Any]]:
        return list(self.get("/api/v1/targets")["activeTargets"])

    def wait_for_scrape(self, seconds: float = 30.0) -> None:
        """Wait until every target has been scraped well, by a scrape that began after this call."""
        begin = time.time()

        def fresh() -> bool:
            targets = self.targets()
            return bool(targets) and all(
                target["health"] == "up" and _seconds(target["lastScrape"]) > begin for target in targets
            )

        wait_for(fresh, seconds, "a good scrape of every target")


class Alertmanager(_Process):
    """A real Alertmanager, without a cluster.

    Args:
        config: the text of its configuration.
    """

    program = "alertmanager"

    def __init__(self, config: str) -> None:
        super().__init__()
        (self.folder / "alertmanager.yml").write_text(config)

    def arguments(self) -> Sequence[str]:
        return (
            f"--config.file={self.folder / 'alertmanager.yml'}",
            f"--storage.path={self.folder / 'data'}",
            f"--web.listen-address={self.address}",
            "--cluster.listen-address=",
            "--log.level=warn",
        )

    def alerts(self) -> list[dict[str, Any]]:
        """What it holds, muted or not: ``labels``, ``annotations``, ``status``, ``receivers``."""
        return list(self.get("/api/v2/alerts"))

    def post(self, alerts: Sequence[Mapping[str, Any]]) -> None:
        """Give it alerts, as Prometheus does."""
        request = urllib.request.Request(
            f"{self.url}/api/v2/alerts",
            data=json.dumps(list(alerts)).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30):
            pass


class Webhook:
    """A receiver of Alertmanager's notifications. ``path`` tells which receiver of the configuration it came from."""

    def __init__(self) -> None:
        self._received: list[tuple[str, dict[str, Any]]] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with outer._lock:
                    outer._received.append((self.path, json.loads(body)))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class' name
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def notifications(self, path: str | None = None) -> list[dict[str, Any]]:
        """Alertmanager's messages in the order of their arrival; all, or those to one path."""
        with self._lock:
            return [message for where, message in self._received if path in (None, where)]

    def __enter__(self) -> Webhook:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@contextlib.contextmanager
def static_page(text: Callable[[], str], port: int = 0) -> Iterator[str]:
    """A ``/metrics`` that serves what ``text`` returns; gives its ``host:port``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class' name
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def _seconds(text: str) -> float:
    """RFC 3339 with nanoseconds, as Prometheus writes it, in seconds since the epoch."""
    found = re.fullmatch(r"(.*:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)", text)
    assert found, text
    moment, fraction, zone = found.groups("0")
    return datetime.fromisoformat(moment + zone.replace("Z", "+00:00")).timestamp() + float(fraction)
