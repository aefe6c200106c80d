"""Grafana's part of a dashboard, for tests: which queries it asks, with what in the place of variables and macros."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_tools import Prometheus

MACROS = {"__rate_interval": "20s", "__interval": "5s", "__range": "900s", "__range_s": "900"}
"""For a Prometheus that scrapes every second, looked at for a quarter of an hour."""
WINDOW_SECONDS = 900.0


@dataclass(frozen=True)
class Asked:
    """One query of a dashboard.

    Attributes:
        where: the panel's, variable's or annotation's name, and which of its queries this is.
        expr: PromQL with variables and macros.
        instant: asked for the end of the window only.
    """

    where: str
    expr: str
    instant: bool


def panel_queries(dashboard: Mapping[str, Any]) -> Iterator[Asked]:
    """PromQL of all panels."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            if target["datasource"]["type"] == "prometheus":
                yield Asked(f"{panel['title']} / {target['refId']}", target["expr"], bool(target.get("instant")))


def annotation_queries(dashboard: Mapping[str, Any]) -> Iterator[Asked]:
    """PromQL of all annotations."""
    for annotation in dashboard.get("annotations", {}).get("list", []):
        if annotation["datasource"].get("type") == "prometheus":
            yield Asked(f"annotation {annotation['name']}", annotation["expr"], instant=False)


def query_variables(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The variables that Prometheus is asked for."""
    return [variable for variable in dashboard["templating"]["list"] if variable["type"] == "query"]


def substituted(text: str, variables: Mapping[str, str]) -> str:
    """The text with variables and macros replaced as Grafana does; what it does not know stays, as ``$1`` does."""
    known = {**MACROS, **variables}
    return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda match: known.get(match[1] or match[2], match[0]), text)


def values_of(
    prometheus: Prometheus, variable: Mapping[str, Any], variables: Mapping[str, str], at: float
) -> list[str]:
    """The values that Grafana would offer for a variable, in their order."""
    text = substituted(variable["query"]["query"], variables)
    label = re.fullmatch(r"label_values\((.+),\s*(\w+)\)", text)
    if label:
        return prometheus.label_values(label[2], label[1])
    asked = re.fullmatch(r"query_result\((.+)\)", text, re.DOTALL)
    assert asked, f"no query of a variable that Grafana understands: {text}"
    lines = [_as_text(series) for series in prometheus.query(asked[1], at)]
    pattern = re.compile(variable["regex"].strip("/"))
    return [found[1] for line in lines if (found := pattern.search(line))]


def _as_text(series: Mapping[str, Any]) -> str:
    """A result as the regular expression of a ``query_result`` variable sees it."""
    labels = ",".join(f'{name}="{value}"' for name, value in series["metric"].items() if name != "__name__")
    when, value = series["value"]
    return f"{series['metric'].get('__name__', '')}{{{labels}}} {value} {when * 1000:.0f}"


def has_data(prometheus: Prometheus, asked: Asked, variables: Mapping[str, str], end: float) -> bool:
    """Whether a query gives at least one number.

    Raises:
        AssertionError: Prometheus does not understand it.
    """
    expr = substituted(asked.expr, variables)
    if asked.instant:
        samples = [series["value"] for series in prometheus.query(expr, end)]
    else:
        found = prometheus.query_range(expr, end - WINDOW_SECONDS, end, step=1.0)
        samples = [sample for series in found for sample in series["values"]]
    return any(math.isfinite(float(value)) for _, value in samples)
