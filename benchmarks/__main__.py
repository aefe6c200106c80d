"""``python -m benchmarks``: measure, compare with the goals, write ``results.json``; exit 1 when a goal is missed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import events, hub, imports, jobs, ledger, pages, uploads
from benchmarks.goals import GOALS
from benchmarks.measure import ROOT, Effort, Figure, machine

RESULTS = ROOT / "benchmarks" / "results.json"
GROUPS = {
    "imports": imports.measure,
    "events": events.measure,
    "ledger": ledger.measure,
    "hub": hub.measure,
    "uploads": uploads.measure,
    "pages": pages.measure,
    "jobs": jobs.measure,
}
"""What is measured together, in this order."""


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _entry(figure: Figure) -> dict[str, Any]:
    goal = GOALS[figure.key]
    return {
        "value": round(figure.value, 4),
        "unit": goal.unit,
        "spread": [round(figure.low, 4), round(figure.high, 4)],
        "goal": str(goal),
        "reached": goal.is_reached(figure.value),
        "meaning": goal.meaning,
        "about": figure.about,
    }


def _figures_in(output: Path) -> dict[str, Any]:
    """What the file holds already. What cannot be written in the end is refused before anything is measured.

    Raises:
        typer.BadParameter: it cannot be written, or is no file of figures.
    """
    place = output if output.exists() else output.parent
    if output.is_dir() or not os.access(place, os.W_OK):
        raise typer.BadParameter(f"--output: {output} cannot be written; give a file in a folder that is there")
    if not output.exists():
        return {}
    try:
        figures: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))["figures"]
    except (ValueError, KeyError, TypeError):
        raise typer.BadParameter(f"--output: {output} holds no figures; remove it or give another file") from None
    return figures


def _table(figures: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Benchmarks", title_justify="left")
    table.add_column("figure", overflow="fold")  # names that begin alike are not to be cut
    for name in ("value", "spread", "goal"):
        table.add_column(name, justify="right")
    table.add_column()
    for key, entry in figures.items():
        low, high = entry["spread"]
        mark = "ok" if entry["reached"] else "[bold red]missed[/]"
        if entry["goal"] == "-":
            mark = "reported"
        table.add_row(key, f"{entry['value']:,.4g} {entry['unit']}", f"{low:,.4g} … {high:,.4g}", entry["goal"], mark)
    return table


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer turns and smaller data: a look, not a proof.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"A group: {', '.join(GROUPS)}. Can be given again.")] = None,
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Measure everything, or the groups named with ``--only`` (the others' figures stay in the file)."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    unknown = set(only or ()) - GROUPS.keys()
    if unknown:
        raise typer.BadParameter(f"there is no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    found = _figures_in(output)
    kept = found if only else {}
    figures: dict[str, dict[str, Any]] = {}
    for name in only or GROUPS:
        begun = time.monotonic()
        console.print(f"{name} …", style="dim")
        for figure in GROUPS[name](Effort(full=not quick)):
            figures[figure.key] = _entry(figure)
        console.print(f"{name}: {time.monotonic() - begun:.0f} s", style="dim")
    console.print(_table(figures))
    everything = {key: {**kept, **figures}[key] for key in GOALS if key in kept or key in figures}
    content = {"commit": _commit(), "quick": quick, "machine": machine(), "figures": everything}
    output.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    missed = [key for key, entry in figures.items() if not entry["reached"]]
    if missed:
        console.print(f"Missed: {', '.join(missed)}", style="bold red")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
