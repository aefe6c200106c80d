"""What importing our components adds to importing NVFLARE's own."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.measure import Effort, Figure, child, spread, turns

PEER = """
import time; wall, cpu = time.perf_counter(), time.process_time()
from nvflare.apis.fl_component import FLComponent
from nvflare.app_common.widgets.validation_json_generator import ValidationJsonGenerator
from nvflare.metrics.job_metrics_collector import JobMetricsCollector
print(time.process_time() - cpu, time.perf_counter() - wall)
"""
OURS = PEER.replace(
    "print(", "from flip_observability.nvflare.components import ServerEventHandler, PersistToS3AndCleanup\nprint("
)

ALONE = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""NVFLARE imports numpy, whose BLAS starts a thread for each core, and each of them spins for a while: of whatever is
imported next, some 50 ms would be theirs."""


def measure(effort: Effort) -> Iterable[Figure]:
    """Both in fresh processes, in turn; the first pair only warms the disk's cache.

    CPU time: with the files in the cache it is what passes on a machine that has nothing else to do.
    """
    walls: dict[str, list[float]] = {PEER: [], OURS: []}

    def cpu_seconds(code: str) -> float:
        cpu, wall = map(float, child(code, environment=ALONE).split())
        walls[code].append(1000 * wall)
        return cpu

    pairs = turns(lambda: cpu_seconds(OURS), lambda: cpu_seconds(PEER), effort.of(15, 5) + 1)[1:]
    yield spread(
        "import_ms_over_nvflare",
        [(ours - peer) * 1000 for ours, peer in pairs],
        ours_ms=round(1000 * min(ours for ours, _ in pairs)),
        nvflare_ms=round(1000 * min(peer for _, peer in pairs)),
        shortest_by_the_clock_ms=round(min(walls[OURS]) - min(walls[PEER])),
    )
