"""A plugin of pytest: with ``--strict-skips`` a session fails when a test was skipped that :data:`ALLOWED` lacks.

A test that skips where a program is missing is a help on a developer's machine. In a continuous integration the same
skip hides for months that something is no longer tested.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

ALLOWED: Mapping[str, str] = {
    r"root (reads everything|may write everywhere)": "permissions do not bind root; it runs as an ordinary user",
    r"needs? root": "mounts, and files of other owners: no ordinary user can make them; it runs as root, as in CI",
    r"this machine does not let tests mount": "a container without the right to mount; the others have it",
    r"systemd is not installed": "containers and CI have none; the unit file is checked where there is one",
    r"Grafana's SDK needs Python 3\.11": "the dashboards' source is for developers, who need not be on 3.10",
    r"needs Info-ZIP's unzip": "a second reader of our archives, beside Python's",
    r"no apt-get on this machine": "the script that is tested is for Debian and Ubuntu",
}
"""Reasons of skips, as regular expressions, that hide nothing, and why they do not."""


class StrictSkips:
    """Notes every skip, and makes the session fail for those that are not allowed."""

    def __init__(self) -> None:
        self.refused: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Look at a test's report; with workers all reports come to their controller."""
        if report.skipped and not hasattr(report, "wasxfail"):
            self._note(report.nodeid, report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Look at a module that was skipped as a whole."""
        if report.skipped:
            self._note(report.nodeid, report.longrepr)

    def _note(self, nodeid: str, longrepr: object) -> None:
        reason = str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
        if not is_allowed(reason):
            self.refused.append(f"{nodeid}: {reason.removeprefix('Skipped: ')}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Turn a good end into a failure."""
        if self.refused and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say which."""
        if self.refused:
            terminalreporter.section("skipped, and not on the list of tests/strict_skips.py", red=True)
            for line in self.refused:
                terminalreporter.line(line)


def is_allowed(reason: str) -> bool:
    """Whether a skip for this reason hides nothing."""
    return any(re.search(pattern, reason) for pattern in ALLOWED)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--strict-skips``."""
    parser.addoption("--strict-skips", action="store_true", help="fail when a test was skipped that may not be")


def pytest_configure(config: pytest.Config) -> None:
    """Look at skips where that is asked for, and not in xdist's workers, which report to their controller."""
    if config.getoption("--strict-skips") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(StrictSkips(), "flip-strict-skips")
