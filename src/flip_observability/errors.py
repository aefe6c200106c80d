"""Errors of our own: counted, and logged once per kind and minute, without the messages that may hold patient data."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter

log = logging.getLogger("flip_observability")

QUIET_SECONDS = 60.0

_lock = threading.Lock()
_counts: Counter[str] = Counter()
_logged: dict[tuple[str, str], float] = {}


def report(component: str, error: BaseException | str, what: str) -> None:
    """Count an error and log it, unless the same kind was logged within the last minute.

    Args:
        component: which part of ours failed (the ``component`` label of ``flip_observability_errors_total``).
        error: an exception, of which the type alone is used, or a word for what happened.
        what: what could not be done and what becomes of it, for the person who reads the log.
    """
    kind = error if isinstance(error, str) else type(error).__name__
    now = time.monotonic()
    with _lock:
        _counts[component] += 1
        last = _logged.get((component, kind))
        if last is not None and now - last < QUIET_SECONDS:
            return
        if len(_logged) > 1_000:
            _logged.clear()
        _logged[component, kind] = now
    log.error("%s: %s (%s)", component, what, kind)


def drain() -> dict[str, int]:
    """The counts since the last call, for the ledger."""
    with _lock:
        counts = dict(_counts)
        _counts.clear()
    return counts
