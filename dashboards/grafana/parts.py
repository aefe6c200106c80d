"""What dashboards are made of: queries, a few kinds of panels, variables, annotations, links, and the board itself."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

PROMETHEUS = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
TEMPO = models.DataSourceRef(type_val="tempo", uid="${tempo}")
FLEET, RUN, HEALTH = "flip-fleet", "flip-run", "flip-health"
JOB = "flip-observability"
"""The scrape job of our exporters, and the tag of all our dashboards."""

GREEN, AMBER, RED, GRAY, BLUE, TEXT = "green", "orange", "red", "#8e8e8e", "blue", "text"

STATUSES: Mapping[str, str] = {
    "PENDING": GRAY,
    "INITIATED": "light-blue",
    "PREPARED": "blue",
    "TRAINING_STARTED": "purple",
    "RUNNING": "purple",
    "RESULTS_UPLOADED": GREEN,
    "STOPPED": "yellow",
    "RESULTS_UPLOAD_FAILED": "dark-orange",
    "ERROR": RED,
}
"""Every status and its colour, in the order in which a run passes through them."""
FINAL = "RESULTS_UPLOADED|ERROR|STOPPED|RESULTS_UPLOAD_FAILED"
FAILED = "ERROR|RESULTS_UPLOAD_FAILED"

TRACE_ID = '"trace_id", "$1$2$3$4$5", "run_id", "(.{8})-(.{4})-(.{4})-(.{4})-(.{12})"'
"""Last arguments of ``label_replace``: a run's trace id is its run id without hyphens, which is how Tempo wants it."""

Steps = Sequence["tuple[float | None, str]"]
Panel = TypeVar("Panel", stat.Panel, timeseries.Panel, table.Panel, bargauge.Panel, statetimeline.Panel)


class AnyPanel(Protocol):
    """The builder of a panel, of whatever kind."""

    def id(self, id_val: int) -> Any:
        """Give it its number."""


@dataclass(frozen=True)
class Query:
    """One PromQL query of a panel.

    Args:
        expr: with Grafana's variables and macros.
        legend: how its series are called.
        instant: asked once, for the end of the time shown, instead of for all of it.
        exemplars: show the traces that are behind the numbers.
    """

    expr: str
    legend: str = ""
    instant: bool = False
    exemplars: bool = False


# -- panels ------------------------------------------------------------------------------------------------------------


def number(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    steps: Steps = ((None, TEXT),),
    span: int = 3,
    height: int = 4,
    none: str = "no data",
    texts: Mapping[float, tuple[str, str]] | None = None,
    links: Iterable[models.DashboardLink] = (),
    background: bool = False,
) -> stat.Panel:
    """A big number: the last value in the time shown.

    Args:
        title: its title.
        description: what it means, for somebody who sees it for the first time.
        queries: of it.
        unit: Grafana's name of it.
        steps: from which value on it has which colour.
        span: width, of 24.
        height: in Grafana's rows.
        none: what stands there when there are no data.
        texts: value to the text and colour to be shown instead.
        links: where a click leads.
        background: whether the colour fills the panel.
    """
    panel = _panel(stat.Panel(), title, description, queries, unit=unit, steps=steps, span=span, height=height)
    fill = common_models.BigValueColorMode.BACKGROUND if background else common_models.BigValueColorMode.VALUE
    panel = (
        panel.color_mode(fill)
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .justify_mode(common_models.BigValueJustifyMode.CENTER)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .no_value(none)
    )
    return _linked(_worded(panel, texts), links)


