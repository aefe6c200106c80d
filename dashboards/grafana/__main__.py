"""Write the dashboards' JSON files."""

from __future__ import annotations

import sys

from dashboards.grafana.boards import write

if __name__ == "__main__":
    for path in write():
        sys.stdout.write(f"{path}\n")
