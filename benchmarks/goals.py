"""The figures, their goals, and what each one means to a user: one table for the terminal, the file and the docs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Goal:
    """One figure.

    Args:
        unit: of the value.
        sense: ``at most`` or ``at least`` the limit; ``reported`` has no limit.
        limit: in the unit.
        meaning: what it means to a user.
    """

    unit: str
    sense: Literal["at most", "at least", "reported"]
    limit: float
    meaning: str

    def is_reached(self, value: float) -> bool:
        """Whether a measured value is good enough."""
        return {
            "at most": value <= self.limit,
            "at least": value >= self.limit,
            "reported": True,
        }[self.sense]

    def __str__(self) -> str:
        return "-" if self.sense == "reported" else f"{'≤' if self.sense == 'at most' else '≥'} {self.limit:g}"


def _most(unit: str, limit: float, meaning: str) -> Goal:
    return Goal(unit, "at most", limit, meaning)


def _least(unit: str, limit: float, meaning: str) -> Goal:
    return Goal(unit, "at least", limit, meaning)


def _reported(unit: str, meaning: str) -> Goal:
    return Goal(unit, "reported", 0.0, meaning)


GOALS: dict[str, Goal] = {
    "ignored_event_ratio": _most(
        "ratio", 0.5, "an event that is not in the table: ours ÷ NVFLARE's JobMetricsCollector"
    ),
    "recorded_event_ratio": _most(
        "ratio",
        0.5,
        "a round's start and a client's result, ledger and span included: ours ÷ JobMetricsCollector + StatsD",
    ),
    "job_overhead_percent": _most("%", 1, "CPU time of the server of a 50-round job that our components add"),
    "fl_thread_wait_ms_p99_hub_hanging": _most("ms", 5, "how long an event holds NVFLARE's thread while the hub hangs"),
    "fl_thread_wait_ms_p99_ledger_locked": _most("ms", 60, "… while another process keeps the ledger locked"),
    "fl_thread_wait_ms_p99_collector_hanging": _most("ms", 5, "… while the trace collector hangs"),
    "upload_speedup": _least(
        "ratio", 7, "how much sooner results are in the bucket: make_archive + upload_file ÷ ours"
    ),
    "upload_limit_ratio": _most("ratio", 1.3, "ours ÷ a bare multipart upload of the same bytes from memory"),
    "upload_rss_growth_mib": _most("MiB", 96, "memory that an upload of 4 GiB takes"),
    "upload_temp_bytes": _most("bytes", 0, "temporary files that it writes"),
    "scrape_ms_p99_10k_runs": _most("ms", 20, "a scrape of /metrics with 10,000 finished and 8 active runs"),
    "scrape_bytes_growth_10k_to_100k_runs": _most("ratio", 1.05, "the page at 100,000 runs ÷ at 10,000"),
    "observer_start_s_10k_runs": _most("s", 3, "from the observer's start to its first full page"),
    "observer_first_start_s_10k_runs": _reported("s", "the same with no metric state yet: 1,000,000 events to read"),
    "observer_rss_mib_10k_runs": _most("MiB", 150, "the observer's memory then"),
    "ledger_append_ms_p99_16_writers": _most("ms", 10, "one event into the ledger while 15 other processes write"),
    "ledger_events_lost": _most("events", 0, "acknowledged events missing after 200 SIGKILLs of writers"),
    "deliveries_per_s": _least("1/s", 200, "statuses that reach a hub answering in 10 ms, in order, after an outage"),
    "hub_recovery_s": _most("s", 20, "from the hub's return to the last of 100 waiting final statuses"),
    "import_ms_over_nvflare": _most("ms", 150, "what importing our components adds to NVFLARE's own"),
    "ledger_bytes_per_event": _reported("bytes", "disk that an event takes in the ledger"),
    "ledger_size_mib_100_rounds_50_clients": _reported("MiB", "disk that such a run takes"),
}
