"""The demo's scenarios: what goes wrong in each, and what the hub and the bucket must hold at the end."""

from __future__ import annotations

from dataclasses import dataclass

from flip_observability.constants import ModelStatus


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
    """

    name: str
    story: str
    final: ModelStatus
    archive: bool = True
    mishap: str = ""
    mishap_round: int = 3
    refusing: bool = False


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("success", "five rounds, results uploaded", ModelStatus.RESULTS_UPLOADED),
        Scenario("fatal", "a component panics in round 3", ModelStatus.ERROR, mishap="panic"),
        Scenario("abort", "the run is aborted in round 3", ModelStatus.STOPPED, mishap="abort"),
        Scenario("upload-failure", "the bucket refuses the results", ModelStatus.ERROR, archive=False, refusing=True),
        Scenario(
            "hub-outage",
            "the hub is down from round 2 until the run has ended",
            ModelStatus.RESULTS_UPLOADED,
            mishap="hub-outage",
            mishap_round=2,
        ),
    )
}
"""All scenarios by name."""
