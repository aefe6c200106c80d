"""Waiting for what other threads and processes do, and asking them over HTTP on this machine."""

from __future__ import annotations

import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from flip_observability import process
from flip_observability.process import ProcessIdentity, current_process


def wait_for(condition: Callable[[], Any], seconds: float = 30.0, what: str = "it", every: float = 0.05) -> Any:
    """Wait until ``condition`` gives something that is true, and return it.

    Raises:
        AssertionError: it did not within ``seconds``.
    """
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        time.sleep(every)
    return found


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def get(url: str, context: ssl.SSLContext | None = None) -> tuple[int, str]:
    """Code and text of an answer; 0 and the type of the error when there was none."""
    try:
        with urllib.request.urlopen(url, timeout=30, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, type(error).__name__


def process_of(pid: int) -> ProcessIdentity:
    """The identity of another process of this machine, as the kernel has it."""
    ticks = process._start_ticks(pid)
    assert ticks is not None
    here = current_process()
    return ProcessIdentity(here.boot_id, here.pid_ns, pid, ticks)
