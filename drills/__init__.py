"""Drills: things are broken on purpose, and what the hub and the bucket hold in the end is judged.

``python -m drills`` runs them all and prints a table; ``docs/reliability.md`` says what each of them shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""

if str(ROOT / "tests") not in sys.path:
    # Sites whose processes can be killed, servers that misbehave: the tests' own, which are no package.
    sys.path.append(str(ROOT / "tests"))
