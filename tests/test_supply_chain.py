"""What looks up images and vulnerabilities says what it was told, and never that all is well when told nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from scripts import audit, digests

ROOT = Path(__file__).resolve().parent.parent
DIGEST = f"sha256:{'0123456789abcdef' * 4}"


@contextmanager
def registry(digest: str | None, *, tokens: bool) -> Iterator[str]:
    """A registry of images, as the specification of their distribution has it; it gives its host and port."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            told = self.headers["Authorization"]
            if "image.index" not in self.headers["Accept"]:
                self.send_response(406)
            elif tokens and told != "Bearer t0ken":
                self.send_response(401)
                realm = f"http://127.0.0.1:{server.server_port}/token"
                scope = "repository:library/python:pull"
                self.send_header("WWW-Authenticate", f'Bearer realm="{realm}",service="images",scope="{scope}"')
            elif self.path == "/v2/library/python/manifests/3.12":
                self.send_response(200)
                if digest is not None:
                    self.send_header("Docker-Content-Digest", digest)
            else:
                self.send_response(404)
            self.end_headers()

        def do_GET(self) -> None:
            wanted = "/token?service=images&scope=repository%3Alibrary%2Fpython%3Apull"
            self.send_response(200 if self.path == wanted else 400)
            self.end_headers()
            self.wfile.write(json.dumps({"token": "t0ken"}).encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("python:3.12.11-slim", (digests.HUB, "library/python", "3.12.11-slim")),
        ("prom/prometheus:v3.5.0", (digests.HUB, "prom/prometheus", "v3.5.0")),
        ("registry.example/a/b:1", ("registry.example", "a/b", "1")),
        ("localhost:5000/b:1", ("localhost:5000", "b", "1")),
        (f"busybox:1.37.0@{DIGEST}", (digests.HUB, "library/busybox", "1.37.0")),
    ],
)
def test_an_image_is_looked_for_where_its_name_says(name: str, parts: tuple[str, str, str]) -> None:
    assert digests.Image.parse(name) == parts


@pytest.mark.parametrize("tokens", [False, True])
def test_the_digest_is_the_registrys(tokens: bool) -> None:
    with registry(DIGEST, tokens=tokens) as host:
        assert digests.digest_of(digests.Image(host, "library/python", "3.12"), "http") == DIGEST
        with pytest.raises(digests.LookupFailedError, match="Not Found"):
            digests.digest_of(digests.Image(host, "library/python", "2.7"), "http")


@pytest.mark.parametrize("told", [None, "sha256:short", "latest"])
def test_no_digest_is_made_up(told: str | None) -> None:
    with registry(told, tokens=False) as host, pytest.raises(digests.LookupFailedError, match="tells no digest"):
        digests.digest_of(digests.Image(host, "library/python", "3.12"), "http")


def test_without_a_registry_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(digests, "HUB", "127.0.0.1:9")
    monkeypatch.setattr(sys, "argv", ["digests.py"])
    before = [(ROOT / name).read_bytes() for name in digests.FILES]
    assert digests.main() == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "python:3.12.11-slim-bookworm: 127.0.0.1:9 cannot be asked" in told.err
    assert told.err.endswith("7 are not known; none was made up\n")
    assert before == [(ROOT / name).read_bytes() for name in digests.FILES]


def test_what_was_found_is_pinned_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in digests.FILES:
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(digests, "ROOT", tmp_path)
    monkeypatch.setattr(digests, "digest_of", lambda image: DIGEST)
    monkeypatch.setattr(sys, "argv", ["digests.py", "--write"])
    for _ in range(2):  # what is pinned already is looked up by its name again
        assert digests.main() == 0
        assert f"ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm@{DIGEST}\n" in (tmp_path / "Dockerfile").read_text()
        text = "".join((tmp_path / name).read_text() for name in digests.FILES)
        assert text.count(DIGEST) == 7


# -- vulnerabilities ---------------------------------------------------------------------------------------------------

KNOWN = {"name": "requests", "version": "2.34.2", "vulns": []}
BAD = {"name": "urllib3", "version": "2.0.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.0.1"]}]}
UNTOLD = {"name": "boto3", "skip_reason": "Dependency not found on PyPI and could not be audited: boto3 (1)"}


@pytest.mark.parametrize(
    ("answer", "code", "text"),
    [
        (json.dumps({"dependencies": [KNOWN]}), audit.CLEAN, "nothing is known about its 1 packages"),
        (json.dumps({"dependencies": [KNOWN, BAD, UNTOLD]}), audit.VULNERABLE, "urllib3 2.0.0: CVE-1 (fixed in 2.0.1)"),
        (json.dumps({"dependencies": [KNOWN, UNTOLD]}), audit.UNKNOWN, "knows nothing about 1 of 2 packages"),
        (json.dumps({"dependencies": []}), audit.UNKNOWN, "knows nothing"),
        ("", audit.UNKNOWN, "no answer"),
        ("[]", audit.UNKNOWN, "no answer"),
    ],
)
def test_an_answer_that_is_missing_is_no_good_news(answer: str, code: int, text: str) -> None:
    verdict = audit.judge_packages("requirements/run.txt", answer)
    assert verdict.code == code
    assert text in verdict.text


def test_without_the_programs_an_audit_says_so(tmp_path: Path) -> None:
    environment = os.environ | {"PIP_AUDIT": str(tmp_path / "none"), "GO": str(tmp_path / "none")}
    command = [sys.executable, str(ROOT / "scripts" / "audit.py")]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == audit.UNKNOWN
    assert "there is no pip-audit here" in told.stderr
    assert "there is no Go here" in told.stderr
