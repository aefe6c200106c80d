"""An FL server that runs the demo's job again and again, for a stack whose hub and bucket are services of their own.

``python -m flip_observability.demo.server`` takes hub, bucket and ledger from the environment, as a FLIP server does.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from flip_observability.demo.job import has_lost_a_site, kill_job, prepare_workspace, write_job
from flip_observability.demo.scenarios import SCENARIOS, Scenario
from flip_observability.errors import logger
from flip_observability.results import Destination
from flip_observability.settings import Settings, SettingsError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

STORIES = tuple(name for name, story in SCENARIOS.items() if not (story.refusing or story.outage))
"""Scenarios that need no hub or bucket which the demo itself can make ill."""
ALIVE = "alive"
"""A file in the folder that is touched every second or so."""
_JOB_SECONDS = 600.0
_BUCKET_SECONDS = 120.0
_GRACE_SECONDS = 5.0
_RUN = "run-"

_log = logger("flip_observability.demo.server")


def main(argv: list[str] | None = None) -> int:
    """Run jobs until SIGTERM or SIGINT. Returns 0 when the last job ended by itself and well, otherwise 1."""
    args = _arguments(argv)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        settings = Settings.load()
    except SettingsError as error:
        _log.error("%s", error)
        return 1
    args.folder.mkdir(parents=True, exist_ok=True)
    if not _ensure_bucket(settings, stop):
        return 1
    code = 0
    for name in itertools.cycle(args.scenarios):
        code = _run(args.folder, SCENARIOS[name], args.pace, stop)
        _forget_old_runs(args.folder, args.keep)
        if stop.is_set() or not args.every:
            break
        _wait(args.folder, stop, args.every)
        if stop.is_set():
            break
    return code


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flip_observability.demo.server", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where jobs and the simulator's workspaces are made")
    parser.add_argument(
        "--scenarios",
        type=_scenarios,
        default=["success"],
        help=f"in turn, separated by commas: {', '.join(STORIES)} (default: success)",
    )
    parser.add_argument(
        "--every", type=_at_least_zero, default=0.0, help="seconds between two runs; 0 for one run only (default)"
    )
    parser.add_argument("--pace", type=_at_least_zero, default=2.0, help="seconds of a round (default: %(default)s)")
    parser.add_argument("--keep", type=int, default=5, help="run folders that stay, the latest (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.keep < 0:
        parser.error(f"argument --keep: {args.keep} is no number of folders")
    return args


def _at_least_zero(text: str) -> float:
    seconds = float(text)
    if not 0.0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def _scenarios(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in STORIES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(STORIES)}")
    return names


def _ensure_bucket(settings: Settings, stop: threading.Event) -> bool:
    """Make the bucket when the S3 service does not have it yet, and wait for a service that is just starting."""
    from botocore.exceptions import BotoCoreError, ClientError

    destination = Destination.parse(settings.bucket)
    if destination.scheme != "s3":
        return True
    deadline = time.monotonic() + _BUCKET_SECONDS
    client = _client()
    while not stop.is_set():
        try:
            client.head_bucket(Bucket=destination.bucket)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                with contextlib.suppress(ClientError):  # the next look tells
                    client.create_bucket(Bucket=destination.bucket)
            else:
                _log.warning("the bucket %s is not ready: %s", destination.bucket, _code(error))
        except BotoCoreError as error:
            _log.warning("the bucket %s is not ready: %s", destination.bucket, type(error).__name__)
        else:
            return True
        if time.monotonic() > deadline:
            _log.error("there is no bucket %s, and it cannot be made", destination.bucket)
            return False
        stop.wait(1.0)
    return False


def _client() -> S3Client:
    import boto3
    from botocore.config import Config

    config = Config(connect_timeout=3, read_timeout=5, retries={"total_max_attempts": 1})
    return boto3.session.Session().client("s3", config=config)


def _code(error: Exception) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", type(error).__name__))


def _run(root: Path, scenario: Scenario, pace: float, stop: threading.Event) -> int:
    """Run one job to its end, or until the server is told to stop."""
    model_id = str(uuid.uuid4())
    folder = root / f"{_RUN}{time.strftime('%Y%m%d_%H%M%S')}-{model_id[:8]}"
    folder.mkdir()
    job = write_job(folder / "job", model_id, scenario, pace=pace)
    workspace = prepare_workspace(folder / "workspace")
    _log.info("model %s: %s", model_id, scenario.story)
    command = [sys.executable, "-m", "flip_observability.demo.job", str(job), str(workspace)]
    with (folder / "job.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline, lost_a_site = time.monotonic() + _JOB_SECONDS, False
        while process.poll() is None and not stop.is_set() and not lost_a_site and time.monotonic() < deadline:
            (root / ALIVE).touch()
            stop.wait(0.5)
            lost_a_site = has_lost_a_site(folder / "job.log")
        ended = process.poll() is not None
        kill_job(process, _GRACE_SECONDS)  # a run that is cut off is what the observer is there for
    _log.info("model %s: the job %s", model_id, "has ended" if ended else "was stopped")
    if lost_a_site:
        _log.warning("model %s: NVFLARE's simulator could not start one of its sites", model_id)
    return 0 if ended and process.returncode == 0 else 1


def _wait(root: Path, stop: threading.Event, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not stop.is_set() and time.monotonic() < until:
        (root / ALIVE).touch()
        stop.wait(min(1.0, max(0.0, until - time.monotonic())))


def _forget_old_runs(root: Path, keep: int) -> None:
    folders = sorted(path for path in root.glob(f"{_RUN}*") if path.is_dir())
    for folder in folders[: max(0, len(folders) - keep)]:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
