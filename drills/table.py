"""All drills, in the order in which they are played."""

from __future__ import annotations

from drills import aborts, bucket, collector, deaths, hub, ledger, observers
from drills.judge import Drill

DRILLS: tuple[Drill, ...] = (
    *deaths.DRILLS,
    *observers.DRILLS,
    *aborts.DRILLS,
    *hub.DRILLS,
    *bucket.DRILLS,
    *ledger.DRILLS,
    *collector.DRILLS,
)
