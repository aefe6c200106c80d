"""Which contract a server speaks when nobody says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from flip_observability._contract import contract_of, in_words, installed_flip
from flip_observability.settings import Settings


def install(version: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the metadata of a flip-utils found, as those of an installed package are."""
    info = folder / f"flip_utils-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flip-utils\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("version", "contract"),
    [
        (None, "2026-05"),
        ("", "2026-05"),
        ("unknown", "2026-05"),
        ("0.1.8", "2026-05"),
        ("0.4.1", "2026-10"),
        ("0.13.1", "2026-10"),
        ("1.0", "2026-10"),
    ],
)
def test_a_version_of_flip_speaks_one_contract(version: str | None, contract: str) -> None:
    assert contract_of(version) == contract


@pytest.mark.parametrize("told", [None, "", "auto"])
def test_the_installed_flip_chooses_unless_the_setting_does(
    told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLIP_HUB_CONTRACT", raising=False)
    if told is not None:
        monkeypatch.setenv("FLIP_HUB_CONTRACT", told)
    install("0.13.1", tmp_path, monkeypatch)
    assert installed_flip() == "0.13.1"
    assert Settings.load().hub_contract == "2026-10"
    monkeypatch.setenv("FLIP_HUB_CONTRACT", "2026-05")
    assert Settings.load().hub_contract == "2026-05"


def test_it_is_said_and_a_contradiction_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("0.13.1", tmp_path, monkeypatch)
    assert in_words("2026-10") == "The hub is spoken to in contract 2026-10; flip-utils 0.13.1 is installed"
    assert in_words("2026-05").endswith("flip-utils 0.13.1 is installed, which speaks 2026-10")


def test_the_handler_says_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from nvflare.apis.fl_context import FLContext

    from flip_observability.client import detach
    from flip_observability.nvflare.components import ServerEventHandler

    install("0.13.1", tmp_path / "packages", monkeypatch)
    monkeypatch.setenv("LOCAL_DEV", "true")
    monkeypatch.delenv("FLIP_HUB_CONTRACT", raising=False)
    monkeypatch.setenv("FLIP_OBSERVABILITY_DIR", str(tmp_path / "ledger"))
    handler = ServerEventHandler("0f8fad5b-d9cb-469f-a165-70867728950e")
    with caplog.at_level(logging.INFO):
        for event in ("_start_run", "_training_started", "_about_to_end_run", "_end_run"):
            handler.handle_event(event, FLContext())
    detach()
    assert caplog.text.count("spoken to in contract 2026-10; flip-utils 0.13.1") == 1


@pytest.mark.parametrize(
    ("told", "runs", "spoken"),
    [
        ("auto", "2026-10", "2026-10"),
        ("auto", None, "2026-05"),
        ("auto", "2099-01", "2026-05"),
        ("2026-05", "2026-10", "2026-05"),
    ],
)
def test_the_contract_of_a_run_counts_where_none_is_told(
    told: str, runs: str | None, spoken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flip_observability.settings.installed_flip", lambda: None)
    assert Settings.model_validate({"FLIP_HUB_CONTRACT": told}).contract_for(runs) == spoken


def test_a_runs_own_process_writes_down_its_contract(tmp_path: Path) -> None:
    from flip_observability.ledger import Ledger
    from flip_observability.recorder import RunIdentity, RunRecorder

    settings = Settings.model_validate({"FLIP_HUB_CONTRACT": "2026-10"})
    recorder = RunRecorder(RunIdentity("5e0c9a38-54a1-4b6d-9d4e-1f2f30a94a10"), settings, tmp_path)
    recorder.close()
    with Ledger(tmp_path) as ledger:
        assert [run["contract"] for run in ledger.runs()] == ["2026-10"]