def lines(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    steps: Steps | None = None,
    span: int = 12,
    height: int = 8,
    colours: Mapping[str, str] | None = None,
    bars: bool = False,
    steady: bool = False,
    minimum: float | None = 0,
) -> timeseries.Panel:
    """Values over time.

    Args:
        title: its title.
        description: what it means.
        queries: of it.
        unit: Grafana's name of it.
        steps: thresholds, drawn as dashed lines; None for none.
        span: width, of 24.
        height: in Grafana's rows.
        colours: series to colour.
        bars: stacked bars, for counts of things that happen now and then.
        steady: a value holds until the next one.
        minimum: where the axis begins; None leaves it to Grafana.
    """
    panel = _panel(timeseries.Panel(), title, description, queries, unit=unit, steps=steps, span=span, height=height)
    mode = common_models.TooltipDisplayMode.MULTI
    panel = (
        panel.line_width(2)
        .fill_opacity(8)
        .show_points(common_models.VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.TABLE)
            .placement(common_models.LegendPlacement.RIGHT if span > 8 else common_models.LegendPlacement.BOTTOM)
            .calcs(["max", "lastNotNull"])
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(mode).sort(common_models.SortOrder.DESCENDING))
    )
    if minimum is not None:
        panel.min(minimum)
    if steps is not None:
        style = common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.DASHED)
        panel.thresholds_style(style)
    if steady:
        panel.line_interpolation(common_models.LineInterpolation.STEP_AFTER)
    if bars:
        panel.draw_style(common_models.GraphDrawStyle.BARS).fill_opacity(80).line_width(0)
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    for name, colour in (colours or {}).items():
        panel.override_by_name(name, [_fixed(colour)])
    return panel


def ranking(
    title: str, description: str, *queries: Query, unit: str, steps: Steps, span: int = 12, height: int = 8
) -> bargauge.Panel:
    """One bar for each series, the longest first when the query sorts them; arguments as of :func:`number`."""
    panel = _panel(bargauge.Panel(), title, description, queries, unit=unit, steps=steps, span=span, height=height)
    return (
        panel.orientation(common_models.VizOrientation.HORIZONTAL)
        .display_mode(common_models.BarGaugeDisplayMode.BASIC)
        .value_mode(common_models.BarGaugeValueMode.COLOR)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .min(0)
    )


def timeline(
    title: str,
    description: str,
    *queries: Query,
    texts: Mapping[float, tuple[str, str]],
    span: int = 24,
    height: int = 5,
) -> AnyPanel:
    """Lanes of states over time. ``texts``: value to the text and colour of its state."""
    panel = _panel(
        statetimeline.Panel(), title, description, queries, unit="none", steps=None, span=span, height=height
    )
    panel = (
        panel.merge_values(True)
        .show_value(common_models.VisibilityMode.AUTO)
        .row_height(0.8)
        .fill_opacity(85)
        .legend(common.VizLegendOptions().show_legend(False))
    )
    return cast(AnyPanel, _worded(panel, texts))


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        field: the label, or ``Value #A``, that it shows.
        title: its heading.
        unit: Grafana's name of it; empty for text.
        steps: from which value on it has which colour.
        texts: text to the colour behind it.
        links: where a click leads.
        width: in pixels; 0 leaves it to Grafana.
    """

    field: str
    title: str
    unit: str = ""
    steps: Steps = ()
    texts: Mapping[str, str] | None = None
    links: tuple[models.DashboardLink, ...] = ()
    width: int = 0


def rows(
    title: str,
    description: str,
    *queries: Query,
    columns: Sequence[Column],
    sort: str,
    span: int = 24,
    height: int = 10,
    descending: bool = False,
    none: str = "Nothing.",
) -> AnyPanel:
    """A table of which each row is one set of labels, joined over all queries.

    Args:
        title: its title.
        description: what it means.
        queries: each gives a column ``Value #A``, ``Value #B``, …; what they have in common joins them.
        columns: what is shown, in order. Nothing else is.
        sort: heading of the column to sort by.
        span: width, of 24.
        height: in Grafana's rows.
        descending: sort from the top.
        none: what stands there when there are no data.
    """
    panel = _panel(table.Panel(), title, description, queries, unit="none", steps=None, span=span, height=height)
    shown = [column.field for column in columns]
    panel.align(common_models.FieldTextAlignment.AUTO).no_value(none).sort_by(
        [common.TableSortByFieldState().display_name(sort).desc(descending)]
    )
    panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    panel.with_transformation(
        models.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": shown, "pattern": ""}})
    )
    organised = {
        "indexByName": {field: place for place, field in enumerate(shown)},
        "renameByName": {column.field: column.title for column in columns},
        "excludeByName": {},
    }
    panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=organised))
    for column in columns:
        panel.override_by_name(column.title, _column_properties(column))
    return cast(AnyPanel, panel)


def _column_properties(column: Column) -> list[models.DynamicConfigValue]:
    found = []
    if column.unit:
        found.append(_property("unit", column.unit))
    if column.steps:
        found.append(_property("thresholds", {"mode": "absolute", "steps": _json_steps(column.steps)}))
        found.append(_property("custom.cellOptions", {"type": "color-text"}))
    if column.texts:
        options = {
            text: {"text": text, "color": colour, "index": n} for n, (text, colour) in enumerate(column.texts.items())
        }
        found.append(_property("mappings", [{"type": "value", "options": options}]))
        found.append(_property("custom.cellOptions", {"type": "color-background", "mode": "basic"}))
    if column.links:
        found.append(_property("links", [link.to_json() for link in column.links]))
    if column.width:
        found.append(_property("custom.width", column.width))
    return found


def trace(title: str, description: str, query: Callable[[], Any], *, span: int = 24, height: int = 16) -> AnyPanel:
    """The spans of one trace; ``query`` builds Tempo's query."""
    panel = dashboard.Panel().type("traces").title(title).description(description).datasource(TEMPO)
    return cast(AnyPanel, panel.span(span).height(height).unit("ms").with_target(query()))


