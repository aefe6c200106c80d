"""The embedded bucket stores, refuses with a real 403, and remembers what was asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

from flip_observability.demo.bucket import EmbeddedBucket


@pytest.fixture
def bucket() -> Iterator[EmbeddedBucket]:
    with EmbeddedBucket() as bucket:
        yield bucket


def test_stores_and_gives_back(bucket: EmbeddedBucket, tmp_path: Path) -> None:
    bucket.client().put_object(Bucket="flip-results", Key="demo/a b.zip", Body=b"12345")
    assert [(item.key, item.size) for item in bucket.objects()] == [("demo/a b.zip", 5)]
    assert bucket.download("demo/a b.zip", tmp_path / "x").read_bytes() == b"12345"
    assert bucket.destination == "s3://flip-results/demo"


def test_environment_is_enough_for_boto3(bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    client = boto3.session.Session().client("s3")
    upload = client.create_multipart_upload(Bucket="flip-results", Key="demo/k")["UploadId"]
    assert bucket.unfinished_uploads() == ["demo/k"]
    part = client.upload_part(Bucket="flip-results", Key="demo/k", UploadId=upload, PartNumber=1, Body=b"x" * 1000)
    client.complete_multipart_upload(
        Bucket="flip-results",
        Key="demo/k",
        UploadId=upload,
        MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
    )
    assert bucket.unfinished_uploads() == []
    seen = [(r.action, r.key, r.code) for r in bucket.records if r.action]
    assert seen == [(name, "demo/k", 200) for name in ("create_upload", "part", "complete_upload")]
    assert next(r.size for r in bucket.records if r.action == "part") == 1000


def test_refusing_is_a_403_for_writes_and_can_be_switched(bucket: EmbeddedBucket) -> None:
    bucket.refusing = True
    client = bucket.client()
    with pytest.raises(ClientError) as refused:
        client.create_multipart_upload(Bucket="flip-results", Key="demo/k")
    assert refused.value.response["Error"]["Code"] == "AccessDenied"
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    with pytest.raises(ClientError):
        client.put_object(Bucket="flip-results", Key="demo/k", Body=b"x")
    assert bucket.objects() == []
    assert {r.code for r in bucket.records if r.method in {"PUT", "POST"}} == {403}
    bucket.refusing = False
    client.put_object(Bucket="flip-results", Key="demo/k", Body=b"x")
    assert len(bucket.objects()) == 1


def test_other_credentials_are_refused(bucket: EmbeddedBucket) -> None:
    other = boto3.session.Session().client(
        "s3",
        endpoint_url=bucket.endpoint_url,
        aws_access_key_id="OTHER",
        aws_secret_access_key="x",
        region_name="us-east-1",
    )
    with pytest.raises(ClientError):
        other.list_objects_v2(Bucket="flip-results")


def test_starts_empty_after_an_earlier_one() -> None:
    for _ in range(2):
        with EmbeddedBucket(refusing=False) as bucket:
            assert bucket.objects() == []
            bucket.client().put_object(Bucket="flip-results", Key="k", Body=b"x", ChecksumAlgorithm="CRC32")
            assert bucket.checksum("k").startswith("CRC32 ")
            bucket.refusing = True
