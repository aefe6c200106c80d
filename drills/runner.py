"""Plays drills, one after the other, and has each judged."""

from __future__ import annotations

import logging
import threading
import time
import traceback
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from drills.judge import Drill, Outcome, Skip, judge
from drills.stage import Shared, Stage

ON_THE_SITE = frozenset({"deaths", "aborts"})
"""Groups of drills that share the NVFLARE site."""


def choose(drills: Iterable[Drill], names: Sequence[str], *, quick: bool) -> list[Drill]:
    """The drills of these names or groups; all when there are none. ``quick``: of the quick subset only."""
    chosen = [drill for drill in drills if not names or drill.name in names or drill.group in names]
    return [drill for drill in chosen if drill.quick] if quick and not names else chosen


def play(drill: Drill, shared: Shared, seed: int, *, full: bool, keep: Path | None = None) -> Outcome:
    """Play one drill. What it raises is a failure of the drill.

    Args:
        drill: to be played.
        shared: across drills.
        seed: of this round of drills.
        full: whether it is to be played in full.
        keep: a folder for the ledgers and logs of a drill that failed.
    """
    outcome = Outcome(drill, seed)
    begun = time.monotonic()
    # Each drill has moments of its own, whichever are played beside it.
    own = seed ^ zlib.crc32(drill.name.encode())
    try:
        with Stage(shared, own, full=full) as stage:
            _play_on(stage, drill, outcome)
            if keep is not None and not outcome.passed:
                stage.keep(keep / f"{drill.name}-{seed}")
    except Exception as error:  # noqa: BLE001 - the stage could not be cleared; the next drill has another one
        outcome.differences.append(_told(error))
    outcome.took = time.monotonic() - begun
    return outcome


def _play_on(stage: Stage, drill: Drill, outcome: Outcome) -> None:
    try:
        judge(drill, drill.play(stage), stage, outcome)
    except Skip as reason:
        outcome.skipped = str(reason)
    except Exception as error:  # noqa: BLE001 - the drills behind it are played all the same
        outcome.differences.append(_told(error))
        outcome.notes += stage.notes


def _told(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {where.name}, line {where.lineno}: {error}"[:2_000]


def run_all(
    drills: Sequence[Drill], home: Path, seed: int, *, full: bool, console: Console, keep: Path | None = None
) -> list[Outcome]:
    """Play drills and say how each went as soon as it is known.

    Those of the NVFLARE site are played one after the other, and the others beside them.

    Returns:
        The outcomes, in the drills' order.
    """
    logging.getLogger("flip_observability").setLevel(logging.CRITICAL)  # complaints are the point of it
    outcomes: dict[str, Outcome] = {}
    with Shared(home / "site") as shared:

        def play_lane(lane: Sequence[Drill]) -> None:
            for drill in lane:
                outcome = play(drill, shared, seed, full=full, keep=keep)
                outcomes[drill.name] = outcome
                _tell(outcome, console)

        lanes = [[drill for drill in drills if (drill.group in ON_THE_SITE) is on_it] for on_it in (True, False)]
        # Daemons: who interrupts this does not want to wait for them.
        threads = [threading.Thread(target=play_lane, args=(lane,), daemon=True) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(1.0)
    return [outcomes[drill.name] for drill in drills]


def _tell(outcome: Outcome, console: Console) -> None:
    lines = [f"{outcome.drill.name:26} {outcome.verdict:6} {outcome.took:6.1f} s"]
    lines += [f"    {difference}" for difference in outcome.differences]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
