"""What a drill puts into a job: a stopwatch around the event handler, sudden deaths, big results, other controllers.

Components of the server's job process, named by the job's ``config_fed_server.json``. ``DRILLS_DIR`` is the folder into
which they write what the judge reads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal

from flip_observability.constants import FlipEvents
from flip_observability.demo.workflows import AnnouncedFedAvg
from flip_observability.nvflare import components

FOLDER_VARIABLE = "DRILLS_DIR"
NOTEWORTHY_SECONDS = 0.2
CONSTRUCTION = "construction"
"""Where a :class:`Death` dies before there is any event."""


def write_down(job_id: str, what: str, **values: Any) -> None:
    """Append a line for the judge; it is on the file before the process can die."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    line = json.dumps({"what": what, "time": time.time(), **values}) + "\n"
    descriptor = os.open(Path(folder) / f"{job_id}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class ServerEventHandler(components.ServerEventHandler):
    """The real one, with a stopwatch: how long each event held a thread of NVFLARE."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        begun = time.monotonic()
        super().handle_event(event_type, fl_ctx)
        seconds = time.monotonic() - begun
        if seconds >= NOTEWORTHY_SECONDS or event_type == EventType.END_RUN:
            write_down(str(fl_ctx.get_job_id()), "event", name=event_type, seconds=round(seconds, 3))


class Death(FLComponent):
    """Kills its own process at an event, as the kernel does when memory runs out.

    Args:
        at: an event, or ``construction``.
        number: at which occurrence of it, from 1.
        job: whose death is written down, for one at its construction.
    """

    def __init__(self, at: str, number: int = 1, job: str = "") -> None:
        super().__init__()
        self.at, self.number = at, number
        if at == CONSTRUCTION:
            _die(job)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == self.at:
            self.number -= 1
            if self.number == 0:
                _die(str(fl_ctx.get_job_id()))


def _die(job_id: str) -> None:
    write_down(job_id, "death")
    os.kill(os.getpid(), signal.SIGKILL)


class Ballast(FLComponent):
    """Makes the results big, so that their upload takes a while.

    Args:
        megabytes: of a file that does not compress.
    """

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.megabytes = megabytes

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            folder = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
            (folder / "ballast.bin").write_bytes(random.Random(4711).randbytes(self.megabytes << 20))


class AbortingFedAvg(AnnouncedFedAvg):
    """Says that it was aborted, as FLIP's own controllers do, whatever the abort signal means."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        super().control_flow(abort_signal, fl_ctx)
        if abort_signal.triggered:
            self.fire_event(FlipEvents.ABORTED.value, fl_ctx)
