"""All drills, in the order in which they are played."""

from __future__ import annotations

from drills import aborts, deaths, observers
from drills.judge import Drill

DRILLS: tuple[Drill, ...] = (*deaths.DRILLS, *observers.DRILLS, *aborts.DRILLS)
