"""A hub that takes every call and remembers it, so that two runs can be compared by what they have told it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from flip_observability.demo.hub import EmbeddedHub, HubRecord, _Answer

Call = tuple[Hashable, ...]


class RecordingHub(EmbeddedHub):
    """Accepts what it is sent, and says in the record's ``problem`` what the strict hub of the demo thinks of it."""

    def __init__(self) -> None:
        super().__init__("2026-10")

    def __enter__(self) -> RecordingHub:
        super().__enter__()
        return self

    def _judge(self, method: str, path: str, low: Mapping[str, str], body: bytes | None) -> _Answer:
        verdict = super()._judge(method, path, low, body)
        payload = json.loads(body) if body else None
        return dataclasses.replace(verdict, code=200, payload=payload)


def call(record: HubRecord) -> Call:
    """What a request says, whatever the order of its keys and whoever fills in defaults."""
    if record.kind == "status":
        return ("status", record.status)
    said: Mapping[str, Any] = record.payload or {}
    known = {"fl_client_name", "global_round", "label", "result", "x_value", "x_label"}
    if record.kind == "metrics" and set(said) <= known:
        axis = said.get("x_value")
        return (
            "metric",
            said.get("fl_client_name"),
            said.get("label"),
            ("round", said.get("global_round")),
            ("x", said.get("global_round") if axis is None else axis, said.get("x_label") or "Global Rounds"),
            round(said.get("result", 0.0), 4),
        )
    # Nulls are as good as absent for the hub; everything else counts.
    return (record.kind, *((name, _plain(value)) for name, value in sorted(said.items()) if value is not None))


def _plain(value: Any) -> Hashable:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def calls(records: Iterable[HubRecord]) -> list[Call]:
    """The calls that the hub has accepted."""
    return [call(record) for record in records if record.accepted]
