"""Log records of a run carry its trace and span id, under the names that OpenTelemetry's own logging integration uses.

Every record of the process has ``otelTraceID``, ``otelSpanID``, ``otelTraceSampled`` and ``otelServiceName`` once a run
is recorded, so that a format may name them. Records on which somebody else has put ids keep those.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from flip_observability.tracing import SERVICE_NAME

NONE = "0"
"""What a record says that belongs to no span."""

Ids = Callable[[], "tuple[str, str] | None"]

_lock = threading.Lock()
_installed: Callable[..., logging.LogRecord] | None = None
_ids: Ids | None = None


def put_on_records(ids: Ids) -> None:
    """From now on log records carry what ``ids`` gives: trace and span id in hexadecimal, or None.

    Args:
        ids: is called for every record, on whichever thread; it must neither wait nor log.
    """
    global _ids, _installed
    with _lock:
        _ids = ids
        if _installed is None or logging.getLogRecordFactory() is not _installed:
            # Around whatever makes records now. It stays for good: somebody may have wrapped it meanwhile.
            _installed = _factory(logging.getLogRecordFactory())
            logging.setLogRecordFactory(_installed)


def take_off_records(ids: Ids) -> None:
    """Undo :func:`put_on_records`, unless somebody else's ids are on the records by now."""
    global _ids
    with _lock:
        if _ids == ids:
            _ids = None


def _factory(make: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        if getattr(made, "otelTraceID", NONE) != NONE:
            return made
        ids = _ids
        found = ids() if ids is not None else None
        made.otelTraceID, made.otelSpanID = found or (NONE, NONE)
        made.otelTraceSampled = found is not None
        made.otelServiceName = getattr(made, "otelServiceName", "") or SERVICE_NAME
        return made

    return record
