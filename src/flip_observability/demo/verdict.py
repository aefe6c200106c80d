"""The demo's judge: does what the hub and the bucket hold at the end fit the scenario?

A pure function over their own records, so that it can be tested with records that were tampered with.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flip_observability.constants import FINAL_STATUSES, ModelStatus
from flip_observability.demo.bucket import BucketRecord
from flip_observability.demo.hub import Contract, HubRecord
from flip_observability.demo.scenarios import LOG_FILE, Scenario

_RANK = {
    "PENDING": 0,
    "INITIATED": 1,
    "PREPARED": 2,
    "TRAINING_STARTED": 3,
    "RUNNING": 3,
    **{str(status): 4 for status in FINAL_STATUSES},
}
_TRAINING: dict[Contract, str] = {"2026-05": "TRAINING_STARTED", "2026-10": "RUNNING"}
_UNWANTED = ("app_server/", "cross_site_val/model_shareables/", "startup/", "local/")


@dataclass(frozen=True)
class Archive:
    """An object that the bucket holds.

    Attributes:
        key: in the bucket.
        size: bytes.
        problem: why it is no whole zip file; empty when it is one.
        files: names in it.
    """

    key: str
    size: int
    problem: str = ""
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What the hub and the bucket recorded during one demo.

    Attributes:
        model_id: the model of the run.
        contract: that the hub enforced.
        hub: its records.
        outages: when it was down, seconds since the epoch; None for an outage that has not ended.
        archives: what the bucket holds.
        unfinished: keys of multipart uploads that were neither completed nor aborted.
        bucket: the bucket's records.
        prefix: below which the archive must be.
    """

    model_id: str
    contract: Contract
    hub: Sequence[HubRecord]
    outages: Sequence[tuple[float, float | None]]
    archives: Sequence[Archive]
    unfinished: Sequence[str]
    bucket: Sequence[BucketRecord]
    prefix: str = "demo"


def expected_final(scenario: Scenario, contract: Contract) -> str:
    """The final status that the hub must hold, in its own vocabulary."""
    if scenario.refusing and contract == "2026-10":
        return str(ModelStatus.RESULTS_UPLOAD_FAILED)
    return str(scenario.final)


def judge(scenario: Scenario, evidence: Evidence) -> list[str]:
    """What differs from what this scenario must give, in sentences; empty when all is as it must be."""
    accepted = [
        record
        for record in evidence.hub
        if record.accepted and record.kind == "status" and record.model_id == evidence.model_id
    ]
    differences: list[str] = []
    for check in _CHECKS:
        differences += check(scenario, evidence, accepted)
    return differences


def _order(scenario: Scenario, evidence: Evidence, accepted: Sequence[HubRecord]) -> list[str]:
    names = [record.status for record in accepted]
    found = []
    unknown = sorted(set(names) - _RANK.keys())
    if unknown:
        return [f"the hub holds statuses that nobody knows: {', '.join(unknown)}"]
    for before, after in itertools.pairwise(names):
        if _RANK[after] < _RANK[before]:
            found.append(f"the status went backwards: {after} after {before}")
    if _TRAINING[evidence.contract] not in names:
        found.append(f"the hub never heard of {_TRAINING[evidence.contract]}")
    return found


def _final(scenario: Scenario, evidence: Evidence, accepted: Sequence[HubRecord]) -> list[str]:
    wanted = expected_final(scenario, evidence.contract)
    finals = list(dict.fromkeys(r.status for r in accepted if _RANK.get(r.status) == 4))
    if not finals:
        return [f"the hub holds no final status, it must hold {wanted}"]
    if len(finals) > 1:
        return [f"the hub holds more than one final status: {', '.join(finals)}"]
    if finals[0] != wanted:
        return [f"the hub's final status is {finals[0]}, it must be {wanted}"]
    return []


def _refusals(scenario: Scenario, evidence: Evidence, accepted: Sequence[HubRecord]) -> list[str]:
    refused = Counter(
        f"{r.code} for {r.method} {r.kind or r.path} ({r.problem})"
        for r in evidence.hub
        if not r.accepted and r.model_id in ("", evidence.model_id)
    )
    return [f"the hub refused {count} times: {what}" for what, count in sorted(refused.items())]


def _outage(scenario: Scenario, evidence: Evidence, accepted: Sequence[HubRecord]) -> list[str]:
    if not scenario.outage:
        return []
    if not evidence.outages:
        return ["the hub was never down"]
    start, end = evidence.outages[-1]
    if end is None:
        return ["the hub did not come back"]
    finals = [record for record in accepted if _RANK.get(record.status) == 4]
    if any(record.time < end for record in finals):
        return ["the final status came before the hub's outage had ended"]
    if any(start < record.time < end for record in evidence.hub):
        return ["the hub answered while it was down"]
    return []


def _results(scenario: Scenario, evidence: Evidence, accepted: Sequence[HubRecord]) -> list[str]:
    found = [f"an upload of {key} was left unfinished" for key in evidence.unfinished]
    if not scenario.archive:
        found += [f"the bucket holds {archive.key}, it must hold nothing" for archive in evidence.archives]
        if not any(r.code == 403 and r.method in ("PUT", "POST") for r in evidence.bucket):
            found.append("the bucket was never asked for an upload that it could refuse")
        return found
    if len(evidence.archives) != 1:
        names = ", ".join(archive.key for archive in evidence.archives) or "nothing"
        return [*found, f"the bucket must hold one archive, it holds {names}"]
    return found + _archive(scenario, evidence, evidence.archives[0])


def _archive(scenario: Scenario, evidence: Evidence, archive: Archive) -> list[str]:
    if archive.problem:
        return [f"{archive.key} is no whole archive: {archive.problem}"]
    found = []
    folder = f"{evidence.prefix}/{evidence.model_id}/".lstrip("/")
    if not archive.key.startswith(folder) or not archive.key.endswith(".zip"):
        found.append(f"the archive is at {archive.key}, it must be {folder}<time>.zip")
    missing = [name for name in (LOG_FILE, *scenario.contains) if name not in archive.files]
    found += [f"{name} is missing in the archive" for name in missing]
    found += [f"{name} must not be in the archive" for name in archive.files if name.startswith(_UNWANTED)]
    return found


_Check = Callable[[Scenario, Evidence, Sequence[HubRecord]], "list[str]"]
_CHECKS: tuple[_Check, ...] = (_order, _final, _refusals, _outage, _results)


def inspect_archive(key: str, file: Path) -> Archive:
    """Read a downloaded object: is it a whole zip file, and what is in it?"""
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
            names = tuple(info.filename for info in archive.infolist() if not info.is_dir())
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, zlib.error) as error:
        return Archive(key, size, problem=type(error).__name__)
    return Archive(key, size, problem=f"{broken} is damaged" if broken else "", files=names)