def _panel(
    panel: Panel,
    title: str,
    description: str,
    queries: Iterable[Query],
    *,
    unit: str,
    steps: Steps | None,
    span: int,
    height: int,
) -> Panel:
    is_table = isinstance(panel, table.Panel)
    panel.title(title).description(description).datasource(PROMETHEUS).span(span).height(height).unit(unit)
    for place, query in enumerate(queries):
        panel.with_target(_target(query, "ABCDEFGHIJ"[place], as_table=is_table))
    panel.thresholds(_thresholds(steps or ((None, TEXT if is_table else GREEN),)))
    return panel


def _target(query: Query, ref: str, *, as_table: bool) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).ref_id(ref).datasource(PROMETHEUS)
    target.exemplar(query.exemplars)
    if query.legend:
        target.legend_format(query.legend)
    if as_table:
        target.format(PromQueryFormat.TABLE)
    if query.instant or as_table:
        return target.instant()
    return target.range()


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    found = [models.Threshold(value=value, color=colour) for value, colour in steps]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(found)


def _json_steps(steps: Steps) -> list[dict[str, object]]:
    return [{"value": value, "color": colour} for value, colour in steps]


def _worded(panel: Panel, texts: Mapping[float, tuple[str, str]] | None) -> Panel:
    if texts:
        options = {
            f"{value:g}": models.ValueMappingResult(text=text, color=colour, index=place)
            for place, (value, (text, colour)) in enumerate(texts.items())
        }
        panel.mappings([models.ValueMap(options=options)])
    return panel


def _linked(panel: Panel, links: Iterable[models.DashboardLink]) -> Panel:
    found = list(links)
    if found:
        panel.data_links([_Given(link) for link in found])
    return panel


class _Given(dashboard.DashboardLink):
    """A builder of something that is built."""

    def __init__(self, link: models.DashboardLink) -> None:
        super().__init__(link.title)
        self._internal = link


def _property(name: str, value: object) -> models.DynamicConfigValue:
    return models.DynamicConfigValue(id_val=name, value=value)


def _fixed(colour: str) -> models.DynamicConfigValue:
    return _property("color", {"mode": "fixed", "fixedColor": colour})


# -- links -------------------------------------------------------------------------------------------------------------


def link_to(title: str, uid: str, **variables: str) -> models.DashboardLink:
    """A link to a dashboard of ours, over the same time; ``variables`` set that one's."""
    query = "".join(f"&var-{name}={value}" for name, value in variables.items())
    return models.DashboardLink(
        title=title, url=f"/d/{uid}?${{__url_time_range}}&var-datasource=${{datasource}}{query}"
    )


def link_to_trace(title: str, trace_id: str) -> models.DashboardLink:
    """A link to a trace in Grafana's explorer; ``trace_id`` is a variable or field of Grafana's."""
    source = {"type": "tempo", "uid": "${tempo}"}
    query = {"refId": "A", "datasource": source, "queryType": "traceql", "query": trace_id}
    pane = {"datasource": "${tempo}", "queries": [query], "range": {"from": "${__from}", "to": "${__to}"}}
    text = urllib.parse.quote(json.dumps({"trace": pane}, separators=(",", ":")), safe="${}[]:,._")
    return models.DashboardLink(title=title, url=f"/explore?schemaVersion=1&panes={text}", target_blank=True)


