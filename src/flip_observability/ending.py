"""Ending a run from outside its own process: what happened is folded again, and goes on where the process left off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flip_observability.constants import FlareEvents, ModelStatus, OwnEvents
from flip_observability.errors import report
from flip_observability.ledger import Entry, Ledger, OutboxItem
from flip_observability.lifecycle import Event, RunState, Scalar

SALVAGE, SALVAGED, SALVAGE_FAILED = "SALVAGE", "SALVAGED", "SALVAGE_FAILED"
"""Intents of a run that has a final status and had no results in the bucket: they are to follow, have, or cannot."""
PAGE = 5_000


@dataclass
class UnendedRun:
    """A run that is to be ended by somebody else than its process. Made by :meth:`read`.

    Args:
        run: its row in the ledger.
        state: what its events tell.
        ended_itself: whether its process reached END_RUN, and only left the final status to others.
    """

    run: Mapping[str, Any]
    state: RunState
    ended_itself: bool

    @classmethod
    def read(cls, ledger: Ledger, run_id: str) -> UnendedRun | None:
        """Fold what the ledger has of a run; None when it has nothing.

        Raises:
            LedgerError: it cannot be read.
            Exception: of any kind, when what is in it is no history.
        """
        run = ledger.run(run_id)
        if run is None:
            return None
        state, ended = RunState(run_id), False
        for event in _history(ledger, run_id):
            ended = ended or (event.name == FlareEvents.END_RUN and not state.is_premature_end())
            state.apply(event)
        return cls(run, state, ended)

    @property
    def has_begun(self) -> bool:
        """Whether its process recorded anything."""
        return self.state.first_event is not None

    def record(
        self,
        ledger: Ledger,
        name: str,
        when: float,
        attrs: Mapping[str, Scalar] | None = None,
        *,
        final_by: str | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> bool:
        """Record an event of the run, with all that it causes.

        Args:
            ledger: where.
            name: the event.
            when: epoch seconds; not before the run's last event.
            attrs: what is known about it.
            final_by: who chose the final status that it carries.
            columns: more of the run's row to set, in the same transaction.

        Returns:
            False when it carries a final status and the run had another one already: the first writer wins.

        Raises:
            LedgerError: nothing was recorded.
        """
        event = Event(name, max(when, self.state.last_event or when), attrs or {})
        effects = self.state.apply(event)
        status = effects.status.value if effects.final and effects.status else None
        return ledger.append(
            Entry(
                self.run["run_id"],
                event.time,
                event,
                tuple(effects.facts),
                {**self.state.columns(), **(columns or {})},
                effects.problems,
                status,
                final_by if status else None,
                _for_the_hub(self.run, status),
            )
        )

    def orphaned(self, ledger: Ledger, when: float, died: float) -> None:
        """Record, once, that the run's process died (``died``: when at the latest, as far as can be told)."""
        if self.has_begun and not self.ended_itself and "orphaned" not in self.state.problems:
            self.record(ledger, OwnEvents.ORPHANED.value, when, {"died": died})

    def finalise(
        self, ledger: Ledger, status: ModelStatus, when: float, by: str, columns: Mapping[str, Any] | None = None
    ) -> bool:
        """Give the run its final status, and the hub the news. Returns and raises as :meth:`record`."""
        name = OwnEvents.FINAL_STATUS.value
        return self.record(ledger, name, when, {"status": status.value}, final_by=by, columns=columns)


def finalise_plainly(ledger: Ledger, run: Mapping[str, Any], status: ModelStatus, when: float, by: str) -> bool:
    """The final status alone, for a run whose history cannot be read. Returns and raises as ``UnendedRun.record``."""
    event = Event(OwnEvents.FINAL_STATUS.value, when, {"status": status.value})
    return ledger.append(
        Entry(
            run["run_id"],
            when,
            event,
            (("run_finished", 1.0, {"status": status.value}),),
            {"intent": SALVAGE} if not run["results_uri"] else {},
            final_status=status.value,
            final_by=by,
            outbox=_for_the_hub(run, status.value),
        )
    )


def _for_the_hub(run: Mapping[str, Any], status: str | None) -> tuple[OutboxItem, ...]:
    """The message with a run's final status; nothing without one, or without a model that the hub could know."""
    if status is None:
        return ()
    if run["model_id"] is None:
        report("sentinel", "NoModelId", f"the hub cannot be told that run {run['run_id']} ended: its model is unknown")
        return ()
    return (OutboxItem(run["model_id"], "status", {"status": status}, final=True),)


def _history(ledger: Ledger, run_id: str) -> Iterator[Event]:
    after = 0
    while rows := ledger.events(run_id, after=after, limit=PAGE):
        for row in rows:
            yield Event(row["name"], row["time"], row["attrs"], row["uid"])
        after = rows[-1]["id"]
