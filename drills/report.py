"""The table of drills, for a terminal and for ``docs/reliability.md``."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from drills import ROOT
from drills.judge import Outcome

DOCS = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- drills: begin -->", "<!-- drills: end -->"
COLUMNS = ("drill", "what is broken", "seed", "final statuses", "seconds", "results", "verdict")


def cells(outcome: Outcome) -> tuple[str, ...]:
    """One line of the table."""
    return (
        outcome.drill.name,
        outcome.drill.broken,
        str(outcome.seed),
        _counted(outcome.statuses),
        _seconds(outcome.seconds),
        _results(outcome.results),
        "; ".join([outcome.verdict, *outcome.notes]),
    )


def _counted(values: Sequence[str]) -> str:
    return ", ".join(f"{count} x {value}" if count > 1 else value for value, count in Counter(values).items()) or "-"


def _seconds(values: Sequence[float]) -> str:
    if not values:
        return "-"
    # Before the recovery, even: what had been told already when the fault was over.
    found = [max(0.0, value) for value in values]
    if len(found) == 1:
        return f"{found[0]:.1f}"
    return f"{min(found):.1f} to {max(found):.1f}, median {statistics.median(found):.1f}"


def _results(values: Sequence[str]) -> str:
    archives = sum(int(value) for value in values if value != "none")
    return f"{archives} archive{'s' * (archives != 1)}" if archives else "none"


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print the table."""
    table = Table(*COLUMNS, title="Drills")
    for outcome in outcomes:
        table.add_row(*map(escape, cells(outcome)), style="" if outcome.passed else "bold red")
    console.print(table)
    failed = [outcome.drill.name for outcome in outcomes if not outcome.passed]
    skipped = sum(bool(outcome.skipped) for outcome in outcomes)
    console.print(
        f"{len(outcomes) - len(failed) - skipped} passed, {len(failed)} failed, {skipped} skipped"
        f"{': ' + ', '.join(failed) if failed else ''}"
    )


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """The table as Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, outcomes)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def write_docs(outcomes: Sequence[Outcome]) -> None:
    """Replace the marked section of ``docs/reliability.md`` by this table."""
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{as_markdown(outcomes)}\n{END}{after}", encoding="utf-8")
