"""Errors of our own: counted, and logged once per kind and minute, without the messages that may hold patient data.

All that this package logs goes through the loggers of :func:`logger`, whose lines nobody outside can break: a run's id
from a ledger, a bucket's error code, a client's name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter

from flip_observability.utils import safe_text

QUIET_SECONDS = 60.0
MAX_LOGGED = 1_000
"""Characters of one text in a line of the log."""


class _OneLine(logging.Filter):
    """Makes every text that a line is filled in with a part of one line: cleaned of control characters, and cut."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                arg if isinstance(arg, (int, float)) else safe_text(arg, MAX_LOGGED) for arg in record.args
            )
        return True


_one_line = _OneLine()


def logger(name: str) -> logging.Logger:
    """The logger of a module of ours, for ``__name__``. Texts from outside are its messages' arguments, as always.

    A logger's own filter is at work whoever configures logging, and whenever.
    """
    made = logging.getLogger(name)
    made.addFilter(_one_line)  # not a second time
    return made


log = logger("flip_observability")

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
