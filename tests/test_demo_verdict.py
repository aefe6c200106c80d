"""The judge accepts what each scenario must give and names every way in which records were tampered with."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flip_observability.demo.bucket import BucketRecord
from flip_observability.demo.hub import HubRecord
from flip_observability.demo.scenarios import SCENARIOS
from flip_observability.demo.verdict import Archive, Evidence, inspect_archive, judge

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"
OTHER = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
FINALS = {
    "success": "RESULTS_UPLOADED",
    "fatal": "ERROR",
    "abort": "STOPPED",
    "upload-failure": "ERROR",
    "hub-outage": "RESULTS_UPLOADED",
}
KEY = f"demo/{MODEL}/20260101_000000.zip"
FILES = (
    "log.txt",
    "models/FL_global_model.npz",
    "cross_site_val/cross_val_results.json",
    "global_metrics.jsonl",
)


def status(name: str, when: float, code: int = 200, **changes: Any) -> HubRecord:
    path = f"/api/model/{MODEL}/status/{name}"
    return dataclasses.replace(HubRecord(when, "PUT", path, code, "status", MODEL, name), **changes)


def good(name: str) -> Evidence:
    """What the hub and the bucket hold after a scenario that went as it must."""
    scenario = SCENARIOS[name]
    records = [status(text, when) for when, text in enumerate(["INITIATED", "TRAINING_STARTED"])]
    records.append(status(FINALS[name], 10.0))
    refused = [BucketRecord(5.0, "POST", KEY, "create_upload", 0, 403)]
    return Evidence(
        model_id=MODEL,
        contract="2026-05",
        hub=records,
        outages=[(3.0, 9.0)] if scenario.outage else [],
        archives=[Archive(KEY, 100, files=FILES)] if scenario.archive else [],
        unfinished=[],
        bucket=refused if scenario.refusing else [],
    )


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_must_be_is_accepted(name: str) -> None:
    assert judge(SCENARIOS[name], good(name)) == []


def test_the_finals_are_those_that_were_agreed() -> None:
    assert {name: str(scenario.final) for name, scenario in SCENARIOS.items()} == FINALS


@pytest.mark.parametrize("name", SCENARIOS)
def test_repeated_delivery_is_no_fault(name: str) -> None:
    evidence = good(name)
    twice = [record for record in evidence.hub for _ in range(2)]
    assert judge(SCENARIOS[name], dataclasses.replace(evidence, hub=twice)) == []


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("wrong", sorted({*FINALS.values(), "RESULTS_UPLOAD_FAILED"}))
def test_every_other_final_status_differs(name: str, wrong: str) -> None:
    evidence = good(name)
    changed = dataclasses.replace(evidence, hub=[*evidence.hub[:-1], status(wrong, 10.0)])
    assert bool(judge(SCENARIOS[name], changed)) is (wrong != FINALS[name])


def hub(change: Callable[[list[HubRecord]], list[HubRecord]]) -> Callable[[Evidence], Evidence]:
    return lambda evidence: dataclasses.replace(evidence, hub=change(list(evidence.hub)))


def bucket(**changes: Any) -> Callable[[Evidence], Evidence]:
    return lambda evidence: dataclasses.replace(evidence, **changes)


TAMPERED: dict[str, tuple[str, Callable[[Evidence], Evidence], str]] = {
    "no final status": ("success", hub(lambda r: r[:-1]), "no final status"),
    "nothing at all": ("fatal", hub(lambda r: []), "no final status"),
    "final status refused": ("success", hub(lambda r: [*r[:-1], status("RESULTS_UPLOADED", 10, 422)]), "refused"),
    "final status of another model": (
        "success",
        hub(lambda r: [*r[:-1], dataclasses.replace(r[-1], model_id=OTHER)]),
        "no final status",
    ),
    "two final statuses": ("abort", hub(lambda r: [*r, status("ERROR", 11)]), "more than one"),
    "backwards": ("success", hub(lambda r: [*r, status("PREPARED", 11)]), "backwards"),
    "backwards after training": (
        "success",
        hub(lambda r: [*r[:-1], status("PREPARED", 9), r[-1]]),
        "backwards",
    ),
    "unknown word": ("success", hub(lambda r: [status("DONE", 0), *r]), "nobody knows"),
    "never trained": ("success", hub(lambda r: [r[0], r[-1]]), "TRAINING_STARTED"),
    "a wrong key": ("success", hub(lambda r: [status("INITIATED", 0, 401, model_id=""), *r]), "401"),
    "a bad metric": ("success", hub(lambda r: [status("", 0, 422, kind="metrics"), *r]), "422"),
    "no archive": ("success", bucket(archives=[]), "holds nothing"),
    "two archives": ("success", bucket(archives=[Archive(KEY, 1, files=FILES)] * 2), "one archive"),
    "a broken archive": ("abort", bucket(archives=[Archive(KEY, 1, problem="BadZipFile")]), "no whole archive"),
    "archive of another model": (
        "fatal",
        bucket(archives=[Archive(KEY.replace(MODEL, OTHER), 1, files=FILES)]),
        "it must be",
    ),
    "archive with a leading slash": ("fatal", bucket(archives=[Archive("/" + KEY, 1, files=FILES)]), "it must be"),
    "archive without the log": ("fatal", bucket(archives=[Archive(KEY, 1, files=FILES[1:])]), "log.txt is missing"),
    "archive without the model": (
        "success",
        bucket(archives=[Archive(KEY, 1, files=(FILES[0], *FILES[2:]))]),
        "FL_global_model.npz is missing",
    ),
    "archive with the app": (
        "success",
        bucket(archives=[Archive(KEY, 1, files=(*FILES, "app_server/config/x"))]),
        "must not be",
    ),
    "an upload left behind": ("success", bucket(unfinished=[KEY]), "unfinished"),
    "an archive in a bucket that refuses": (
        "upload-failure",
        bucket(archives=[Archive(KEY, 100, files=FILES)]),
        "must hold nothing",
    ),
    "a bucket that was never asked": ("upload-failure", bucket(bucket=[]), "never asked"),
    "a hub that was never down": ("hub-outage", bucket(outages=[]), "never down"),
    "a hub that never came back": ("hub-outage", bucket(outages=[(3.0, None)]), "did not come back"),
    "a final status before the outage ended": ("hub-outage", bucket(outages=[(3.0, 12.0)]), "before"),
    "an answer in the outage": (
        "hub-outage",
        hub(lambda r: [*r, status("", 5.0, kind="metrics")]),
        "while it was down",
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_records_differ(case: str) -> None:
    name, tamper, words = TAMPERED[case]
    differences = judge(SCENARIOS[name], tamper(good(name)))
    assert any(words in difference for difference in differences), differences


def test_in_the_newer_contract_a_failed_upload_has_a_status_of_its_own() -> None:
    newer = [status("INITIATED", 0), status("RUNNING", 1), status("RESULTS_UPLOAD_FAILED", 10)]
    evidence = dataclasses.replace(good("upload-failure"), contract="2026-10", hub=newer)
    assert judge(SCENARIOS["upload-failure"], evidence) == []
    assert judge(SCENARIOS["upload-failure"], dataclasses.replace(evidence, contract="2026-05"))


def test_inspecting_a_whole_archive(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.mkdir("models") if hasattr(archive, "mkdir") else None
        archive.writestr("models/x", b"1" * 100)
    found = inspect_archive("k", file)
    assert (found.problem, found.files, found.size) == ("", ("models/x",), file.stat().st_size)


def test_inspecting_damage(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x", b"1" * 100)
    data = bytearray(file.read_bytes())
    data[50] ^= 0xFF  # within the member's content
    file.write_bytes(data)
    assert inspect_archive("k", file).problem
    file.write_bytes(data[:40])
    assert inspect_archive("k", file).problem
    file.write_bytes(b"")
    assert inspect_archive("k", file).problem
