"""What docs/security.md says: its tests exist, and its policies are what is needed, on an S3 that enforces them."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3.session
import pytest
import requests

from flip_observability import _multipart
from flip_observability._kit import Kit
from flip_observability.doctor import CHECKS, Finding, Level, Patient, examine
from flip_observability.results import Destination, Receipt, ResultsUploadError, abort_upload, upload_results
from flip_observability.salvage import RunDirectory, salvage
from flip_observability.settings import Settings
from s3_faults import Fault, FaultProxy, error

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

REPOSITORY = Path(__file__).resolve().parent.parent
TEXT = (REPOSITORY / "docs" / "security.md").read_text(encoding="utf-8")
POLICY, LIFECYCLE = (json.loads(body) for body in re.findall(r"^```json\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
BUCKET, DESTINATION = "flip-results", Destination.parse("s3://flip-results/net-1")
MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"
REGION = "us-east-1"

ACTION_OF = {
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "PutObject": "s3:PutObject",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DELETE": "s3:DeleteObject",
}
"""A call to what IAM calls the right to make it."""

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


# -- names -------------------------------------------------------------------------------------------------------------


def test_the_tests_that_are_named_exist() -> None:
    named = set(re.findall(r"`(tests/\w+\.py)::(\w+)`", TEXT))
    assert len(named) > 30
    for file in {file for file, _ in named}:
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert {name for where, name in named if where == file} <= functions, file


def test_every_claim_of_the_table_names_a_test() -> None:
    table = TEXT.partition("| never | shown by |\n")[2].partition("\n\n")[0].splitlines()[1:]
    assert len(table) > 8
    assert [row for row in table if "::test_" not in row] == []


def test_everybody_that_is_trusted_with_something_has_a_test_where_it_ends() -> None:
    table = TEXT.partition("| who | is trusted with |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) > 9
    assert [row for row in table if "::test_" not in row] == []


def test_the_settings_that_are_named_exist() -> None:
    ours = {str(field.alias) for field in Settings.model_fields.values()}
    named = set(re.findall(r"`([A-Z][A-Z_]{5,})(?:=\w+)?`", TEXT))
    foreign = {"REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "OTEL_EXPORTER_OTLP_ENDPOINT"}
    assert named - foreign <= ours
    assert {"UPLOADED_FEDERATED_DATA_BUCKET", "FLIP_CAPTURE_EXCEPTION_MESSAGES"} <= named


# -- the bucket --------------------------------------------------------------------------------------------------------


class Enforcing:
    """moto in a process of its own, which lets nobody do what no policy allows, with a proxy that sees every call."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.proxy = FaultProxy(("127.0.0.1", port))
        self._checks(10**9)
        self.root().create_bucket(Bucket=BUCKET)

    def root(self) -> S3Client:
        return self._session("root", "root").client("s3", endpoint_url=self.url)

    def allow(self, statements: list[dict[str, Any]]) -> tuple[str, str]:
        """Make a user with these rights. Returns id and secret of its key; from now on they are enforced."""
        self._checks(10**9)
        iam = self._session("root", "root").client("iam", endpoint_url=self.url)
        name = f"server-{uuid.uuid4().hex[:8]}"
        iam.create_user(UserName=name)
        document = json.dumps({"Version": "2012-10-17", "Statement": statements})
        iam.put_user_policy(UserName=name, PolicyName="flip", PolicyDocument=document)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        self._checks(0)
        return key["AccessKeyId"], key["SecretAccessKey"]

    def stored(self) -> list[str]:
        """What is in the bucket; nothing is enforced any more."""
        self._checks(10**9)
        return [item["Key"] for item in self.root().list_objects_v2(Bucket=BUCKET).get("Contents", [])]

    def unfinished(self) -> list[str]:
        self._checks(10**9)
        return [item["Key"] for item in self.root().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]

    def _checks(self, after: int) -> None:
        requests.post(f"{self.url}/moto-api/reset-auth", data=str(after), timeout=10).raise_for_status()

    @staticmethod
    def _session(key: str, secret: str) -> boto3.session.Session:
        return boto3.session.Session(aws_access_key_id=key, aws_secret_access_key=secret, region_name=REGION)


@pytest.fixture(scope="module")
def process() -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline())
        finally:
            with suppress(OSError):
                server.stdin.close()
            server.kill()


@pytest.fixture
def s3(process: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Enforcing]:
    monkeypatch.setattr(_multipart, "PATIENCE", _multipart.Patience(first_pause=0.001, longest_pause=0.005))
    requests.post(f"http://127.0.0.1:{process}/moto-api/reset-auth", data=str(10**9), timeout=10)
    requests.post(f"http://127.0.0.1:{process}/moto-api/reset", timeout=10)
    s3 = Enforcing(process)
    yield s3
    s3.proxy.stop()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.txt").write_text("a line\n" * 1000)
    return folder


