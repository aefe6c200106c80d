"""All drills, in the order in which they are played."""

from __future__ import annotations

from drills import aborts, accounts, bucket, collector, deaths, hub, ledger, network, observers, poison, security
from drills.judge import Drill

DRILLS: tuple[Drill, ...] = (
    *deaths.DRILLS,
    *observers.DRILLS,
    *aborts.DRILLS,
    *accounts.DRILLS,
    *hub.DRILLS,
    *network.DRILLS,
    *bucket.DRILLS,
    *ledger.DRILLS,
    *collector.DRILLS,
    *poison.DRILLS,
    *security.DRILLS,
)
