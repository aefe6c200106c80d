"""What is done to log records as they are made: a run's get its ids, those that may hold secrets lose their text.

Log records of a run carry its trace and span id, under the names that OpenTelemetry's own logging integration uses.
Every record of the process has ``otelTraceID``, ``otelSpanID``, ``otelTraceSampled`` and ``otelServiceName`` once a run
is recorded. A format that names them needs :class:`RunIds` on its handler, for the records of other processes and those
from before a run. Records on which somebody else has put ids keep those.

The libraries that call the bucket, the hub and the collector log whole requests and answers at the level DEBUG, and
with them session tokens, keys and headers. :func:`keep_secrets_out` empties these records for good.
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

LEFT_OUT = "(not logged: it may hold a secret)"
"""What a record says that was emptied."""

_TALKATIVE = ("boto3", "botocore", "grpc", "opentelemetry.exporter", "requests", "s3transfer", "urllib3")
"""Loggers of the libraries through which our calls go. What they, and those below them, log under INFO is left out."""
_BELOW = tuple(f"{name}." for name in _TALKATIVE)

_lock = threading.Lock()
_ids: Ids | None = None
_is_marked = False
"""Whether a run was ever recorded here: from then on every record has ids, if only those that say none."""


def put_on_records(ids: Ids) -> None:
    """From now on log records carry what ``ids`` gives: trace and span id in hexadecimal, or None.

    Args:
        ids: is called for every record, on whichever thread; it must neither wait nor log.
    """
    global _ids, _is_marked
    with _lock:
        _ids, _is_marked = ids, True
        _install()


def take_off_records(ids: Ids) -> None:
    """Undo :func:`put_on_records`, unless somebody else's ids are on the records by now."""
    global _ids
    with _lock:
        if _ids == ids:
            _ids = None


def keep_secrets_out() -> None:
    """From now on the libraries that our calls go through log nothing below INFO that says anything.

    Called wherever a client of ours is made, before it is. Their levels are raised so that nothing is logged in vain;
    a configuration of logging that is read later may lower them again, and what is emptied are the records themselves.
    Nobody else's loggers and records are touched.
    """
    with _lock:
        _install()
    for name in _TALKATIVE:
        logger = logging.getLogger(name)
        if logger.getEffectiveLevel() < logging.INFO:
            logger.setLevel(logging.INFO)


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


def _install() -> None:
    """Put our factory around whatever makes records now, unless it is at work already, maybe inside somebody else's.

    It stays for good: somebody may have wrapped it meanwhile.
    """
    make = logging.getLogRecordFactory()
    probe = make(_TALKATIVE[0], logging.DEBUG, __file__, 0, "", (), None)
    if probe.msg != LEFT_OUT:
        logging.setLogRecordFactory(_factory(make))


def _factory(make: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        if made.levelno and made.levelno < logging.INFO and _is_talkative(made.name):
            _empty(made)
        if not _is_marked or getattr(made, "otelTraceID", NONE) != NONE:
            return made
        ids = _ids
        _put(made, ids() if ids is not None else None)
        return made

    return record


def _is_talkative(name: object) -> bool:
    return isinstance(name, str) and (name in _TALKATIVE or name.startswith(_BELOW))


def _empty(record: logging.LogRecord) -> None:
    record.msg, record.args = LEFT_OUT, ()
    record.exc_info = record.exc_text = record.stack_info = None
