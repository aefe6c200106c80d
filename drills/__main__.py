"""``python -m drills``: break things, and print a table of what became of them."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from drills.report import show, write_docs
from drills.runner import choose, run_all
from drills.table import DRILLS


def main(argv: list[str] | None = None) -> int:
    """Run drills.

    Returns:
        0 when all of them passed, otherwise 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m drills", description="Drills: what is broken, and what comes of it."
    )
    parser.add_argument("--seed", type=int, default=None, help="of the random moments (default: a random one)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a drill, or a group; repeatable")
    parser.add_argument("--quick", action="store_true", help="the subset that is part of the tests, in small")
    parser.add_argument("--times", type=int, default=1, help="how often, each time with the next seed")
    parser.add_argument("--write-docs", action="store_true", help="put the (last) table into docs/reliability.md")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep ledgers and logs of drills that fail")
    parser.add_argument("--list", action="store_true", help="only name them")
    arguments = parser.parse_args(argv)
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)
    if unknown := [name for name in arguments.only if not choose(DRILLS, [name], quick=False)]:
        parser.error(f"no such drill or group: {', '.join(unknown)}")
    if arguments.times < 1:
        parser.error(f"--times: {arguments.times} is no number of runs; give 1 or more")
    drills = choose(DRILLS, arguments.only, quick=arguments.quick)
    if arguments.list:
        for drill in drills:
            console.print(f"{drill.name:24} {drill.group:10} {drill.broken}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the processes of a drill end with it
    first = random.SystemRandom().randrange(1, 100_000) if arguments.seed is None else arguments.seed
    passed = True
    for seed in range(first, first + arguments.times):
        with tempfile.TemporaryDirectory(prefix="flip-drills-") as home:
            outcomes = run_all(drills, Path(home), seed, full=not arguments.quick, console=console, keep=arguments.keep)
        show(outcomes, console)
        passed = passed and all(outcome.passed for outcome in outcomes)
    if arguments.write_docs:
        write_docs(outcomes)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
