"""The demo's scenarios: what goes wrong in each, and what the hub and the bucket must hold at the end."""

from __future__ import annotations

from dataclasses import dataclass

from flip_observability.constants import ModelStatus

GLOBAL_ACCURACY = "GLOBAL_ACCURACY"
"""Label of the metric that the server sends: the global model's accuracy on the held-out samples, 0 to 1."""

LOG_FILE = "log.txt"
MODEL_FILE = "models/FL_global_model.npz"
VALIDATION_FILE = "cross_site_val/cross_val_results.json"
GLOBAL_METRICS_FILE = "global_metrics.jsonl"
"""Files of a run directory, and so of the archive."""

OUTAGE_REQUEST, OUTAGE_DONE = "hub-outage.requested", "hub-outage.done"
"""Files in the control folder: the job asks for the outage, and the demo, which has the hub, says that it happened."""

_WHOLE = (MODEL_FILE, VALIDATION_FILE, GLOBAL_METRICS_FILE)


@dataclass(frozen=True)
class Scenario:
    """One story with a known end.

    Attributes:
        name: as on the command line.
        story: one sentence for the user.
        final: the final status that the hub must hold.
        archive: True when a whole archive must be in the bucket, False when there must be none.
        mishap: what the :class:`~flip_observability.demo.mishap.Mishap` component does; empty for nothing.
        mishap_round: in which round, 1-based.
        refusing: the bucket answers every write with 403.
        outage: the hub is down for a part of the run.
        contains: files that the archive must hold, beside the log.
    """

    name: str
    story: str
    final: ModelStatus
    archive: bool = True
    mishap: str = ""
    mishap_round: int = 3
    refusing: bool = False
    outage: bool = False
    contains: tuple[str, ...] = ()


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("success", "five rounds, results uploaded", ModelStatus.RESULTS_UPLOADED, contains=_WHOLE),
        Scenario("fatal", "a component panics in round 3", ModelStatus.ERROR, mishap="panic"),
        Scenario("abort", "the run is aborted in round 3", ModelStatus.STOPPED, mishap="abort"),
        Scenario("upload-failure", "the bucket refuses the results", ModelStatus.ERROR, archive=False, refusing=True),
        Scenario(
            "hub-outage",
            "the hub is down from round 2 until the run has ended",
            ModelStatus.RESULTS_UPLOADED,
            mishap="hub-outage",
            mishap_round=2,
            outage=True,
            contains=_WHOLE,
        ),
    )
}
"""All scenarios by name."""
