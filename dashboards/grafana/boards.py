"""All dashboards, and how they become the JSON files that Grafana reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.grafana import fleet, health, run

FOLDER = Path(__file__).parent.parent / "json"

DASHBOARDS: Mapping[str, Callable[[], Dashboard]] = MappingProxyType(
    {"flip-fleet.json": fleet.build, "flip-run.json": run.build, "flip-health.json": health.build}
)
"""Name of the JSON file to what builds it."""


def rendered(name: str) -> str:
    """The text of a dashboard's JSON file."""
    return f"{JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(DASHBOARDS[name]())}\n"


def write(folder: Path = FOLDER) -> list[Path]:
    """Write all dashboards; returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in DASHBOARDS]
    for path in paths:
        path.write_text(rendered(path.name), encoding="utf-8")
    return paths
