"""What importing our components adds to importing NVFLARE's own."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.measure import Effort, Figure, child, spread, turns

PEER = """
import time; begun = time.perf_counter()
from nvflare.apis.fl_component import FLComponent
from nvflare.app_common.widgets.validation_json_generator import ValidationJsonGenerator
from nvflare.metrics.job_metrics_collector import JobMetricsCollector
print(time.perf_counter() - begun)
"""
OURS = PEER.replace(
    "print(", "from flip_observability.nvflare.components import ServerEventHandler, PersistToS3AndCleanup\nprint("
)


def measure(effort: Effort) -> Iterable[Figure]:
    """Both in fresh processes, in turn; the first pair only warms the disk's cache."""
    pairs = turns(lambda: float(child(OURS)), lambda: float(child(PEER)), effort.of(15, 5) + 1)[1:]
    yield spread(
        "import_ms_over_nvflare",
        [(ours - peer) * 1000 for ours, peer in pairs],
        ours_ms=round(1000 * min(ours for ours, _ in pairs)),
        nvflare_ms=round(1000 * min(peer for _, peer in pairs)),
    )
