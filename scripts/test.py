"""``make test``: lint, types, and all tests that need no program and no patience.

It says how long each step took, and what it leaves out, which ``make test-all`` plays.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.test_all import PARTS, ROOT

SET_UP = "FLIP_SETUP_SECONDS"
"""Environment variable: how long the makefile took to make the virtual environment; empty when it was there."""


def steps(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Every step and its command.

    Args:
        arguments: further ones for pytest.
    """
    beside = Path(sys.executable).parent
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", os.environ.get("WORKERS", "2")]
    return {
        "ruff check": [str(beside / "ruff"), "check", "."],
        "ruff format": [str(beside / "ruff"), "format", "--check", "."],
        "mypy": [str(beside / "mypy")],
        "pytest": [*pytest, "-m", "not system and not flip", "--strict-skips", "--durations=10", *arguments],
    }


def main(arguments: Sequence[str]) -> int:
    """Take every step, the later ones also when an earlier one failed. Returns 1 when one did."""
    took = {"set-up": float(os.environ.get(SET_UP) or 0)}
    failed = []
    for name, command in steps(arguments).items():
        began = time.monotonic()
        print(f"\n== {name}", flush=True)
        if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode:
            failed.append(name)
        took[name] = time.monotonic() - began
    print("\n" + " · ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items()), end="")
    print(f" · together {sum(took.values()) / 60:.1f} min")
    print("Left out, and played by `make test-all` (one of them: make test-all ARGS=NAME):")
    for part in PARTS:
        print(f"  {part.name:<11} {part.says}")
    print("Look next at README.md, `make demo`, and CONTRIBUTING.md.")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
