"""Results on their way to a bucket: ours beside FLIP's way (archive on disk, then upload) and the wire.

The endpoint takes parts, checks their CRC-32 as S3 does, and throws them away, so that the sender is measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from benchmarks.measure import ROOT, Effort, Figure, child, environment, single, spread, turns
from flip_observability import _crc32, _multipart
from flip_observability.results import Destination, upload_results

BUCKET = "results"
MODEL_ID = "0f8fad5b-d9cb-469f-a165-70867728950e"
MIB = 1024 * 1024


@contextlib.contextmanager
def endpoint() -> Iterator[str]:
    """A process that is an S3 endpoint for multipart uploads."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "s3_sink.py"), "0", "lenient"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.terminate()
        process.wait()


def bucket_environment(url: str) -> contextlib.AbstractContextManager[None]:
    """What boto3's own chain needs to find the endpoint."""
    return environment(
        AWS_ENDPOINT_URL_S3=url,
        AWS_ACCESS_KEY_ID="benchmark",
        AWS_SECRET_ACCESS_KEY="benchmark",
        AWS_DEFAULT_REGION="eu-west-2",
        NO_PROXY="127.0.0.1",
    )


def write_run(run_dir: Path, weights_mib: int, log_mib: int) -> None:
    """A run directory as a job leaves it: weights that do not compress, and logs that do."""
    app = run_dir / "app_server"
    app.mkdir(parents=True)
    rng = np.random.default_rng(7)
    with (app / "FL_global_model.pt").open("wb") as file:
        for _ in range(weights_mib // 16):
            rng.standard_normal(4 * MIB, dtype=np.float32).tofile(file)
    line = "2026-01-01 12:00:00,{:03d} - Fed - INFO - [identity=server, run=…]: round {} result from site-{}\n"
    text = "".join(line.format(n % 1000, n % 60, n % 7) for n in range(20_000))
    with (run_dir / "log.txt").open("w", encoding="utf-8") as log:
        for _ in range(max(1, log_mib * MIB // len(text.encode()))):
            log.write(text)


def theirs(run_dir: Path, url: str) -> float:
    """FLIP's own way. The archive holds what ours holds: the run directory's files, each once."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        archive = shutil.make_archive(str(Path(scratch) / "results"), "zip", run_dir)
        client = boto3.client("s3", endpoint_url=url)
        client.upload_file(archive, BUCKET, f"{MODEL_ID}/results.zip", Config=TransferConfig(use_threads=True))
        seconds = time.perf_counter() - begun
        with zipfile.ZipFile(archive) as held:
            names = {name for name in held.namelist() if not name.endswith("/")}
    assert names == {"app_server/FL_global_model.pt", "log.txt"}, names
    return seconds


def ours(run_dir: Path) -> float:
    """Packed and sent at once."""
    begun = time.perf_counter()
    receipt = upload_results(run_dir, Destination.parse(f"s3://{BUCKET}"), MODEL_ID)
    seconds = time.perf_counter() - begun
    assert receipt.verified, "the endpoint did not confirm size and checksum"
    assert receipt.files == 2, receipt
    return seconds


def bare(parts: list[bytes], url: str) -> float:
    """The same number of bytes from memory, in parts as large and as many at once as ours: the wire's own time.

    Like ours it begins as in a new process, with a session of its own.
    """
    begun = time.perf_counter()
    client: Any = boto3.session.Session().client("s3", endpoint_url=url, config=Config(max_pool_connections=16))
    upload = client.create_multipart_upload(Bucket=BUCKET, Key="bare", ChecksumAlgorithm="CRC32")["UploadId"]
    crc = 0

    def send(numbered: tuple[int, bytes]) -> int:
        number, part = numbered
        value = zlib.crc32(part)
        client.upload_part(
            Bucket=BUCKET, Key="bare", UploadId=upload, PartNumber=number, Body=part, ChecksumCRC32=_crc32.text(value)
        )
        return value

    with ThreadPoolExecutor(_multipart._MAX_IN_FLIGHT) as pool:
        for part, value in zip(parts, pool.map(send, enumerate(parts, 1)), strict=True):
            crc = _crc32.combine(crc, value, len(part))
    listed = [{"PartNumber": number, "ETag": "e"} for number in range(1, len(parts) + 1)]
    client.complete_multipart_upload(
        Bucket=BUCKET,
        Key="bare",
        UploadId=upload,
        ChecksumCRC32=_crc32.text(crc),
        ChecksumType="FULL_OBJECT",
        MpuObjectSize=sum(map(len, parts)),
        MultipartUpload={"Parts": listed},
    )
    return time.perf_counter() - begun


HUGE = """
import os, sys, threading, tempfile, time, json
from pathlib import Path
import psutil
from flip_observability.results import Destination, upload_results
run_dir, temp = Path(sys.argv[1]), Path(sys.argv[2])
upload_results(Path(sys.argv[3]), Destination.parse("s3://results"), "0f8fad5b-d9cb-469f-a165-70867728950e")
me, peak, over, left = psutil.Process(), [0], threading.Event(), [0]
before = me.memory_info().rss
def watch():
    while not over.is_set():
        peak[0] = max(peak[0], me.memory_info().rss)
        left[0] = max(left[0], sum(f.stat().st_size for f in temp.rglob("*") if f.is_file()))
        time.sleep(0.005)
watcher = threading.Thread(target=watch); watcher.start()
receipt = upload_results(run_dir, Destination.parse("s3://results"), "0f8fad5b-d9cb-469f-a165-70867728950e")
over.set(); watcher.join()
print(json.dumps({"growth": peak[0] - before, "temp": left[0], "size": receipt.size, "verified": receipt.verified}))
"""


def measure(effort: Effort) -> Iterable[Figure]:
    """Speed against FLIP's way and against the wire; then memory and temporary files of a big one."""
    import json

    with tempfile.TemporaryDirectory() as scratch, endpoint() as url, bucket_environment(url):
        run_dir = Path(scratch) / "run"
        write_run(run_dir, effort.of(512, 64), effort.of(15, 2))
        ours(run_dir)  # the files are in the page cache and boto3's models are loaded for everybody
        pairs = turns(lambda: theirs(run_dir, url), lambda: ours(run_dir), effort.of(5, 2))
        yield spread(
            "upload_speedup",
            [peer / mine for peer, mine in pairs],
            flips_way_s=[round(peer, 2) for peer, _ in pairs],
            ours_s=[round(mine, 2) for _, mine in pairs],
        )
        receipt = upload_results(run_dir, Destination.parse(f"s3://{BUCKET}"), MODEL_ID)
        size = _multipart.PART_BYTES
        parts = [os.urandom(min(size, receipt.size - start)) for start in range(0, receipt.size, size)]
        pairs = turns(lambda: ours(run_dir), lambda: bare(parts, url), effort.of(9, 3))
        yield spread(
            "upload_limit_ratio",
            [mine / wire for mine, wire in pairs],
            ours_s=[round(mine, 2) for mine, _ in pairs],
            bare_s=[round(wire, 2) for _, wire in pairs],
        )
        parts.clear()
        shutil.rmtree(run_dir)
        yield from _huge(effort, Path(scratch), json.loads)


def _huge(effort: Effort, scratch: Path, parse: Any) -> Iterable[Figure]:
    run_dir, temp, small = scratch / "huge", scratch / "temp", scratch / "small"
    temp.mkdir()
    write_run(run_dir, effort.of(4096, 512), 1)
    write_run(small, 16, 1)
    found = parse(child(HUGE, str(run_dir), str(temp), str(small), environment={"TMPDIR": str(temp)}))
    assert found["verified"], found
    yield single("upload_rss_growth_mib", found["growth"] / MIB, uploaded_mib=round(found["size"] / MIB))
    yield single("upload_temp_bytes", found["temp"])
