"""Whether an upload moves. One that is slow is waited for; one of which nobody takes a byte is given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

_T = TypeVar("_T")

LOOK_SECONDS = 0.25
STOPPED_SECONDS = 2.0
"""A look that comes so much later than it should: this process was stopped, or starved, and the bucket was not."""


class Pace:
    """When the bucket last took something of an upload. Safe to use from any number of threads.

    Args:
        limit: the seconds without a byte after which the upload is given up, asked at every look, because an abort
            makes them fewer. None waits as long as each call may take.
    """

    def __init__(self, limit: Callable[[], float] | None = None) -> None:
        self.limit = limit
        self.stalled = False
        self.failure: Exception | None = None
        self._lock = threading.Lock()
        self._since = time.monotonic()
        self._more = 0.0

    def moved(self, owed: float = 0.0) -> None:
        """Something was taken.

        Args:
            owed: seconds that stay counted: what is sent once more, after a failure, is no news.
        """
        with self._lock:
            self._since = max(self._since, time.monotonic() - owed)

    def quiet(self) -> float:
        """Seconds since something was taken."""
        with self._lock:
            return time.monotonic() - self._since

    def allow(self, more: float) -> None:
        """From now on, ``more`` seconds above the limit: the bucket has all bytes and works on them."""
        self.moved()
        self._more = more

    def wait(self, futures: Collection[Future[_T]], seconds: float) -> tuple[set[Future[_T]], set[Future[_T]]]:
        """Wait for one of several calls: those that are done, and the others; none is done when time is over.

        Raises:
            Exception: nothing moves; it is what a call failed with last, or a :class:`TimeoutError`.
        """
        until = time.monotonic() + seconds
        while True:
            before = time.monotonic()
            left = max(0.0, until - before)
            pause = left if self.limit is None else min(LOOK_SECONDS, left)
            done, running = wait(futures, timeout=pause, return_when=FIRST_COMPLETED)
            now = time.monotonic()
            if done or now >= until:
                return done, running
            if now - before > LOOK_SECONDS + STOPPED_SECONDS:
                self.moved()
            self._give_up_if_stalled()

    def _give_up_if_stalled(self) -> None:
        if self.limit is not None and self.quiet() > self.limit() + self._more:
            self.stalled = True
            raise self.failure or TimeoutError


class Part(bytearray):
    """A part's bytes, and how many of them were ever taken."""

    pace: Pace | None = None
    taken = 0

    def __repr__(self) -> str:
        """With debug logging botocore logs its arguments; file contents must not be in there."""
        return f"<{len(self)} bytes>"

    def sending(self) -> Callable[[int], None]:
        """Begin to send it. What is returned is to be told how many bytes were taken by now."""
        owed = self.pace.quiet() if self.pace is not None and self.taken else 0.0

        def took(count: int) -> None:
            news, self.taken = count > self.taken, max(count, self.taken)
            if self.pace is not None:
                self.pace.moved(0.0 if news else owed)

        return took


def sending(body: Any) -> Callable[[int], None]:
    """The same for any body: what is no part has nobody to be told."""
    return body.sending() if isinstance(body, Part) else lambda _: None
