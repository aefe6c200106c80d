"""How things are measured: two of them side by side, turn by turn, with the median and the spread of their ratios."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Effort:
    """How much to measure: ``full`` for ``make bench``, otherwise the quick look of ``make bench-quick``."""

    full: bool = True

    def of(self, full: int, quick: int) -> int:
        """A number of repetitions or of things."""
        return full if self.full else quick


@dataclass(frozen=True)
class Figure:
    """A measured figure.

    Args:
        key: of :data:`benchmarks.goals.GOALS`.
        value: the median, or the one value there is.
        low, high: the spread (quartiles of the turns, or least and most).
        about: what a reader needs to believe it: both sides' own values, how many turns, what was asserted.
    """

    key: str
    value: float
    low: float
    high: float
    about: dict[str, Any] = field(default_factory=dict)


def spread(key: str, values: Sequence[float], **about: Any) -> Figure:
    """The median of several turns, with its quartiles."""
    if len(values) < 2:
        return Figure(key, values[0], values[0], values[0], {"turns": len(values), **about})
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Figure(key, statistics.median(values), low, high, {"turns": len(values), **about})


def single(key: str, value: float, **about: Any) -> Figure:
    """A figure that is one measurement (a count, a peak)."""
    return Figure(key, value, value, value, about)


def turns(one: Callable[[], float], other: Callable[[], float], count: int) -> list[tuple[float, float]]:
    """Measure two things in turn; who goes first changes from turn to turn, so that drift harms neither."""
    pairs = []
    for number in range(count):
        if number % 2:
            second = other()
            pairs.append((one(), second))
        else:
            first = one()
            pairs.append((first, other()))
    return pairs


def p99(values: Sequence[float]) -> float:
    """The value that 99 of 100 stay below."""
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def child(code: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Run Python code in a process of its own and return what it prints.

    Raises:
        subprocess.CalledProcessError: when it fails; what it wrote on stderr is shown.
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )
    return done.stdout.strip()


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for as long as the context lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def machine() -> dict[str, Any]:
    """What was measured on, without names of hosts or users."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
