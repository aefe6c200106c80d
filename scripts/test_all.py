"""What ``make test`` leaves out, part by part: real programs, whole runs, drills. Each part has a budget of time.

A part that fails does not keep the others from being played. A budget that is overrun is shown and no failure: how fast
a machine is says nothing about the code. The last line counts tests as pytest does.

    python -m scripts.test_all                  all parts
    python -m scripts.test_all drills kits      some of them
    python -m scripts.test_all --list           their names
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/"


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: by which it can be chosen.
        says: what it is.
        warm: budget in minutes on two quiet cores when all caches are filled.
        cold: the same with empty caches.
        command: a program that prepares something; empty for a part of tests.
        files: the tests' files, below ``tests``; empty for all that no other part has.
        marker: which of their tests.
        needs: a program that says by its exit code whether the part can be played here; else it is skipped.
        otherwise: what makes a part that was skipped playable.
    """

    name: str
    says: str
    warm: float
    cold: float
    command: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    marker: str = "system and not flip"
    needs: tuple[str, ...] = ()
    otherwise: str = ""


PARTS = (
    Part("prometheus", "fetch Prometheus and Alertmanager", 0.1, 2, command=("scripts/fetch-prometheus.sh",)),
    Part("collector", "build the OpenTelemetry Collector", 0.1, 8, command=("collector/build.sh",)),
    Part(
        "scenarios",
        "every scenario of the demo by both OTLP protocols, and what Prometheus, dashboards and collector make of them",
        7,
        8,
        files=(
            *("test_demo_run.py", "test_tracing_demo.py", "test_visible.py", "test_dashboards.py", "test_collector.py"),
            *("test_alerts.py", "test_scraping.py", "test_scale.py"),
        ),
    ),
    Part(
        "kits",
        "real server kits, adopted, aborted and killed",
        4,
        4,
        files=("test_adoption.py", "test_server_observer.py", "test_demo_server.py", "test_log_ids.py"),
    ),
    Part("drills", "the quick drills", 3, 3, files=("test_drills.py",)),
    Part("rest", "what else takes a program, or long", 4, 8),
    Part(
        "flip",
        "FLIP's own job types, as they are and adopted",
        12,
        12,
        files=("flip_recipes",),
        marker="flip",
        needs=("scripts/flip-env.sh", "--python"),
        otherwise="make test-flip, which makes an environment of 4.3 GB first",
    ),
)


@dataclass
class Outcome:
    """What became of a part: seconds, and its tests counted."""

    part: Part
    seconds: float = 0.0
    failed_to_run: bool = False
    not_played: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether anything in it is not as it must be."""
        return self.failed_to_run or bool(self.counts.get("failed"))

    def row(self, width: int) -> str:
        """A line of the table."""
        tests = ", ".join(f"{number} {what}" for what, number in self.counts.items() if number)
        result = f"not played: {self.part.otherwise}" if self.not_played else "FAILED" if self.failed else "ok"
        over = " over" if self.seconds > 60 * self.part.cold else ""
        budget = f"{self.part.warm:g} to {self.part.cold:g} min"
        return (
            f"{self.part.name:<{width}}  {budget:>13}  {self.seconds / 60:5.1f} min{over:5}  {result}  {tests}".rstrip()
        )


def pytest_command(part: Part, workers: str, report: Path) -> list[str]:
    """The session of pytest that a part is."""
    others = [file for other in PARTS if other is not part for file in other.files]
    where = [TESTS + file for file in part.files] or [TESTS, *(f"--ignore={TESTS}{file}" for file in others)]
    options = ["-q", "-n", workers, "-m", part.marker, "--strict-skips", "--durations=15", f"--junitxml={report}"]
    return [sys.executable, "-m", "pytest", *options, *where]


def count(report: Path) -> dict[str, int]:
    """The tests of a session, by what became of them."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        counts["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return counts


def play(part: Part, workers: str, folder: Path) -> Outcome:
    """Play one part to its end."""
    outcome, began = Outcome(part), time.monotonic()
    environment = {**os.environ, "FLIP_TEST_RUNS": str(folder)}
    if (
        part.needs
        and subprocess.run(
            part.needs, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
        ).returncode
    ):
        outcome.not_played = True
        return outcome
    print(f"\n== {part.name}: {part.says}", flush=True)
    report = folder / f"{part.name}.xml"
    command = list(part.command) or pytest_command(part, workers, report)
    code = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
    outcome.seconds = time.monotonic() - began
    if report.exists():
        outcome.counts = count(report)
    outcome.failed_to_run = code != 0 and not outcome.counts.get("failed")
    return outcome


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table, and the line that counts."""
    width = max(len(outcome.part.name) for outcome in outcomes)
    budgets = [sum(getattr(outcome.part, kind) for outcome in outcomes) for kind in ("warm", "cold")]
    took = sum(outcome.seconds for outcome in outcomes) / 60
    total = {kind: sum(outcome.counts.get(kind, 0) for outcome in outcomes) for kind in ("passed", "failed", "skipped")}
    total["failed"] += sum(outcome.failed_to_run for outcome in outcomes)
    return "\n".join(
        [
            "",
            *(outcome.row(width) for outcome in outcomes),
            f"together {took:.1f} min; the budget: {budgets[0]:g} min with warm caches, {budgets[1]:g} with cold ones",
            f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Play the parts. Returns 1 when one failed, 2 for a name that no part has."""
    parser = argparse.ArgumentParser(prog="make test-all", description="What make test leaves out.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(part.name for part in PARTS))
    parser.add_argument("--workers", default="2", help="of pytest")
    parser.add_argument("--list", action="store_true", help="only name the parts")
    told = parser.parse_args(arguments)
    if told.list:
        print("\n".join(f"{part.name:<12} {part.says}" for part in PARTS))
        return 0
    unknown = set(told.parts) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    chosen = [part for part in PARTS if not told.parts or part.name in told.parts]
    with tempfile.TemporaryDirectory(prefix="flip-test-all-") as folder:
        outcomes = [play(part, told.workers, Path(folder)) for part in chosen]
    print(summary(outcomes))
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