# -- variables ---------------------------------------------------------------------------------------------------------


def data_sources() -> list[dashboard.DatasourceVariable]:
    """The variables for where metrics and traces come from."""
    return [
        dashboard.DatasourceVariable("datasource").label("Metrics").type("prometheus"),
        dashboard.DatasourceVariable("tempo").label("Traces").type("tempo"),
    ]


def variable(
    name: str,
    label: str,
    query: str,
    *,
    regex: str = "",
    multi: bool = False,
    with_all: bool = False,
    hidden: bool = False,
    sort: models.VariableSort = models.VariableSort.DISABLED,
) -> dashboard.QueryVariable:
    """A variable whose values Prometheus knows.

    Args:
        name: as in ``$name``.
        label: what the user reads.
        query: ``label_values(…)`` or ``query_result(…)``.
        regex: takes the value out of each result of ``query_result``.
        multi: several values may be chosen.
        with_all: offer "All", which is also what it begins with.
        hidden: not shown, for it follows from others.
        sort: order of the values.
    """
    kind = 3 if query.startswith("query_result") else 1
    found = (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(PROMETHEUS)
        .query({"qryType": kind, "query": query, "refId": f"variable-{name}"})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(sort)
        .multi(multi)
        .include_all(with_all)
    )
    if regex:
        found.regex(regex)
    if with_all:
        found.all_value(".*").current(models.VariableOption(text="All", value="$__all", selected=True))
    if hidden:
        found.hide(models.VariableHide.HIDE_VARIABLE)
    return found


# -- annotations -------------------------------------------------------------------------------------------------------


class Moment(models.AnnotationQuery):
    """An annotation at the times that are a query's values (milliseconds), which the SDK's class has no fields for."""

    EXTRA = frozenset({"useValueForTime", "titleFormat", "textFormat", "tagKeys", "step"})

    def __init__(self, name: str, expr: str, colour: str, text: str) -> None:
        super().__init__(name=name, expr=expr, icon_color=colour, datasource=PROMETHEUS, enable=True)
        self.text = text

    def to_json(self) -> dict[str, object]:
        """The annotation as Grafana reads it."""
        own = {
            "useValueForTime": True,
            "titleFormat": self.name,
            "textFormat": self.text,
            "tagKeys": "kind",
            "step": "60s",
        }
        return cast(dict[str, object], super().to_json()) | own


class _Moment(dashboard.AnnotationQuery):
    def __init__(self, moment: Moment) -> None:
        super().__init__()
        self._internal = moment


def problem(name: str, kind: str, colour: str, selector: str) -> Moment:
    """An annotation when a problem of a kind happened to a run that ``selector`` selects."""
    series = f'flip_run_problem_timestamp_seconds{{{selector}, kind=~"{kind}"}}'
    expr = f"max by (net_id, run_id, model_id, kind) ({series}) * 1000"
    return Moment(name, expr, colour, "{{kind}} of run {{run_id}}, model {{model_id}}")


# -- the board ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A row of a dashboard and the panels in it."""

    title: str
    panels: Sequence[AnyPanel]


def board(
    uid: str,
    title: str,
    description: str,
    sections: Sequence[Section],
    *,
    variables: Iterable[dashboard.QueryVariable | dashboard.DatasourceVariable],
    annotations: Iterable[Moment] = (),
    since: str = "now-24h",
    refresh: str = "30s",
) -> models.Dashboard:
    """A whole dashboard.

    Args:
        uid: as in its address.
        title: its title.
        description: what it is for.
        sections: from top to bottom.
        variables: from left to right; one may use those before it.
        annotations: what is marked in its graphs.
        since: where the time shown begins at first.
        refresh: how often it asks again.
    """
    found = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([JOB])
        .readonly()
        .time(since, "now")
        .refresh(refresh)
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("FLIP")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([JOB])
            .include_vars(True)
            .keep_time(True)
        )
    )
    for given in variables:
        found.with_variable(given)
    for annotation in annotations:
        found.annotation(_Moment(annotation))
    number_of_panel = 0
    for section in sections:
        number_of_panel += 1
        found.with_row(dashboard.Row(section.title).id(number_of_panel))
        for panel in section.panels:
            number_of_panel += 1
            found.with_panel(panel.id(number_of_panel))
    return found.build()
