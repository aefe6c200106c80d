"""The parts of ``make test-all``: together they have every test that ``make test`` leaves out, each once."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from scripts import test as make_test
from scripts import test_all as parts_of_tests
from scripts.test_all import PARTS, ROOT, Outcome, Part, count, play, pytest_command, summary


def test_every_file_of_a_part_exists_and_is_in_no_other() -> None:
    files = [file for part in PARTS for file in part.files]
    assert max(Counter(files).values()) == 1
    for file in files:
        assert (ROOT / "tests" / file).exists(), file


def test_the_rest_is_all_that_no_other_part_has() -> None:
    (rest,) = (part for part in PARTS if not part.files and not part.command)
    command = pytest_command(rest, "2", Path("report.xml"))
    assert {word.partition("=")[2] for word in command if word.startswith("--ignore")} == {
        f"tests/{file}" for part in PARTS for file in part.files
    }
    assert "--strict-skips" in command


def test_a_test_that_was_not_marked_as_needing_a_program_fails_where_there_is_none() -> None:
    """`make test` would skip it there, and `make test-all` would never have it."""
    assert "--strict-skips" in make_test.steps([])["pytest"]


def test_tests_are_counted_by_what_became_of_them(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): assert 1 + 1 == 2\n"
        "def test_bad(): assert 1 + 1 == 3\n"
        "def test_not_here(): pytest.skip('no')\n"
        "@pytest.fixture\ndef broken(): raise OSError\n"
        "def test_error(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", f"--junitxml={report}", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=120)
    assert count(report) == {"passed": 1, "failed": 2, "skipped": 1}


def test_a_part_that_fails_is_told_and_one_that_cannot_be_played_names_its_command(tmp_path: Path) -> None:
    bad = play(Part("bad", "", 1, 1, command=("false",)), "1", tmp_path)
    good = play(Part("good", "", 1, 1, command=("true",)), "1", tmp_path)
    left = play(Part("left", "", 1, 1, command=("true",), needs=("false",), otherwise="make it"), "1", tmp_path)
    assert [(outcome.failed, outcome.not_played) for outcome in (bad, good, left)] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    told = summary([bad, good, left]).splitlines()
    assert told[-1] == "0 passed, 1 failed, 0 skipped"
    assert any("not played: make it" in line for line in told)
    assert any(line.startswith("bad") and "FAILED" in line for line in told)


def test_a_budget_that_is_overrun_is_shown_and_fails_nothing() -> None:
    outcome = Outcome(Part("slow", "", 1, 2), seconds=121.0)
    assert (outcome.failed, " over " in outcome.row(5)) == (False, True)


def test_a_name_that_no_part_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parts_of_tests.main(["nonsense"])
    assert "no such part: nonsense" in capsys.readouterr().err
