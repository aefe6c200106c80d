"""What our own lines in a log may hold, whoever has written what they are filled in with."""

from __future__ import annotations

import logging
import logging.config
import re
from pathlib import Path

import pytest

import flip_observability
from flip_observability.errors import MAX_LOGGED, logger, report

EVIL = "evil\n2030-01-01 - ERROR - all is lost \x1b[2J\x9b\u202e" + "x" * 10_000
SOURCE = Path(flip_observability.__file__).parent


def test_a_line_of_ours_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    log = logger("flip_observability.of_a_test")
    assert logger("flip_observability.of_a_test") is log
    assert len(log.filters) == 1
    # A configuration that comes later, and names our loggers, takes nothing away.
    names = ("flip_observability", "flip_observability.of_a_test")
    configuration = {"version": 1, "disable_existing_loggers": False, "incremental": False}
    logging.config.dictConfig({**configuration, "loggers": {name: {"level": "DEBUG"} for name in names}})
    log.warning("%s has %d of %.1f, %s", EVIL, 3, 0.5, Path("/a\nb"))
    report("of_a_test", type(EVIL, (Exception,), {})(), f"cannot do {EVIL}")
    assert len(caplog.messages) == 2
    for message in caplog.messages:
        assert message.isprintable()
        assert len(message) < 3 * MAX_LOGGED
    assert caplog.messages[0].endswith(" has 3 of 0.5, /a\\nb")


def test_every_line_of_ours_goes_through_there() -> None:
    pattern = re.compile(r"^_?log\w* = logging\.getLogger", re.MULTILINE)
    found = {path.name for path in SOURCE.rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))}
    assert found == set()
