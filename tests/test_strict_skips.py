"""The plugin that lets no skip hide in the continuous integration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from strict_skips import ALLOWED, is_allowed

TESTS = Path(__file__).resolve().parent


def session(folder: Path, reason: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A session of pytest with one test that passes and one that is skipped."""
    (folder / "test_it.py").write_text(
        f"import pytest\ndef test_good(): assert 1 + 1 == 2\ndef test_skipped(): pytest.skip({reason!r})\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "strict_skips", "-c", os.devnull, "--rootdir", str(folder)]
    return subprocess.run(
        [*command, *arguments, str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])
def test_a_skip_for_a_missing_program_fails(tmp_path: Path, workers: tuple[str, ...]) -> None:
    done = session(tmp_path, "prometheus is not installed", "--strict-skips", *workers)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "test_skipped: prometheus is not installed" in done.stdout


def test_without_the_option_it_is_only_a_skip(tmp_path: Path) -> None:
    assert session(tmp_path, "prometheus is not installed").returncode == 0


def test_what_is_on_the_list_may_be_skipped(tmp_path: Path) -> None:
    done = session(tmp_path, "systemd is not installed", "--strict-skips")
    assert done.returncode == 0, done.stdout


def test_every_entry_has_a_reason_and_lets_no_missing_program_of_ours_through() -> None:
    assert all(len(why) > 10 for why in ALLOWED.values())
    for reason in ("promtool is not installed", "the collector has not been built", "there is no Go to build it with"):
        assert not is_allowed(reason)