class Server:
    """All that a server does with its bucket."""

    def __init__(self, s3: Enforcing, statements: list[dict[str, Any]], patch: pytest.MonkeyPatch) -> None:
        self._proxy = s3.proxy
        key, secret = s3.allow(statements)
        told = {
            "AWS_ENDPOINT_URL_S3": s3.proxy.url,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "LOCAL_DEV": "false",
            "INTERNAL_SERVICE_KEY": "k",
            "UPLOADED_FEDERATED_DATA_BUCKET": "s3://flip-results/net-1",
        }
        for name, value in told.items():
            patch.setenv(name, value)

    def upload(self, run_dir: Path) -> Receipt:
        return upload_results(run_dir, DESTINATION, MODEL)

    def salvage(self, run_dir: Path) -> Receipt:
        return salvage(RunDirectory(run_dir, Kit(run_dir.parent)), DESTINATION, MODEL)

    def fail(self, run_dir: Path) -> None:
        """An upload that is given up and aborted."""
        self._proxy.faults.append(Fault("UploadPart", error(403, "AccessDenied"), times=1))
        with pytest.raises(ResultsUploadError):
            self.upload(run_dir)

    def die(self, run_dir: Path) -> None:
        """One whose process is killed, and that another aborts later."""
        told: list[tuple[str, str]] = []
        unable = Fault("AbortMultipartUpload", error(403, "AccessDenied"), times=1)
        self._proxy.faults += [Fault("UploadPart", error(403, "AccessDenied"), times=1), unable]
        with pytest.raises(ResultsUploadError):
            upload_results(run_dir, DESTINATION, MODEL, on_multipart=lambda key, upload: told.append((key, upload)))
        abort_upload(DESTINATION, *told[-1])

    def doctor(self) -> Finding:
        return examine(Patient.from_environment(Path("/nowhere")), {"bucket": CHECKS["bucket"]})[0].finding


def granted() -> list[dict[str, Any]]:
    """The statements that allow something, as a policy of the role has them."""
    allowing = [dict(statement) for statement in POLICY["Statement"] if statement["Effect"] == "Allow"]
    for statement in allowing:
        del statement["Principal"]
    return allowing


def actions(statement: dict[str, Any]) -> list[str]:
    found = statement["Action"]
    return [found] if isinstance(found, str) else list(found)


def test_the_policy_is_enough_and_nothing_in_it_is_too_much(
    s3: Enforcing, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(s3, granted(), monkeypatch)
    receipts = [server.upload(run_dir), server.salvage(run_dir)]
    server.fail(run_dir)
    server.die(run_dir)
    finding = server.doctor()
    assert [receipt.verified for receipt in receipts] == [True, True]
    assert finding.level is Level.OK
    assert {DESTINATION.uri(key) for key in s3.stored()} == {receipt.uri for receipt in receipts}
    assert s3.unfinished() == []
    # Everything that is allowed was needed, and nothing else was asked for.
    used = {ACTION_OF[operation] for operation in s3.proxy.seen}
    assert used == {action for statement in granted() for action in actions(statement)}


def test_results_cannot_be_deleted_or_listed_and_others_not_be_reached(
    s3: Enforcing, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(s3, granted(), monkeypatch)
    key = server.upload(run_dir).uri.removeprefix(f"s3://{BUCKET}/")
    client = _multipart.make_client()
    for call, more in (
        ("delete_object", {"Key": key}),
        ("list_objects_v2", {}),
        ("list_multipart_uploads", {}),
        ("get_bucket_policy", {}),
        ("get_object", {"Key": "net-2/x.zip"}),
        ("put_object", {"Key": "net-2/x.zip", "Body": b"x"}),
    ):
        with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
            getattr(client, call)(Bucket=BUCKET, **more)
    assert s3.stored() == [key]


@pytest.mark.parametrize("taken", sorted({action for statement in granted() for action in actions(statement)}))
def test_every_right_is_missed_when_it_is_taken_away(
    taken: str, s3: Enforcing, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    less = []
    for statement in granted():
        left = [action for action in actions(statement) if action != taken]
        less += [statement | {"Action": left}] if left else []
    server = Server(s3, less, monkeypatch)
    if taken == "s3:PutObject":
        with pytest.raises(ResultsUploadError) as caught:
            server.upload(run_dir)
        assert caught.value.reason == "access_denied"
        assert server.doctor().level is Level.FAIL
    elif taken == "s3:AbortMultipartUpload":
        server.fail(run_dir)
        assert len(s3.unfinished()) == 1
    else:
        assert server.upload(run_dir).verified == (taken != "s3:GetObject")
        assert server.doctor().level is Level.WARN
        assert "allow s3:GetObject and s3:DeleteObject" in server.doctor().todo


def test_s3_takes_both_documents(s3: Enforcing) -> None:
    client = s3.root()
    client.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(POLICY))
    assert json.loads(client.get_bucket_policy(Bucket=BUCKET)["Policy"]) == POLICY
    client.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=LIFECYCLE)
    (rule,) = client.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    assert rule["Status"] == "Enabled"


def test_the_documents_speak_of_one_place() -> None:
    (rule,) = LIFECYCLE["Rules"]
    assert rule["Filter"]["Prefix"] == f"{DESTINATION.prefix}/"
    for statement in granted():
        assert statement["Resource"].startswith(f"arn:aws:s3:::{BUCKET}/{DESTINATION.prefix}/")
    assert "FOLLOW_UP_SECONDS = 72 * 3_600" in (REPOSITORY / "src/flip_observability/salvager.py").read_text()
