"""Log records of a run carry its trace and span id, under the names that OpenTelemetry's own logging integration uses.

Every record of the process has ``otelTraceID``, ``otelSpanID``, ``otelTraceSampled`` and ``otelServiceName`` once a run
is recorded. A format that names them needs :class:`RunIds` on its handler, for the records of other processes and those
from before a run. Records on which somebody else has put ids keep those.
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


class RunIds(logging.Filter):
    """For a handler whose format names the ids, in a logging configuration: records that have none say so.

    Without it such a record cannot be formatted and is lost. Every record passes.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Put on what is missing."""
        if not hasattr(record, "otelTraceID"):
            _put(record, None)
        return True


def _put(record: logging.LogRecord, ids: tuple[str, str] | None) -> None:
    record.otelTraceID, record.otelSpanID = ids or (NONE, NONE)
    record.otelTraceSampled = ids is not None
    record.otelServiceName = getattr(record, "otelServiceName", "") or SERVICE_NAME


def _factory(make: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        if getattr(made, "otelTraceID", NONE) != NONE:
            return made
        ids = _ids
        _put(made, ids() if ids is not None else None)
        return made

    return record
