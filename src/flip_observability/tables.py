"""The command line's tables. Every text from a run goes through :func:`report.safe` and none is read as markup."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flip_observability.constants import FlareEvents, FlipEvents, OwnEvents
from flip_observability.report import (
    EventLine,
    HubAnswer,
    OutboxLine,
    Receipt,
    RunLine,
    RunReport,
    duration,
    local_time,
    safe,
    size,
)

WIDE = 150
"""Columns from which ids are shown in full; below, their first eight characters, which every command accepts."""

TOLD_ELSEWHERE = frozenset(
    name.value.lstrip("_")
    for name in (
        FlareEvents.AFTER_TASK_DATA_FILTER,
        FlareEvents.BEFORE_PROCESS_SUBMISSION,
        FlareEvents.AFTER_CONTRIBUTION_ACCEPT,
        FlareEvents.BEFORE_AGGREGATION,
        FlareEvents.AFTER_AGGREGATION,
        FlareEvents.BEFORE_LEARNABLE_PERSIST,
        FlareEvents.AFTER_LEARNABLE_PERSIST,
        FlipEvents.SEND_RESULT,
        OwnEvents.HUB_REQUEST,
    )
)
"""Events of every round and client: the timeline leaves them out, as long as they say that all is well."""
_WELL = {"accepted": True, "return_code": "OK"}
_NO_DETAIL = frozenset({"relay", "task_id"})
_NAMES_WORKFLOW = frozenset({FlareEvents.START_WORKFLOW.lstrip("_"), FlareEvents.END_WORKFLOW.lstrip("_")})

_STATUS_STYLES = {"RESULTS_UPLOADED": "green", "STOPPED": "yellow", "ERROR": "red", "RESULTS_UPLOAD_FAILED": "red"}
_HUB_STYLES = {"accepted": "green", "pending": "yellow", "rejected": "red", "expired": "red", "dropped": "red"}


def runs_table(lines: Iterable[RunLine], width: int) -> RenderableType:
    """The runs, newest first, in as many columns as fit."""
    columns = [column for column in _RUN_COLUMNS if width >= column[1]]
    table = _table(*(name for name, _, _ in columns))
    for line in lines:
        table.add_row(*(cell(line, width) for _, _, cell in columns))
    return table


def candidates_table(lines: Iterable[RunLine]) -> RenderableType:
    """The runs that an ambiguous prefix can mean, by their whole ids."""
    table = _table("run", "status", "started")
    for line in lines:
        table.add_row(Text(safe(line.run_id)), _status(line.status), local_time(line.started or line.created))
    return table


def outbox_table(lines: Iterable[OutboxLine], width: int) -> RenderableType:
    """Messages to the hub, oldest first."""
    table = _table("id", "model", "kind", "content", "since", "hub")
    for line in lines:
        kind = f"final {line.kind}" if line.final else line.kind
        content = Text(_details(line.content))
        table.add_row(str(line.id), _id(line.model_id, width), kind, content, local_time(line.created), _hub(line.hub))
    return table


def report_page(report: RunReport, *, all_events: bool) -> RenderableType:
    """Everything about one run, from its identity to its timeline."""
    parts: list[RenderableType] = [_summary(report.run)]
    sections = (
        ("Statuses", _statuses(report)),
        ("Rounds", _rounds(report)),
        ("Clients, the slowest first", _clients(report)),
        ("Results", _results(report)),
        ("Timeline", _timeline(report, all_events)),
    )
    for title, table in sections:
        if table is not None:
            parts += [Text(f"\n{title}", "bold"), Padding(table, (0, 0, 0, 2), expand=False)]
    return Group(*parts)


def receipt_table(receipt: Receipt) -> Table:
    """Where results are, and how to check them."""
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("address", safe(receipt.uri, 2_000)),
        ("size", f"{size(receipt.bytes)} ({receipt.bytes} bytes)" if receipt.bytes is not None else "-"),
        ("files", str(receipt.files) if receipt.files is not None else "-"),
        ("checksum", f"CRC32 {safe(receipt.crc32)}" if receipt.crc32 else "-"),
    ):
        table.add_row(name, Text(value, overflow="fold"))
    return table


def _summary(run: RunLine) -> Table:
    table = Table.grid(padding=(0, 2))
    finished = f"{local_time(run.finished)}, decided by the {safe(run.final_by)}" if run.finished else "-"
    rows: tuple[tuple[str, str | Text], ...] = (
        ("run", safe(run.run_id)),
        ("job", safe(run.job_id or "-")),
        ("model", safe(run.model_id or "-")),
        ("net", safe(run.net_id or "-")),
        ("run directory", safe(run.run_dir or "-", 2_000)),
        ("status", _status(run.status)),
        ("started", local_time(run.started or run.created)),
        ("finished" if run.finished else "last event", finished if run.finished else local_time(run.last_event)),
        ("duration" if run.finished else "so far", duration(run.seconds)),
        ("round", _progress(run)),
        ("problems", ", ".join(f"{safe(kind)} ({local_time(at)})" for kind, at in run.problems.items()) or "none"),
    )
    for name, value in rows:
        table.add_row(name, value if isinstance(value, Text) else Text(value, overflow="fold"))
    return table


def _statuses(report: RunReport) -> Table | None:
    if not report.statuses:
        return None
    table = _table("time", "status", "hub")
    for line in report.statuses:
        status = _status(line.status)
        if line.hub_status != line.status and line.hub.state != "no hub":
            status.append(f" ({safe(line.hub_status, 40)} to the hub)", "dim")
        table.add_row(local_time(line.time), status, _hub(line.hub))
    return table


def _rounds(report: RunReport) -> Table | None:
    if not report.rounds:
        return None
    table = _table("workflow", "round", "started", "duration", "returned", "")
    for line in report.rounds:
        number = f"{line.round}" + (f" of {line.total_rounds}" if line.total_rounds else "")
        returned = f"{'-' if line.returned is None else line.returned} of {line.clients}"
        workflow = Text(safe(line.workflow or "-"))
        table.add_row(workflow, number, local_time(line.started), duration(line.seconds), returned, line.state)
    return table


def _clients(report: RunReport) -> Table | None:
    if not report.clients:
        return None
    table = _table("client", "tasks", "median", "slowest", "failed", "unfinished")
    for line in report.clients:
        where = "" if line.slowest_round is None else f" (round {line.slowest_round})"
        table.add_row(
            Text(safe(line.client, 64)),
            str(line.tasks),
            duration(line.median_seconds),
            duration(line.slowest_seconds) + where,
            str(line.failed) if line.failed else "-",
            str(line.unfinished) if line.unfinished else "-",
        )
    return table


def _results(report: RunReport) -> RenderableType | None:
    parts: list[RenderableType] = []
    for line in report.uploads:
        reason = f": {safe(line.reason)}" if line.reason else ""
        parts.append(Text(f"{local_time(line.started)}  upload {line.state}{reason}, {duration(line.seconds)}"))
    if report.run.results is not None:
        parts.append(receipt_table(report.run.results))
    return Group(*parts) if parts else None


def _timeline(report: RunReport, all_events: bool) -> RenderableType | None:
    shown = [line for line in report.events if all_events or _is_news(line)]
    if not shown:
        return None
    table = _table("time", "after", "event", "details")
    for line in shown:
        after = f"+{line.offset:.1f} s"
        details = dict(line.attrs)
        if line.name not in _NAMES_WORKFLOW:
            details.pop("workflow", None)  # on every event: once is enough
        table.add_row(local_time(line.time), after, Text(safe(line.name, 64)), Text(_details(details)))
    left_out = len(report.events) - len(shown)
    if not left_out:
        return table
    return Group(table, Text(f"{left_out} events of rounds and clients left out; --all shows them.", "dim"))


def _is_news(line: EventLine) -> bool:
    well = all(line.attrs.get(name, value) == value for name, value in _WELL.items())
    return line.name not in TOLD_ELSEWHERE or not well


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        # What a person copies is never cut; only free text may be folded.
        free = name in ("content", "details", "problems")
        table.add_column(name, no_wrap=not free, overflow="fold")
    return table


def _id(value: str | None, width: int) -> Text:
    text = safe(value or "-", 64)
    return Text(text if width >= WIDE else text[:8])


def _status(status: str | None) -> Text:
    return Text(safe(status or "-", 40), _STATUS_STYLES.get(status or "", ""))


def _progress(run: RunLine) -> str:
    if run.round is None:
        return "-"
    return f"{run.round}/{run.total_rounds}" if run.total_rounds else str(run.round)


def _hub(answer: HubAnswer) -> Text:
    parts = [answer.state]
    if answer.at is not None:
        parts.append(local_time(answer.at))
    if answer.state == "no hub":
        parts[0] += f" ({safe(answer.answer)})"
    elif answer.answer and answer.state != "accepted":
        parts.append(f"last answer {safe(answer.answer)}")
    if answer.attempts > 1 or (answer.attempts and answer.state == "pending"):
        parts.append(f"{answer.attempts} attempts")
    if answer.next_attempt is not None:
        parts.append(f"next at {local_time(answer.next_attempt)}")
    return Text(", ".join(parts), _HUB_STYLES.get(answer.state, ""))


def _details(attrs: Mapping[str, Any]) -> str:
    shown = (f"{safe(name, 40)}={_value(value)}" for name, value in attrs.items() if name not in _NO_DETAIL)
    return safe(" ".join(shown), 600)


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else safe(value)


_RUN_COLUMNS: tuple[tuple[str, int, Callable[[RunLine, int], str | Text]], ...] = (
    ("run", 0, lambda line, width: _id(line.run_id, width)),
    ("model", 90, lambda line, width: _id(line.model_id, width)),
    ("status", 0, lambda line, width: _status(line.status)),
    ("hub", 0, lambda line, width: Text(line.hub.state, _HUB_STYLES.get(line.hub.state, ""))),
    ("round", 0, lambda line, width: _progress(line)),
    ("started", 75, lambda line, width: local_time(line.started or line.created)),
    ("duration", 100, lambda line, width: duration(line.seconds)),
    ("problems", 110, lambda line, width: Text(safe(", ".join(line.problems)) or "-")),
    ("net", WIDE, lambda line, width: Text(safe(line.net_id or "-", 24))),
)
"""Column, the width of the screen from which it is shown, and what stands in it."""
