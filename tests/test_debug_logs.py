"""Debug logs of the libraries that our calls go through: no secret is in them, and nobody else's logs are touched."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from flip_observability.log_ids import LEFT_OUT

UPLOAD = """
import json, logging, logging.config, sys
from pathlib import Path
import boto3.session
from flip_observability import _multipart
from flip_observability.results import Destination, upload_results

log, run_dir, model = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
logging.basicConfig(filename=log, level=logging.DEBUG, force=True)
client = _multipart.make_client()
# As NVFLARE does when a job configures its logging: levels of before are gone, also those of loggers that it names.
logging.config.dictConfig({
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(levelname)s %(name)s %(message)s %(args)s"}},
    "handlers": {"file": {"class": "logging.FileHandler", "filename": str(log), "formatter": "plain"}},
    "loggers": {"botocore": {"level": "DEBUG"}, "urllib3.connectionpool": {"level": "DEBUG"}},
    "root": {"level": "DEBUG", "handlers": ["file"]},
})
logging.getLogger("somebody.else").debug("a line of %s", "theirs")
client.create_bucket(Bucket="results")
upload_results(run_dir, Destination.parse("s3://results/net-1"), model, s3_client=client)
keys = client._request_signer._credentials.get_frozen_credentials()
logging.shutdown()
print(json.dumps([keys.access_key, keys.secret_key, keys.token]))
"""


@pytest.fixture
def moto() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def _run(code: str, *arguments: object, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    return done.stdout


def test_an_upload_by_web_identity_leaves_no_secret_in_a_debug_log(moto: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("CANARY-web-identity-token")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("a line\n" * 1_000)
    log = tmp_path / "log.txt"
    out = _run(
        UPLOAD,
        log,
        tmp_path / "run",
        uuid.uuid4(),
        AWS_ROLE_ARN="arn:aws:iam::123456789012:role/flip",
        AWS_WEB_IDENTITY_TOKEN_FILE=str(token),
        AWS_ENDPOINT_URL_STS=moto,
        AWS_ENDPOINT_URL_S3=moto,
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        AWS_CONFIG_FILE=str(tmp_path / "no-config"),
        AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "no-credentials"),
    )
    access_key, secret_key, session_token = json.loads(out)
    assert access_key.startswith("ASIA"), "STS has given temporary keys"
    written = log.read_text()
    assert "DEBUG somebody.else a line of theirs" in written, "others' debug records are what they were"
    found = [secret for secret in (token.read_text(), access_key, secret_key, session_token) if secret in written]
    assert found == []
    assert f"DEBUG botocore.hooks {LEFT_OUT} ()" in written, "the configuration has put the levels back"


GUARD = """
import logging
from flip_observability import _multipart, _wire, hub, observer, recorder
from flip_observability.log_ids import LEFT_OUT, keep_secrets_out, put_on_records

class Kept(logging.Handler):
    def emit(self, record):
        kept.append(record)

kept = []
logging.basicConfig(level=logging.DEBUG, handlers=[Kept()])
plain = logging.getLogRecordFactory()
assert plain is logging.LogRecord, "an import changes nothing"
logging.getLogger("botocore.hooks").debug("%s", "as it is")
keep_secrets_out()
guard = logging.getLogRecordFactory()
keep_secrets_out()
put_on_records(lambda: None)
assert logging.getLogRecordFactory() is guard, "put on once"
logging.setLogRecordFactory(lambda *a, **k: guard(*a, **k))
around = logging.getLogRecordFactory()
keep_secrets_out()
assert logging.getLogRecordFactory() is around, "still at work inside somebody else's"
for name in ("botocore", "urllib3"):
    logging.getLogger(name).debug("quiet")
for name in ("botocore.hooks", "urllib3", "botocores", "somebody"):
    logging.getLogger(name).setLevel(logging.DEBUG)
    try:
        raise ValueError("a secret")
    except ValueError:
        logging.getLogger(name).debug("%s", "a secret", exc_info=True, stack_info=True)
    logging.getLogger(name).info("%s", "told")
logging.makeLogRecord({"name": "botocore", "levelno": 10, "msg": "from elsewhere"})
logging.setLogRecordFactory(logging.LogRecord)  # somebody has taken ours off
keep_secrets_out()
logging.getLogger("botocore.hooks").debug("%s", "a secret")
found = [(r.name, r.getMessage(), bool(r.exc_info or r.stack_info)) for r in kept]
assert found == [
    ("botocore.hooks", "as it is", False),
    ("botocore.hooks", LEFT_OUT, False), ("botocore.hooks", "told", False),
    ("urllib3", LEFT_OUT, False), ("urllib3", "told", False),
    ("botocores", "a secret", True), ("botocores", "told", False),
    ("somebody", "a secret", True), ("somebody", "told", False),
    ("botocore.hooks", LEFT_OUT, False),
], found
"""


def test_only_debug_records_of_those_libraries_are_emptied() -> None:
    _run(GUARD)


@pytest.mark.parametrize(
    "make",
    [
        "from flip_observability._multipart import make_client; make_client()",
        "from flip_observability._wire import Wire; Wire('http://127.0.0.1:9', {}, 1)",
    ],
)
def test_whoever_makes_a_client_keeps_secrets_out(make: str) -> None:
    after = "import logging; made = logging.getLogRecordFactory()('boto3', 10, '', 0, 'a secret', (), None)"
    code = f"{make}\n{after}\nassert 'secret' not in made.msg.replace('it may hold a secret', ''), made.msg"
    _run(code, AWS_DEFAULT_REGION="us-east-1")
